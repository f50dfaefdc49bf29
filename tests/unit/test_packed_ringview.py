"""Packed rings of a live machine, written by hand: positions, chains, and what contradicts itself."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

pytest.importorskip("numpy")

from pyvmm.layout import RamRange
from pyvmm.ringview import INDIRECT, NEXT, STUCK, WRITE, GuestView, PackedRing, Sample, state
from pyvmm.virtio.spec import F_EVENT_IDX, F_IN_ORDER

SIZE = 4
DRIVER, DEVICE = 0x8_0000, 0x8_1000
AVAIL, USED = 1 << 7, 1 << 15
# A descriptor that is available or used, in a lap of wrap counter 1 or 0
A1, U1, A0, U0 = AVAIL, AVAIL | USED, USED, 0


class Memory:
    """Packed rings at address 0."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ram")
        os.ftruncate(self.fd, 0x9_0000)
        self.view = GuestView(self.fd, [RamRange(0, 0x9_0000, 0)])

    def ring(self, *rows: tuple[int, int], features: int = 0) -> PackedRing:
        """A ring of as many descriptors, with these flags and IDs."""
        for place, (flags, number) in enumerate(rows):
            self.put(place, flags, number)
        return PackedRing(self.view, max(len(rows), 1), 0, DRIVER, DEVICE, features)

    def put(self, place: int, flags: int, number: int) -> None:
        os.pwrite(self.fd, struct.pack("<QIHH", 0x1000 + place, 0x10 + place, number, flags), 16 * place)

    def ask(self, place: int, wrap: int, flags: int = 2) -> None:
        os.pwrite(self.fd, struct.pack("<HH", place | wrap << 15, flags), DRIVER)


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    os.close(memory.fd)


@pytest.mark.parametrize(
    ("rows", "avail"),
    [
        ([(A1, 0), (U0, 1), (U0, 2)], 1),
        ([(U1, 0), (A1, 1), (U0, 2)], 2),
        ([(U1, 0), (U1, 1), (U1, 2)], 3),
        ([(A0, 0), (U1, 1), (U1, 2)], 4),
        ([(U0, 0), (A0, 1), (U1, 2)], 5),
        ([(U0, 0), (U0, 1), (A0, 2)], 0),
        ([(A1, 0)], 1),
        ([(U0, 0)], 0),
    ],
)
def test_the_driver_s_position_is_where_the_laps_meet(
    memory: Memory, rows: list[tuple[int, int]], avail: int
) -> None:
    assert memory.ring(*rows).sample().avail == avail


@pytest.mark.parametrize("size", [1, 2, 3, 256, 32768])
def test_a_new_ring(memory: Memory, size: int) -> None:
    ring = PackedRing(memory.view, size, 0, DRIVER, DEVICE)
    assert ring.sample() == Sample(0, 0, 2 * size - 1, False)
    memory.put(0, A1, 0)
    assert ring.sample() == Sample(1, 0, 2 * size - 1, True, (0,))
    memory.put(0, U1, 0)
    assert ring.sample() == Sample(1, 1, 0, False)


def test_arrays_follow_the_memory(memory: Memory) -> None:
    ring = memory.ring(*[(U0, 0)] * SIZE)
    memory.put(1, A1 | WRITE, 7)
    memory.ask(3, 1)
    os.pwrite(memory.fd, struct.pack("<HH", 2, 1), DEVICE)
    assert ring.descriptors[1].tolist() == (0x1001, 0x11, 7, A1 | WRITE)
    assert (ring.driver.tolist(), ring.device.tolist()) == ([(3 | 1 << 15, 2)], [(2, 1)])
    with pytest.raises(ValueError, match="read-only"):
        ring.descriptors[0] = (1, 2, 3, 4)


def test_a_chain_goes_on_at_the_ring_s_beginning(memory: Memory) -> None:
    ring = memory.ring((A0 | WRITE, 5), (U1, 1), (A1 | INDIRECT, 2), (A1 | NEXT, 5))
    assert list(ring.chain(3)) == [(0x1003, 0x13, NEXT), (0x1000, 0x10, WRITE)]
    assert list(ring.chain(2)) == [(0x1002, 0x12, INDIRECT)]
    assert list(ring.chain(SIZE)) == []
    assert ring.sample() == Sample(5, 2, 1, True, (2, 3))


def test_a_loop_in_the_descriptors_ends(memory: Memory) -> None:
    ring = memory.ring(*[(A1 | NEXT, 0)] * SIZE)
    assert len(list(ring.chain(1))) == SIZE
    assert ring.sample().broken


@pytest.mark.parametrize(
    "rows",
    [
        [(A1, 0), (U0, 1), (A1, 2), (U0, 3)],
        [(A0, 0), (A1, 1), (A0, 2), (A1, 3)],
        [(U1, 0), (A1 | NEXT, 1), (U0, 2), (U0, 3)],  # a chain without an end
        [(A1 | NEXT, 0), (A1 | NEXT, 0), (A1 | NEXT, 0), (A1 | NEXT, 0)],
    ],
)
def test_a_contradiction_is_broken(memory: Memory, rows: list[tuple[int, int]]) -> None:
    found = memory.ring(*rows).sample()
    assert (found.broken, found.holds, found.heads) == (True, None, ())


