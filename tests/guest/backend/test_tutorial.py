"""docs/backends.md: its device, its guest and its test, as they are printed there, do what it says."""

from __future__ import annotations

import pytest
from guest import pages
from guest.machines import Machine

pytestmark = pytest.mark.slow


def test_tutorial(machine: Machine) -> None:
    folder = machine.shared / "tutorial"
    assert pages.save("backends.md", folder) == {"pattern.py", "init.c", "test_driver.py"}
    done = pages.run_pytest(machine, folder, "test_driver.py", timeout=200)
    assert b"12 passed" in done.stdout, repr(done)
