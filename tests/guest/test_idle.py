"""A Linux that waits, with the default console and its files mounted, costs the host nothing."""

from __future__ import annotations

import json
import sys

import pytest
from fakes.source import ROOT
from guest.machines import Machine

from pyvmm.host.kernels import Kernel

pytestmark = pytest.mark.slow

LIMITS = {  # percent of a CPU, over five seconds
    "main thread": 0.5,
    "virtual CPU (other threads)": 10,  # emulated, in the lab, and Linux has some timers
    "console process": 0.5,
    "virtiofsd": 0.5,
}


def test_an_idle_linux_costs_nothing(machine: Machine, own: Kernel) -> None:
    benchmark = ROOT / "tests" / "bench" / "startup.py"
    done = machine.run(sys.executable, "-P", benchmark, "--only", "idle", "--json").ok()
    used = {
        row[0].partition("idles, ")[2]: float(row[1].removesuffix(" %")) for row in json.loads(done.stdout)
    }
    assert used.keys() == LIMITS.keys()
    assert all(used[name] < limit for name, limit in LIMITS.items()), used