def test_a_chain_that_is_being_written(memory: Memory) -> None:
    """The first descriptor's flags come last (2.8.6)."""
    ring = memory.ring((U1, 0), (U0, 1), (A1 | NEXT, 2), (A1, 2))
    before = ring.sample()
    assert before.broken
    memory.put(1, A1 | NEXT, 2)
    assert ring.sample() == Sample(4, 1, 0, True, (1,))
    assert state([before, ring.sample(), before]) == STUCK


SAME = [(U1, 0), (U1, 1), (A1, 1), (U0, 3)]  # two slots of ID 1 given back, or one slot and it used again


@pytest.mark.parametrize(
    ("ask", "features", "holds"),
    [
        ((2, 1), F_EVENT_IDX, True),
        ((3, 1), F_EVENT_IDX, False),
        ((1, 1), F_EVENT_IDX, None),  # the driver has not looked
        ((0, 0), F_EVENT_IDX, None),
        ((2, 0), F_EVENT_IDX, None),
        ((3, 0), F_EVENT_IDX, None),
        ((7, 0), F_EVENT_IDX, None),  # there is no such descriptor
        ((2, 1, 0), F_EVENT_IDX, None),
        ((3, 1, 1), F_EVENT_IDX, None),
        ((3, 1), 0, None),
    ],
)
def test_what_the_driver_waits_for_tells_one_from_the_other(
    memory: Memory, ask: tuple[int, ...], features: int, holds: bool | None
) -> None:
    memory.ask(*ask)
    found = memory.ring(*SAME, features=features).sample()
    assert found.holds is holds
    assert (found.heads, found.unsure) == {True: ((2,), 0), False: ((), 0), None: ((2,), 1)}[holds]


@pytest.mark.parametrize(
    ("rows", "ask", "heads"),
    [
        ([(U1, 1), (A1, 1), (A1, 2), (U0, 3)], (1, 1), (1, 2)),
        ([(U1, 1), (A1 | NEXT, 1), (A1, 1), (U0, 3)], (2, 1), (1,)),  # most of it, as a busy Linux asks
    ],
)
def test_what_the_driver_waits_for_is_no_rest(
    memory: Memory, rows: list[tuple[int, int]], ask: tuple[int, int], heads: tuple[int, ...]
) -> None:
    memory.ask(*ask)
    found = memory.ring(*rows, features=F_EVENT_IDX).sample()
    assert (found.holds, found.heads, found.unsure) == (True, heads, 0)


@pytest.mark.parametrize(
    ("rows", "heads", "unsure"),
    [
        ([(U1, 0), (A1, 1), (U0, 2), (U0, 3)], (1,), 0),  # another ID
        ([(U1, 1), (U1, 0), (U1, 0), (A1, 1)], (3,), 0),  # an ID that was used since, and twice
        ([(U1, 1), (A1 | INDIRECT, 1), (U0, 2), (U0, 3)], (1,), 0),  # an indirect one has one slot
        ([(U1, 1), (A1, 1), (A1, 2), (U0, 3)], (1, 2), 1),
        ([(A0, 1), (A1, 2), (A1, 3), (A1, 0)], (1, 2, 3, 0), 1),  # the rest of what is overwritten
        ([(A1, 0), (A1, 1), (A1, 2), (A1, 3)], (0, 1, 2, 3), 1),
    ],
)
def test_heads_of_a_device_that_gives_back_in_order(
    memory: Memory, rows: list[tuple[int, int]], heads: tuple[int, ...], unsure: int
) -> None:
    found = memory.ring(*rows).sample()
    assert (found.holds, found.heads, found.unsure) == (True, heads, unsure)


@pytest.mark.parametrize(
    ("rows", "heads", "unsure"),
    [
        ([(U1, 2), (A1, 1), (A1 | INDIRECT, 2), (A1, 3)], (1, 2, 3), 2),
        ([(U1, 2), (A1, 1), (A1, 2), (A1, 1)], (3,), 0),  # no two are in flight with the same ID
        ([(A0, 1), (A1, 2), (A1, 3), (A1, 0)], (1, 2, 3, 0), 3),
        ([(A0, 1), (A1, 2), (A1, 1), (A1, 0)], (3, 0), 1),
    ],
)
def test_heads_with_in_order(
    memory: Memory, rows: list[tuple[int, int]], heads: tuple[int, ...], unsure: int
) -> None:
    """One used descriptor may stand for several chains, and has the ID of the last (2.8.8)."""
    found = memory.ring(*rows, features=F_IN_ORDER).sample()
    assert (found.holds, found.heads, found.unsure) == (True, heads, unsure)


def test_a_device_out_of_order_may_have_given_back_the_newest(memory: Memory) -> None:
    """ID 1 in one slot after ID 0 in two, and given back first: the same as ID 1 used again."""
    rows = [(U1, 1), (U1, 0), (A1, 1), (U0, 3)]
    found = memory.ring(*rows).sample()
    assert (found.holds, found.heads, found.unsure) == (None, (2,), 0)
    memory.ask(3, 1)
    assert memory.ring(*rows, features=F_EVENT_IDX).sample() == Sample(3, 3, 1, False)


@pytest.mark.parametrize("places", [(0x8_FFF8, DRIVER, DEVICE), (0, 0x8_FFFE, DEVICE), (0, DRIVER, 1 << 40)])
def test_rings_outside_of_ram(memory: Memory, places: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="not in RAM"):
        PackedRing(memory.view, SIZE, *places)
