"""`--net`: a network card at a TAP interface, for as long as the machine lives, whatever its backend does.

The interface is in a namespace that the test makes.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.program import LIMIT, Program, pvh_elf

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("need_kvm")]

NAME = "pyvmm0"
RUNS = bytes.fromhex("66baf803 b00a ee ebfe")  # mov dx, 0x3f8; mov al, "\n"; out dx, al; jmp $


@pytest.fixture
def machine(tmp_path):
    if os.geteuid():
        pytest.skip("a network namespace needs root")
    (tmp_path / "vmlinux").write_bytes(pvh_elf(RUNS))
    (tmp_path / "serial").touch()
    words = ("--kernel", "vmlinux", "--console", "off", "--serial", "file=serial")
    card = ("--net", f"tap={NAME},mac=52:54:00:12:34:56")
    with Program(tmp_path, *words, *card, under=("unshare", "--net")) as run:
        until((tmp_path / "serial").read_bytes)
        yield run


def there(run):
    return f"{NAME}:" in Path(f"/proc/{run.process.pid}/net/dev").read_text()


def until(condition):
    due = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < due
        time.sleep(0.01)


def test_the_interface_comes_and_goes_with_the_machine(machine):
    assert there(machine)
    machine.process.send_signal(signal.SIGTERM)
    assert machine.finish() == 128 + signal.SIGTERM
    machine.check_gone()


def test_a_killed_backend_gets_the_interface_again(machine):
    (first,) = machine.await_descendants(1)
    os.kill(first, signal.SIGKILL)
    machine.await_stderr(b"reconnected after")
    assert there(machine)
    assert machine.descendants().isdisjoint({first})
    machine.process.send_signal(signal.SIGTERM)
    assert machine.finish() == 128 + signal.SIGTERM
    machine.check_gone()
