"""The lab's parts that need no machine: its command line, its console, its progress line."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError, GuestError, GuestPanic, GuestTimeout
from pyvmm.host import emulator, lab
from pyvmm.host.console import ConsoleLog
from pyvmm.host.progress import Progress
from pyvmm.loop import EventLoop


def command(**changes: object) -> list[str]:
    values: dict[str, object] = {
        "memory": 2 << 30,
        "cpus": 3,
        "kernel": "/k",
        "initramfs": "/i",
        "files": [("root", 7), ("share0", 8)],
        "channel": 5,
        "console": 6,
        "quiet": True,
    }
    return emulator.command(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / emulator.QEMU).write_text("#!/bin/sh\n")
    (tmp_path / emulator.QEMU).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nothing"))


def test_the_machine_has_svm_and_shared_memory(qemu: None) -> None:
    words = " ".join(command())
    assert "-cpu max,+svm,la57=off" in words
    assert "-m 2048M -smp 3" in words
    assert "memory-backend-memfd,id=ram,size=2048M,share=on" in words
    assert "socket,id=command,fd=5" in words and "name=pyvmm.command" in words
    assert "vhost-user-fs-pci,chardev=share0,tag=share0" in words and "socket,id=share0,fd=8" in words
    assert "nohz=off highres=off quiet" in words
    assert "quiet" not in " ".join(command(quiet=False))


def test_the_lab_takes_its_own_qemu_where_that_is_built(
    qemu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert command()[0] == str(tmp_path / emulator.QEMU)
    own = tmp_path / "cache" / "pyvmm" / "qemu" / emulator.QEMU
    own.parent.mkdir(parents=True)
    own.write_bytes(b"")
    assert command()[0] == str(tmp_path / emulator.QEMU)  # it cannot be executed
    own.chmod(0o755)
    assert command()[0] == str(own)


def test_without_qemu_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="apt-get install qemu-system-x86"):
        command()


def test_only_directories_can_be_shared(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--share .*file: no such directory"):
        lab.run_in_lab(["true"], share=[str(tmp_path / "file")])
    with pytest.raises(ConfigError, match="--share : no such directory"):  # and not the current one
        lab.run_in_lab(["true"], share=[""])


def test_a_lab_that_hangs_is_ended_after_its_time_and_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    silent: list[socket.socket] = []
    monkeypatch.setattr(lab.Lab, "_start_machine", lambda _, channel: silent.append(channel.dup()))
    machine = lab.Lab(lab.LabConfig(("true",), timeout=0.01, grace=0.02))
    try:
        with pytest.raises(GuestTimeout, match=r"within 0.01 s and 0.02 s for the start"):
            machine.run(None, None, None)
    finally:
        machine.close()
        silent[0].close()


PANIC = b"[    1.5] Kernel panic - not syncing: VFS: no root\r\n[    1.6] CPU: 0\r\n"


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (PANIC, GuestPanic, "its kernel panicked: VFS: no root"),
        (b"pyvmm-init: fatal: no virtio-console port\n", GuestError, "its init said: no virtio-console port"),
        (b"[ 1.0] hello\r\n", GuestError, "without a word; bad fd; its console's last line: [ 1.0] hello"),
        (b"", GuestError, "without a word; bad fd"),
    ],
)
def test_why_a_machine_ended(text: bytes, kind: type[GuestError], words: str) -> None:
    with EventLoop() as loop:
        console = ConsoleLog(loop)
        machine = console.take_socket()
        machine.sendall(text)
        machine.close()
        console.drain()
        error = console.explain("bad fd")
        console.close()
    assert type(error) is kind
    assert words in str(error)


def test_progress_is_for_terminals_only(capfd: pytest.CaptureFixture[str]) -> None:
    progress = Progress("lab")
    progress.show("starting")
    progress.clear()
    assert capfd.readouterr().err == ""


def test_progress_on_a_terminal_leaves_a_clean_line() -> None:
    ours, theirs = os.openpty()
    saved = os.dup(2)
    try:
        os.dup2(theirs, 2)
        progress = Progress("lab")
        progress.show("starting")
        progress.clear()
        progress.clear()
    finally:
        os.dup2(saved, 2)
        os.close(saved)
    text = b""
    while text.count(b"\r\033[K") < 2:
        text += os.read(ours, 4096)
    os.close(ours)
    os.close(theirs)
    assert b"[lab] starting" in text
    assert text.endswith(b"\r\033[K") and text.count(b"\r\033[K") == 2
