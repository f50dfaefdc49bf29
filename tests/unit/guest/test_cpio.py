"""The newc writer, read back by an independent reader and by cpio where there is one."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.guest import cpio

names = st.text("abcdefgh/._-", min_size=1, max_size=30)


def read(data: bytes) -> list[tuple[str, int, bytes, tuple[int, int]]]:
    """(name, mode, data, device) of each member up to the trailer."""
    found: list[tuple[str, int, bytes, tuple[int, int]]] = []
    at = 0
    while True:
        assert at % 4 == 0
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        size, name_size = fields[6], fields[11]
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        assert data[at + 110 + name_size - 1] == 0
        start = (at + 110 + name_size + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found.append((name, fields[1], data[start : start + size], (fields[9], fields[10])))
        at = (start + size + 3) // 4 * 4


@given(st.lists(st.tuples(names, st.binary(max_size=50)), max_size=6))
def test_members_come_back(files: list[tuple[str, bytes]]) -> None:
    data = cpio.archive(cpio.regular(name, content) for name, content in files)
    assert [(name, content) for name, _, content, _ in read(data)] == files
    assert len(data) % 4 == 0


def test_kinds_of_members() -> None:
    data = cpio.archive(
        [cpio.directory("dev"), cpio.character("dev/console", 5, 1), cpio.regular("init", b"x", 0o755)]
    )
    assert read(data) == [
        ("dev", stat.S_IFDIR | 0o755, b"", (0, 0)),
        ("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)),
        ("init", stat.S_IFREG | 0o755, b"x", (0, 0)),
    ]


def test_the_same_input_gives_the_same_bytes() -> None:
    entries = [cpio.regular("a", b"1"), cpio.regular("b", b"22")]
    assert cpio.archive(entries) == cpio.archive(entries)


def test_cpio_accepts_it(tmp_path: Path) -> None:
    argv = ["cpio", "-idm"] if shutil.which("cpio") else ["busybox", "cpio", "-idm"]
    if not shutil.which(argv[0]):
        pytest.skip("neither cpio nor busybox is installed (apt-get install busybox-static)")
    data = cpio.archive([cpio.directory("a"), cpio.regular("a/b", b"hello", 0o755)])
    subprocess.run(argv, input=data, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "a" / "b").read_bytes() == b"hello"
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o755
