"""A machine whose first CPU the processor refuses to enter: prints how its run ends.

In long mode a code segment is of 64 or of 32 bits; one that claims both makes VMRUN end with
VMEXIT_INVALID (AMD APM volume 2, 15.5.1) and VM entry fail on Intel (SDM volume 3, 27.3.1.2), while
KVM takes it in KVM_SET_SREGS.  Needs a KVM of the processor's, one that emulates ring 0 does not look.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from fakes.program import SPIN, pvh_elf

from pyvmm import config
from pyvmm.loop import EventLoop
from pyvmm.vm import Vm


def main() -> None:
    """Run it."""
    with tempfile.TemporaryDirectory() as folder:
        kernel = Path(folder) / "vmlinux"
        kernel.write_bytes(pvh_elf(SPIN))
        payload = config.PayloadConfig(str(kernel), protocol="linux64")
        wanted = config.VmConfig(payload, memory=config.MemoryConfig(16 << 20))
        with EventLoop() as loop, Vm(wanted, loop) as built:
            built._current._vcpus[0].set_sregs({"cs": {"l": 1, "db": 1}})
            loop.call_later(30, built.stop)
            outcome = built.run()
    print(outcome.kind)
    print(outcome.report)


if __name__ == "__main__":
    main()
