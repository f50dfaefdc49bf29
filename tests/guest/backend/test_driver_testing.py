"""docs/driver-testing.md: its driver, device, guest and test, as they are printed there, do what it says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from guest import pages
from guest.machines import Machine

from pyvmm.host.kernels import Kernel

pytestmark = pytest.mark.slow
FILES = {"words.py", "word.c", "trusting.c", "Makefile", "init.c", "test_word.py"}


def test_driver_testing(machine: Machine, debian_kernel: Kernel) -> None:
    folder = machine.shared / "driver-testing"
    assert pages.save("driver-testing.md", folder) == FILES
    driver = (folder / "word.c").read_text().splitlines()[1:]
    assert len([line for line in driver if line.strip()]) <= 60  # as the page says
    if not Path(f"/lib/modules/{debian_kernel.release}/build").exists():
        pytest.skip(f"no headers of Linux {debian_kernel.release}: apt-get install linux-headers-cloud-amd64")
    # Here, since the emulated machine takes a minute for it; there `make` finds that all is done.
    subprocess.run(["make", "-C", folder, f"RELEASE={debian_kernel.release}"], check=True)
    done = pages.run_pytest(machine, folder, "test_word.py", timeout=250)
    assert b"13 passed" in done.stdout, repr(done)
