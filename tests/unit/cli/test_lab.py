"""The command line of `pyvmm lab`: what it says before a machine is started."""

from __future__ import annotations

from typing import Any

import pytest

from pyvmm.cli import lab
from pyvmm.host import emulator
from pyvmm.host import lab as machine


@pytest.mark.parametrize(
    ("words", "qemu", "cpus", "warned"),
    [
        ([], None, 1, False),
        (["--cpus", "2"], None, 2, True),
        (["--cpus", "2"], "/cache/qemu", 2, False),
    ],
)
def test_several_cpus_in_a_qemu_that_does_not_bear_them(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    qemu: str | None,
    cpus: int,
    warned: bool,
) -> None:
    started: dict[str, Any] = {}

    def run_in_lab(argv: list[str], **room: Any) -> int:
        started.update(room)
        return 7

    monkeypatch.setattr(machine, "run_in_lab", run_in_lab)
    monkeypatch.setattr(emulator, "own_program", lambda: qemu)
    assert lab.main([*words, "--", "true"]) == 7
    assert started["cpus"] == cpus
    assert ("scripts/lab-qemu" in capfd.readouterr().err) == warned
