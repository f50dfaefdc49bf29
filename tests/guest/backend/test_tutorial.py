"""docs/backends.md: its device, its guest and its test, as they are printed there, do what it says."""

from __future__ import annotations

import pytest
from guest import pages
from guest.machines import Machine

pytestmark = pytest.mark.slow


# Two runs, since twelve guests may take the emulated machine longer than one test may.
@pytest.mark.parametrize(("test", "plans"), [("test_nothing_is_lost", 5), ("test_driver_survives", 7)])
def test_tutorial(machine: Machine, test: str, plans: int) -> None:
    folder = machine.shared / f"tutorial-{plans}"  # a new one: the machine may remember the files of another
    assert pages.save("backends.md", folder) == {"pattern.py", "init.c", "test_driver.py"}
    done = pages.run_pytest(machine, folder, f"test_driver.py -k {test}", timeout=250)
    assert f"{plans} passed".encode() in done.stdout, repr(done)
