"""The page walker in each paging mode, over tables written here."""

from __future__ import annotations

from struct import pack_into

import pytest

from pyvmm import layout
from pyvmm.boot import cpu, linux64
from pyvmm.boot.paging import read_linear, translate
from pyvmm.boot.ram import GuestRam

SIZE = 16 << 20
LONG = {"cr0": 1 << 31 | 1, "cr3": 0x1000, "cr4": 1 << 5, "efer": 0x500}
LA57 = {**LONG, "cr4": 1 << 5 | 1 << 12}
PAE = {**LONG, "cr3": 0x1020, "efer": 0}
LEGACY = {**LONG, "cr4": 0, "efer": 0}
HIGH = 0xFFFF_FFFF_8123_4567


class Tables:
    """RAM in which entries are put at (table, index)."""

    def __init__(self) -> None:
        self.memory = bytearray(SIZE)
        self.ram = GuestRam(memoryview(self.memory), layout.ram_ranges(SIZE))
        self.read = self.ram.read

    def put(self, table: int, index: int, value: int, shape: str = "<Q") -> None:
        pack_into(shape, self.memory, table + index * (8 if shape == "<Q" else 4), value)


@pytest.fixture
def tables() -> Tables:
    return Tables()


def test_without_paging_addresses_are_physical(tables: Tables) -> None:
    assert translate(0x1234, {**LONG, "cr0": 1}, tables.read) == 0x1234


def test_four_levels(tables: Tables) -> None:
    for table, shift in ((0x1000, 39), (0x2000, 30), (0x3000, 21)):
        tables.put(table, HIGH >> shift & 511, table + 0x1000 | 3)
    tables.put(0x4000, HIGH >> 12 & 511, 0xABC000 | 1 << 63 | 3)
    assert translate(HIGH, LONG, tables.read) == 0xABC567
    assert translate(HIGH + 0x1000, LONG, tables.read) is None


def test_five_levels(tables: Tables) -> None:
    for table, shift in ((0x1000, 48), (0x2000, 39), (0x3000, 30), (0x4000, 21)):
        tables.put(table, HIGH >> shift & 511, table + 0x1000 | 3)
    tables.put(0x5000, HIGH >> 12 & 511, 0xABC000 | 3)
    assert translate(HIGH, LA57, tables.read) == 0xABC567


@pytest.mark.parametrize(("shift", "depth"), [(30, 2), (21, 3)])
def test_large_pages(tables: Tables, shift: int, depth: int) -> None:
    for level in range(depth - 1):
        table = 0x1000 * (level + 1)
        tables.put(table, HIGH >> 39 - 9 * level & 511, table + 0x1000 | 3)
    tables.put(0x1000 * depth, HIGH >> shift & 511, 0x4000_0000 | 1 << 7 | 3)
    assert translate(HIGH, LONG, tables.read) == 0x4000_0000 | HIGH & (1 << shift) - 1


def test_pae(tables: Tables) -> None:
    tables.put(0x1020, 3, 0x2001)
    tables.put(0x2000, 1, 0x3003)
    tables.put(0x3000, 2, 0x55_5003)
    assert translate(0xC020_2123, PAE, tables.read) == 0x55_5123


def test_legacy_with_small_and_large_page(tables: Tables) -> None:
    tables.put(0x1000, 0x300, 0x2003, "<I")
    tables.put(0x2000, 5, 0x77_7003, "<I")
    tables.put(0x1000, 0x301, 0x80_0083, "<I")
    assert translate(0xC000_5678, LEGACY, tables.read) == 0x77_7678
    assert translate(0xC041_2345, LEGACY, tables.read) == 0x81_2345


def test_the_loaders_identity_map(tables: Tables) -> None:
    linux64.write(tables.ram, linux64.default_header(), layout.CMDLINE, (0, 0), 0)
    sregs = cpu.boot_sregs(cpu.BootState(cpu.LINUX64, 0, 0), {})
    for address in (0, 0x12_3456, 0xFFFF_FFFF):
        assert translate(address, sregs, tables.read) == address
    assert translate(1 << 32, sregs, tables.read) is None


@pytest.mark.parametrize("cr3", [1 << 40, SIZE, (1 << 64) - 1])
@pytest.mark.parametrize("mode", [LONG, LA57, PAE, LEGACY])
def test_tables_outside_ram_map_nothing(tables: Tables, mode: dict[str, int], cr3: int) -> None:
    assert translate(HIGH & 0xFFFF_FFFF, {**mode, "cr3": cr3}, tables.read) is None


def test_reading_stops_at_the_last_mapped_page(tables: Tables) -> None:
    for table in (0x1000, 0x2000, 0x3000):
        tables.put(table, 0, table + 0x1000 | 3)
    tables.put(0x4000, 0, 0x9003)
    tables.put(0x4000, 1, 0x8003)
    tables.memory[0x9FFC:0xA000] = b"abcd"
    tables.memory[0x8000:0x9000] = b"e" * 4096
    assert read_linear(0xFFC, 6, LONG, tables.read) == b"abcdee"
    assert len(read_linear(0xFFC, 8192, LONG, tables.read)) == 4 + 4096
    assert read_linear(0x5000, 4, LONG, tables.read) == b""
