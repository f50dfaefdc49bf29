"""Notes and reading: what a whole load does not reach."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import kernels

from pyvmm.boot import elf
from pyvmm.errors import ConfigError


def test_notes() -> None:
    data = kernels.note(b"GNU\0", 3, b"12345") + kernels.note(b"Xen\0", 18, b"8" * 8)
    assert list(elf.notes(data, 4)) == [(b"GNU", 3, b"12345"), (b"Xen", 18, b"8" * 8)]


@pytest.mark.parametrize("length", range(36))
def test_notes_end_where_they_are_cut_off(length: int) -> None:
    data = kernels.note(b"GNU\0", 3, b"12345678") + kernels.note(b"Xen\0", 18, b"")
    found = list(elf.notes(data[:length], 4))
    assert all(len(desc) == 8 for owner, _, desc in found if owner == b"GNU")
    assert len(found) == (length >= 24)


def test_notes_with_absurd_lengths() -> None:
    assert list(elf.notes(b"\xff" * 40, 4)) == []


def test_absurdly_long_notes_are_not_searched(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(kernels.elf(notes=kernels.pvh_note().ljust(2 << 20, b"\0")))
    with path.open("rb") as file:
        assert elf.parse(file.fileno(), "vmlinux").pvh_entry is None


@pytest.mark.parametrize("offset", [1 << 20, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_program_headers_where_no_file_can_be(offset: int, tmp_path: Path) -> None:
    path, data = tmp_path / "vmlinux", bytearray(kernels.elf())
    data[32:40] = offset.to_bytes(8, "little")
    path.write_bytes(data)
    with path.open("rb") as file, pytest.raises(ConfigError, match="its program headers are cut off"):
        elf.parse(file.fileno(), "vmlinux")
