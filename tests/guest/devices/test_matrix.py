"""Real backends, unmodified drivers, real data: what both ends saw is the same.

A row of `rows.ROWS` is a test.  The rows of one boot run in one guest, whose outcome is kept.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from guest.devices.rows import ROWS, Row
from guest.machines import Machine

from pyvmm.host.kernels import Kernel

pytestmark = pytest.mark.slow

TESTS = str(Path(__file__).parents[2])


@pytest.fixture(scope="session")
def outcomes() -> dict[str, Any]:
    """What each boot so far has shown."""
    return {}


def outcome(machine: Machine, kernel: Kernel, boot: str, outcomes: dict[str, Any]) -> dict[str, Any]:
    """The outcome of a boot, run now if it is the first of its rows."""
    if boot not in outcomes:
        outcomes[boot] = {"machine": {"log": "the host's side failed"}}
        outcomes[boot] = run(machine, kernel, boot)
    result: dict[str, Any] = outcomes[boot]
    return result


def run(machine: Machine, kernel: Kernel, boot: str) -> dict[str, Any]:
    """One boot, and what both of its sides report."""
    words = [sys.executable, "-P", "-m", "guest.devices.host_side", kernel.path, boot]
    done = machine.run(*words, timeout=280, env={"PYTHONPATH": TESTS}).ok()
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_data_moves(machine: Machine, own: Kernel, outcomes: dict[str, Any], row: Row) -> None:
    if row.absent:
        pytest.skip(f"{row.name}: {row.absent}")
    whole = outcome(machine, own, row.boot, outcomes)
    found = whole[row.name]
    if "skip" in found:
        pytest.skip(found["skip"])
    guest, host = found["guest"], found["host"]
    shown = f"{json.dumps(found, indent=1)}\n{whole['machine']['log']}"
    assert "error" not in guest and "error" not in host, shown
    both = guest.keys() & host.keys()
    assert {key: guest[key] for key in both} == {key: host[key] for key in both}, shown
    assert {key: guest.get(key) for key in row.expect} == row.expect, shown
    assert both or row.expect, shown


@pytest.mark.parametrize("boot", sorted({row.boot for row in ROWS if row.boot}))
def test_the_machine_ends_well(machine: Machine, own: Kernel, outcomes: dict[str, Any], boot: str) -> None:
    """Power-off is status 0; a machine whose plug a row pulls ends by SIGKILL."""
    pulled = any(row.proof == "flush" for row in ROWS if row.boot == boot)
    found = outcome(machine, own, boot, outcomes)["machine"]
    assert found["status"] == (-9 if pulled else 0), found["log"]
