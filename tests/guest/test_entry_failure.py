"""KVM gives up on a guest before its first instruction: the report of a real KVM_EXIT_FAIL_ENTRY."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from guest import refused_entry
from guest.machines import Machine

pytestmark = pytest.mark.slow

TESTS = Path(refused_entry.__file__).parent.parent


def test_an_entry_that_the_processor_refuses_is_reported(machine: Machine) -> None:
    path = f"{TESTS}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    done = machine.run(sys.executable, "-P", refused_entry.__file__, env={"PYTHONPATH": path}).ok()
    kind, first, *rest = done.stdout.decode().splitlines()
    assert kind == "crash", repr(done)
    # 0xffffffff is VMEXIT_INVALID, 0x80000021 Intel's `invalid guest state`
    reason = r"\(KVM_EXIT_FAIL_ENTRY, 0x(ffffffff|ffffffffffffffff|80000021)\)"
    assert re.fullmatch(
        rf"virtual CPU 0: the processor refused to enter the guest {reason} at 0x[0-9a-f]+", first
    ), repr(done)
    text = "\n".join(rest)
    for part in ("  code: ", "rip ", "cr0 80000011", "efer 500", "cs 10:0/ffffffff type b dpl 0"):
        assert part in text, repr(done)
    assert "note:" not in text, "neither a reset nor an emulated ring 0 is why"
