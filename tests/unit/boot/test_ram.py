"""Files copied into guest RAM: through the RAM file, or where that is impossible through the mapping."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm import layout
from pyvmm.boot.ram import GuestRam
from pyvmm.errors import ConfigError
from pyvmm.layout import RamRange

SIZE = 64 << 10
DATA = bytes(range(256)) * 32


class Memory:
    """RAM of two pieces in one file, as above and below the 32-bit hole."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ram")
        os.ftruncate(self.fd, SIZE)
        self.map = mmap.mmap(self.fd, SIZE)
        self.ranges = (RamRange(0, SIZE // 2, 0), RamRange(layout.HIGH_RAM, SIZE // 2, SIZE // 2))

    def ram(self, fd: int) -> GuestRam:
        return GuestRam(memoryview(self.map), self.ranges, fd)


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    os.close(memory.fd)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    with path.open("rb") as opened:
        yield opened.fileno()


@pytest.mark.parametrize("through_file", [True, False])
def test_a_part_of_a_file_goes_where_it_should(memory: Memory, file: int, through_file: bool) -> None:
    ram = memory.ram(memory.fd if through_file else -1)
    ram.fill(layout.HIGH_RAM + 5, 1000, file, 7, "file")
    start = SIZE // 2 + 5
    assert memory.map[start : start + 1000] == DATA[7:1007]
    assert not any(memory.map[:start]) and not any(memory.map[start + 1000 :])


def test_a_ram_file_that_cannot_be_written_is_filled_through_its_mapping(
    memory: Memory, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def refuse(*arguments: object) -> int:
        calls.append(arguments)
        raise OSError(errno.EINVAL, "huge pages")

    monkeypatch.setattr(os, "sendfile", refuse)
    ram = memory.ram(memory.fd)
    ram.fill(0, 100, file, 0, "file")
    ram.fill(200, 100, file, 0, "file")
    assert memory.map[:300] == DATA[:100] + bytes(100) + DATA[:100]
    assert len(calls) == 1


def test_other_errors_are_not_hidden(memory: Memory, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(os, "sendfile", refuse)
    with pytest.raises(OSError, match="broken disk"):
        memory.ram(memory.fd).fill(0, 100, file, 0, "file")


@pytest.mark.parametrize("through_file", [True, False])
def test_a_file_that_shrinks_while_it_is_read(memory: Memory, file: int, through_file: bool) -> None:
    ram = memory.ram(memory.fd if through_file else -1)
    with pytest.raises(ConfigError, match="vmlinux: the file ended"):
        ram.fill(0, 100, file, len(DATA) - 99, "vmlinux")


@pytest.mark.parametrize(
    ("address", "size"), [(SIZE // 2 - 1, 2), (SIZE // 2, 1), (layout.HIGH_RAM + SIZE // 2, 1)]
)
def test_nothing_is_put_beside_ram(memory: Memory, file: int, address: int, size: int) -> None:
    with pytest.raises(ValueError, match="not in guest RAM"):
        memory.ram(memory.fd).fill(address, size, file, 0, "file")
