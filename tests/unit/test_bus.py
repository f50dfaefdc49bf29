"""Address buses: who answers where."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.bus import Bus, BusConflict


class Memory:
    """Remembers accesses; reads give its number."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.seen: list[tuple[int, ...]] = []

    def read(self, offset: int, width: int) -> int:
        self.seen.append((offset, width))
        return self.number

    def write(self, offset: int, width: int, value: int) -> None:
        self.seen.append((offset, width, value))


def test_devices_see_offsets():
    bus, device = Bus("test"), Memory(7)
    bus.insert(0x1000, 0x100, device, "device")
    assert bus.read(0x1010, 4) == 7
    bus.write(0x10FF, 1, 9)
    assert device.seen == [(0x10, 4), (0xFF, 1, 9)]


@pytest.mark.parametrize("address", [0, 0xFFF, 0x10FD, 0x1100, 1 << 63])
def test_nothing_there(address):
    bus, device = Bus("test"), Memory()
    bus.insert(0x1000, 0x100, device, "device")
    assert bus.read(address, 4) == 0xFFFF_FFFF
    assert bus.read(address, 8) == 0xFFFF_FFFF_FFFF_FFFF
    bus.write(address, 4, 1)
    assert device.seen == []


@pytest.mark.parametrize(
    ("base", "size"), [(0xFFF, 2), (0x10FF, 1), (0x1000, 0x100), (0, 0x5000), (0x1050, 0x200)]
)
def test_overlap_is_refused(base, size):
    bus = Bus("test")
    bus.insert(0x1000, 0x100, Memory(), "old")
    bus.insert(0x3000, 0x100, Memory(), "far")
    with pytest.raises(BusConflict, match=r"new .* overlaps"):
        bus.insert(base, size, Memory(), "new")
    assert len(list(bus.ranges())) == 2


def test_neighbours_do_not_overlap():
    bus = Bus("test")
    for base in (0x1000, 0x1200, 0x1100):
        bus.insert(base, 0x100, Memory(base), hex(base))
    assert [bus.read(base, 1) for base in (0x1000, 0x1100, 0x12FF)] == [0x1000, 0x1100, 0x1200]
    assert list(bus.ranges())[1] == (0x1100, 0x100, "0x1100")


@pytest.mark.parametrize(("base", "size"), [(0, 0), (0, -1), (-1, 4)])
def test_empty_ranges_are_refused(base, size):
    with pytest.raises(BusConflict, match="no range"):
        Bus("test").insert(base, size, Memory(), "new")


def test_remove():
    bus = Bus("test")
    bus.insert(0x1000, 0x100, Memory(1), "a")
    bus.remove(0x1000)
    assert bus.read(0x1000, 1) == 0xFF
    with pytest.raises(KeyError):
        bus.remove(0x1000)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=12))
def test_like_a_plain_search(ranges):
    bus = Bus("test")
    kept: list[tuple[int, int]] = []
    for base, size in ranges:
        free = all(base + size <= other or other + length <= base for other, length in kept)
        try:
            bus.insert(base, size, Memory(base + 100), "x")
        except BusConflict:
            assert not free
        else:
            assert free
            kept.append((base, size))
    for address in range(80):
        expected = [base + 100 for base, size in kept if base <= address and address + 2 <= base + size]
        assert bus.read(address, 2) == (expected[0] if expected else 0xFFFF)
