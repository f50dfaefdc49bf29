"""The machine that guest tests run in: another one after a panic of the emulated kernel, not for ever."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from guest.machines import PANICS_BORNE, LabMachine

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


def test_a_panic_of_the_lab_costs_a_machine(lab: LabMachine, tmp_path: Path) -> None:
    once = f"test -e {tmp_path}/done || {{ : >{tmp_path}/done; echo c >/proc/sysrq-trigger; sleep 60; }}"
    for _ in range(PANICS_BORNE):
        (tmp_path / "done").unlink(missing_ok=True)
        lab.run("sh", "-c", f"{once}; echo again").ok()
    with pytest.raises((EOFError, BrokenPipeError)):
        lab.run("sh", "-c", "echo c >/proc/sysrq-trigger; sleep 60")
    assert lab.run("echo", "another").ok().stdout == b"another\n"


def test_a_command_that_runs_out_of_time_has_another_try_and_no_third(
    lab: LabMachine, tmp_path: Path
) -> None:
    hang = f"test -e {tmp_path}/done || {{ : >{tmp_path}/done; sleep 60; }}; echo again"
    assert lab.run("sh", "-c", hang, timeout=3).ok().stdout == b"again\n"
    assert lab.run("sleep", "60", timeout=3).status is None


def test_a_command_without_an_answer_costs_a_machine(lab: LabMachine) -> None:
    lab.grace = 5.0
    with pytest.raises(TimeoutError):
        lab.run("sh", "-c", "kill -STOP $PPID; sleep 60", timeout=10)  # the agent itself
    assert lab.run("echo", "another").ok().stdout == b"another\n"
