"""Files that users name: only some kinds, never a wait, and always a reason."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes.backend import no_new_fds

from pyvmm.errors import ConfigError
from pyvmm.files import SocketFile, check_apart, empty, open_file, write_all


def test_a_descriptor_that_blocks_and_is_not_inherited(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"hello")
    fd = open_file("it", str(tmp_path / "f"), "cure")
    assert os.read(fd, 9) == b"hello"
    assert os.get_blocking(fd) and not os.get_inheritable(fd)
    os.close(fd)


def test_a_new_file(tmp_path: Path) -> None:
    os.close(open_file("it", str(tmp_path / "f"), "cure", flags=os.O_WRONLY | os.O_CREAT, mode=0o600))
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600


def test_what_cannot_be_emptied_is_told(tmp_path: Path) -> None:
    fd = os.memfd_create("log", os.MFD_ALLOW_SEALING)
    os.write(fd, b"old")
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(ConfigError, match="^--x: log: Operation not permitted; a writable file is needed"):
        empty("--x: log", fd)
    os.close(fd)


def test_an_output_is_none_of_the_other_files(tmp_path: Path) -> None:
    kernel, link = tmp_path / "kernel", tmp_path / "link"
    kernel.touch()
    link.symlink_to(kernel)
    absent, around = str(tmp_path / "new"), str(tmp_path / "." / ".." / tmp_path.name / "new")
    used = {str(kernel): "--kernel", "": "--initramfs", "/dev/null": "--disk", absent: "--serial"}
    for path, name in ((kernel, "--kernel"), (link, "--kernel"), (around, "--serial")):
        with pytest.raises(ConfigError, match=f"^--x: {path}: is the file of {name}; write to another one$"):
            check_apart({str(path): "--x"}, used)
    check_apart({"/dev/null": "--x", str(tmp_path / "other"): "--y"}, used)


def test_other_kinds_when_asked_for() -> None:
    os.close(open_file("it", "/dev/null", "cure", stat.S_ISREG, stat.S_ISCHR))


@pytest.mark.parametrize(
    ("make", "flags", "reason"),
    [
        (lambda path: None, os.O_RDONLY, "No such file or directory"),
        (lambda path: path.mkdir(), os.O_RDONLY, "is a directory"),
        (lambda path: path.mkdir(), os.O_RDWR, "Is a directory"),
        (os.mkfifo, os.O_RDONLY, "is a pipe"),
        (os.mkfifo, os.O_WRONLY, "nobody is at its other end"),
        (lambda path: path.symlink_to("/dev/zero"), os.O_RDONLY, "is a character device"),
        (lambda path: path.symlink_to(path), os.O_RDONLY, "Too many levels of symbolic links"),
    ],
)
def test_reasons(tmp_path: Path, make: object, flags: int, reason: str) -> None:
    assert callable(make)
    make(tmp_path / "f")
    with no_new_fds(), pytest.raises(ConfigError) as caught:
        open_file("it", str(tmp_path / "f"), "cure", flags=flags)
    assert str(caught.value) == f"it: {reason}; cure"


def test_a_path_with_a_zero_byte() -> None:
    with pytest.raises(ConfigError, match="it: embedded null byte; cure"):
        open_file("it", "a\0b", "cure")


# -- sockets -----------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A path that is short enough."""
    monkeypatch.chdir(tmp_path)
    with no_new_fds():
        yield "s"


def listener(file: SocketFile) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    file.bind(made)
    made.listen(1)
    return made


def test_a_socket_left_over_is_replaced_and_ours_removed(place: str) -> None:
    listener(SocketFile(place)).close()
    assert os.path.exists(place)
    file = SocketFile(place)
    with listener(file), socket.socket(socket.AF_UNIX) as client:
        client.connect(place)
    file.remove()
    assert not os.path.exists(place)
    file.remove()


def test_a_live_socket_stays_its_owners(place: str) -> None:
    owner, late = SocketFile(place), SocketFile(place)
    with listener(owner), socket.socket(socket.AF_UNIX) as refused, socket.socket(socket.AF_UNIX) as client:
        with pytest.raises(OSError, match="already in use"):
            late.bind(refused)
        late.remove()
        client.connect(place)
    owner.remove()
    assert not os.path.exists(place)


def test_what_somebody_put_there_since_stays(place: str) -> None:
    first, second = SocketFile(place), SocketFile(place)
    listener(first).close()
    with listener(second):
        first.remove()
        assert os.path.exists(place)


@pytest.mark.parametrize("make", [lambda path: open(path, "x").close(), os.mkdir, os.mkfifo])
def test_what_is_no_socket_stays(place: str, make: Callable[[str], None]) -> None:
    make(place)
    with socket.socket(socket.AF_UNIX) as refused, pytest.raises(OSError, match="already in use"):
        SocketFile(place).bind(refused)
    assert os.path.exists(place)


# -- readers that stop -----------------------------------------------------------------


def test_write_all_gives_up_when_told_to() -> None:
    reader, writer = os.pipe()
    looks = []
    assert not write_all(writer, bytes(1 << 20), lambda: looks.append(1) is None and len(looks) < 3)
    assert len(looks) == 3
    os.close(writer)
    with open(reader, "rb") as rest:
        assert len(rest.read()) >= 65536 - 4096
