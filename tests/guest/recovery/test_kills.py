"""Backends killed a hundred times under a guest that verifies every block it writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from guest.machines import Machine

from pyvmm.guest.initramfs import build
from pyvmm.host.kernels import Kernel

pytestmark = [pytest.mark.slow, pytest.mark.lab]

HERE = Path(__file__).parent
KILLS = 100
# How a backend finishes what it was given, workers of the guest, and whether that can always go on
ROWS = {
    "in-flight, in order": ("blk", 4),
    "in-flight, in any order": ("overtaking", 8),
    "not tracked, one request at a time": ("storage daemon", 1),
}


@pytest.fixture
def initramfs(tmp_path: Path) -> Path:
    """verify.c as the guest's first process."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    subprocess.run(["gcc", "-static", "-O1", "-w", "-o", tmp_path / "init", HERE / "verify.c"], check=True)
    path = tmp_path / "initramfs"
    path.write_bytes(build([], (tmp_path / "init").read_bytes()))
    return path


def play(machine: Machine, own: Kernel, scratch: Path, initramfs: Path, **more: Any) -> dict[str, Any]:
    shutil.copy(initramfs, scratch / "initramfs")
    setup = {
        "kernel": str(own.path),
        "initramfs": str(scratch / "initramfs"),
        "folder": str(scratch),
        "kills": KILLS,
        "seconds": 200,
        **more,
    }
    words = (sys.executable, "-P", HERE / "killer.py", json.dumps(setup))
    done = machine.run(*words, timeout=280, env={"PYTHONPATH": str(HERE.parents[1])}).ok()
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


@pytest.mark.parametrize("row", ROWS)
def test_nothing_is_lost_or_doubled(
    machine: Machine, own: Kernel, scratch: Path, initramfs: Path, row: str
) -> None:
    mode, workers = ROWS[row]
    seen = play(machine, own, scratch, initramfs, mode=mode, workers=workers)
    told = f"{seen['log']}\n{seen['serial']}"
    assert (seen["kills"], seen["stuck"], seen["status"]) == (KILLS, False, 0), told
    assert f"{workers} workers, 0 failed" in seen["serial"], told
    assert seen["serial"].count(" 0 wrong") == workers, told
    assert seen["log"].count("reconnected after") >= KILLS - 1, told


def test_what_nobody_knows_is_not_guessed(
    machine: Machine, own: Kernel, scratch: Path, initramfs: Path
) -> None:
    """Several requests at a backend that overtakes and tracks none: it goes on exactly, or not at all."""
    seen = play(machine, own, scratch, initramfs, mode="storage daemon", workers=8, kills=20)
    told = f"{seen['log']}\n{seen['serial']}"
    assert "waits until the guest resets it" in seen["log"] if seen["stuck"] else seen["kills"] == 20, told
    assert seen["serial"].count(" 0 wrong") == seen["serial"].count(" wrong"), told
