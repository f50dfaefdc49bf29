"""`pyvmm run`: where it runs, and what the lab is told when it cannot be here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pyvmm import run as runner
from pyvmm.cli import run
from pyvmm.cli.parse import parse
from pyvmm.errors import ConfigError
from pyvmm.guest import initramfs
from pyvmm.host import accel, emulator, lab

GIB = 1 << 30
EMULATED = "the KVM of /dev/kvm emulates ring 0, so Linux cannot run on it"


class Ways:
    """What the command did: `here` is the guest that it ran, `words` and `room` went to the lab."""

    def __init__(self) -> None:
        self.here: runner.RunConfig | None = None
        self.words: list[str] = []
        self.room: dict[str, Any] = {}

    def run_here(self, config: runner.RunConfig) -> int:
        self.here = config
        return 7

    def run_in_lab(self, argv: list[str], **room: Any) -> int:
        self.words, self.room = argv, room
        return 8


@pytest.fixture
def ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ways:
    """On a host that emulates ring 0, with the kernel `vmlinux` in the current directory."""
    ways = Ways()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vmlinux").write_bytes(b"\x7fELF".ljust(64))
    monkeypatch.delenv(accel.LAB_MARK, raising=False)
    monkeypatch.setattr(accel, "why_not", lambda: EMULATED)
    monkeypatch.setattr(initramfs, "for_kernel", lambda modules: "/archive")
    monkeypatch.setattr(runner, "run_or_show", ways.run_here)
    monkeypatch.setattr(runner, "unpack_ahead", lambda path: None)
    monkeypatch.setattr(lab, "run_in_lab", ways.run_in_lab)
    return ways


def start(*words: str) -> int:
    return run.main(["--kernel", "./vmlinux", *words])


def inside(ways: Ways) -> Any:
    """What the program in the lab reads from its command line."""
    assert ways.words[:5] == [sys.executable, "-P", "-m", "pyvmm", "run"]
    return parse(run.COMMAND, ways.words[5:])


@pytest.mark.parametrize("accelerator", [[], ["--accel", "auto"], ["--accel=auto"], ["--accel", "lab"]])
def test_the_command_of_the_lab_is_the_user_s_with_kvm(ways: Ways, accelerator: list[str]) -> None:
    words = ["--append", "quiet x", "-v", "--share", ".", *accelerator, "--", "sh", "-c", "--accel auto"]
    assert start(*words) == 8
    given = inside(ways)
    assert given.text("accel") == "kvm"
    assert given.text("kernel") == "./vmlinux" and given.text("append") == "quiet x"
    assert given.count("verbose") == 1 and given.trailing == ["sh", "-c", "--accel auto"]
    assert given.texts("share") == ways.room["share"] == ["."]


def test_the_lab_is_said_to_be_used_and_why(ways: Ways, capfd: pytest.CaptureFixture[str]) -> None:
    start("--", "true")
    choice = "using an emulated machine instead (pyvmm lab), which is some fifty times slower"
    assert capfd.readouterr().err == f"pyvmm: {EMULATED}: {choice}\n"
    start("--accel", "lab", "--", "true")
    assert capfd.readouterr().err == ""


def test_where_kvm_runs_kernels_the_guest_is_here(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "why_not", lambda: "")
    assert start("--accel", "auto", "--", "true") == 7
    assert ways.here is not None and ways.here.argv == ("true",)


def test_what_the_user_says_is_not_measured(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "why_not", lambda: pytest.fail("measured"))
    assert start("--accel", "kvm", "--", "true") == 7
    assert start("--accel", "lab", "--", "true") == 8


def test_the_lab_is_not_used_in_the_lab(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(accel.LAB_MARK, "1")
    assert start("--", "true") == 7
    with pytest.raises(ConfigError, match="--accel: lab: this already is the lab"):
        start("--accel", "lab", "--", "true")


@pytest.mark.parametrize("qemu", [None, "/cache/qemu"])
def test_the_lab_holds_the_guest(ways: Ways, monkeypatch: pytest.MonkeyPatch, qemu: str | None) -> None:
    """And it has more than one CPU only in a QEMU that bears it."""
    monkeypatch.setattr(emulator, "own_program", lambda: qemu)
    start("--memory", "8G", "--cpus", "32", "--", "true")
    assert ways.room["memory"] == 9 * GIB
    assert ways.room["cpus"] == (min(lab.MOST_CPUS, os.cpu_count() or 1) if qemu else 1)
    assert ways.room["timeout"] == 0
    start("--", "true")
    assert (ways.room["memory"], ways.room["cpus"]) == (4 * GIB, lab.CPUS)


def test_the_lab_ends_some_time_after_the_guest_should_have(ways: Ways) -> None:
    start("--timeout", "5", "--", "true")
    assert inside(ways).text("timeout") == "5"
    assert (ways.room["timeout"], ways.room["grace"]) == (5, lab.START_SECONDS)
