"""What the lab's machine is made of: QEMU's command line and the kernel.

Facts about foreign programs, and nothing that runs: `lab` starts and ends them.
"""

from __future__ import annotations

import os
import shutil

from .. import cache
from ..errors import ConfigError
from ..guest.modules import ModuleTree
from . import kernels

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# A la57 guest would need five-level tables in the nested KVM; SVM is what TCG emulates.  XSAVE stays: what is
# without AVX then is too old for OpenBLAS, which NumPy brings along.
CPU_MODEL = "max,+svm,la57=off"
ACCELERATOR = "tcg,thread=multi,tb-size=512"
# While a nested guest runs, Debian's QEMU now and then loses an interrupt of the machine's own.  A CPU that
# waits for a timer of one shot then waits for ever, and the machine stands still; a periodic one comes again.
KERNEL_ARGUMENTS = "console=ttyS0 mitigations=off panic=-1 nohz=off highres=off"
QEMU = "qemu-system-x86_64"
BUILDER = "scripts/lab-qemu"
MIB = 1 << 20


def own_program() -> str | None:
    """The QEMU that scripts/lab-qemu has built for the lab, if it has."""
    path = os.path.join(cache.directory("qemu"), QEMU)
    return path if os.access(path, os.X_OK) else None


def program() -> str | None:
    """The QEMU for the lab: the lab's own before the one in PATH."""
    return own_program() or shutil.which(QEMU)


def kernel(progress: Callable[[str], None]) -> kernels.Kernel:
    """A kernel that has KVM for AMD, as Debian's have; fetched when there is none.  Raises ConfigError."""
    for known in kernels.find_kernels():
        if known.modules is not None and ModuleTree(known.modules).has("kvm_amd"):
            return known
    return kernels.fetch_kernel(progress)


def command(
    *,
    memory: int,
    cpus: int,
    kernel: str,
    initramfs: str,
    files: Sequence[tuple[str, int]],
    channel: int,
    console: int,
    quiet: bool,
) -> list[str]:
    """QEMU's command line.  `files` are (tag, connected socket), the others connected sockets."""
    qemu = program()
    if qemu is None:
        raise ConfigError(f"the lab needs {QEMU}: apt-get install qemu-system-x86")
    append = KERNEL_ARGUMENTS + (" quiet" if quiet else "")
    argv = [qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-machine", "q35,memory-backend=ram", "-accel", ACCELERATOR, "-cpu", CPU_MODEL]
    argv += ["-m", f"{memory // MIB}M", "-smp", str(cpus)]
    argv += ["-object", f"memory-backend-memfd,id=ram,size={memory // MIB}M,share=on"]
    argv += ["-kernel", kernel, "-initrd", initramfs, "-append", append]
    argv += ["-chardev", f"socket,id=console,fd={console}", "-serial", "chardev:console"]
    argv += ["-chardev", f"socket,id=command,fd={channel}", "-device", "virtio-serial-pci"]
    argv += ["-device", "virtserialport,chardev=command,name=pyvmm.command"]
    for tag, fd in files:
        argv += ["-chardev", f"socket,id={tag},fd={fd}"]
        argv += ["-device", f"vhost-user-fs-pci,chardev={tag},tag={tag},queue-size=1024"]
    return argv
