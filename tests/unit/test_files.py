"""Files that users name: only some kinds, never a wait, and always a reason."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from fakes.backend import no_new_fds

from pyvmm.errors import ConfigError
from pyvmm.files import open_file


def test_a_descriptor_that_blocks_and_is_not_inherited(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"hello")
    fd = open_file("it", str(tmp_path / "f"), "cure")
    assert os.read(fd, 9) == b"hello"
    assert os.get_blocking(fd) and not os.get_inheritable(fd)
    os.close(fd)


def test_a_new_file(tmp_path: Path) -> None:
    os.close(open_file("it", str(tmp_path / "f"), "cure", flags=os.O_WRONLY | os.O_CREAT, mode=0o600))
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600


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
