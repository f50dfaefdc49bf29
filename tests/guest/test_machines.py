"""The machine that guest tests run in: what it loses by itself is tried again, not for ever."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from guest.machines import LabMachine

from pyvmm.host import accel

pytestmark = [pytest.mark.slow, pytest.mark.lab]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[LabMachine]:
    """A machine of the test's own, whose command may stand still and whose kernel may panic."""
    if not accel.why_not():
        pytest.skip("guests run on this host itself")
    lab = LabMachine(tmp_path)
    try:
        yield lab
    finally:
        lab.close()


def once(done: Path, *, then: str) -> tuple[str, str, str]:
    """A command that does `then` the first time, and says so the second time."""
    return "sh", "-c", f"test -e {done} || {{ : >{done}; {then}; }}; echo again"


def test_a_panic_of_the_lab_costs_a_machine(lab: LabMachine, tmp_path: Path) -> None:
    lab.losses_borne = 1
    panic = "echo c >/proc/sysrq-trigger; sleep 60"
    assert lab.run(*once(tmp_path / "done", then=panic)).ok().stdout == b"again\n"
    with pytest.raises((EOFError, BrokenPipeError)):
        lab.run("sh", "-c", panic)
    assert lab.run("echo", "another").ok().stdout == b"another\n"


def test_a_command_that_runs_out_of_time_has_another_try_and_no_third(
    lab: LabMachine, tmp_path: Path
) -> None:
    lab.losses_borne = 1
    assert lab.run(*once(tmp_path / "done", then="sleep 60"), timeout=3).ok().stdout == b"again\n"
    assert lab.run("sleep", "60", timeout=3).status is None


def test_a_guest_that_hangs_costs_a_moment(lab: LabMachine, tmp_path: Path) -> None:
    """The first command looks like one: KVM's counter of page faults is high as long as it runs."""
    lab.losses_borne = 1
    counter = "/sys/kernel/debug/kvm/pf_guest"
    high = f"echo 200000 >/run/high; mount --bind /run/high {counter}; sleep 60"
    again = f"umount {counter}; echo again"
    words = ("sh", "-c", f"test -e {tmp_path}/done || {{ : >{tmp_path}/done; {high}; }}; {again}")
    assert lab.run(*words, timeout=50).ok().stdout == b"again\n"


def test_what_a_command_leaves_is_ended(lab: LabMachine) -> None:
    lab.run("sh", "-c", "sleep 1234 >/dev/null 2>&1 &").ok()
    assert lab.run("pgrep", "-f", "sleep 1234").status == 1


def test_a_command_without_an_answer_costs_a_machine(lab: LabMachine) -> None:
    lab.grace, lab.losses_borne = 5.0, 1
    with pytest.raises(TimeoutError):
        lab.run("sh", "-c", "kill -STOP $PPID; sleep 60", timeout=10)  # the agent itself
    assert lab.run("echo", "another").ok().stdout == b"another\n"


def test_a_triple_fault_that_is_not_meant_has_another_try(lab: LabMachine, tmp_path: Path) -> None:
    lab.losses_borne = 1
    fault = "echo 'virtual CPU 0: triple fault (KVM_EXIT_SHUTDOWN)' >&2; exit 126"
    assert lab.run(*once(tmp_path / "meant", then=fault), faults=True).status == 126
    assert lab.run(*once(tmp_path / "done", then=fault)).ok().stdout == b"again\n"
    assert lab.run("sh", "-c", fault).status == 126
