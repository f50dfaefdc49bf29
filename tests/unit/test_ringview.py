"""Rings of a live machine, read from a memory file in which the test is driver and device."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("numpy")

from pyvmm import ringview as rings
from pyvmm.layout import RamRange
from pyvmm.ringview import Sample

SIZE = 16
DESC, AVAIL, USED = 0x1000, 0x2000, 0x3000


class Ram:
    """A RAM file of two pieces, the second above a hole, and a ring in it, played by the test."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ram")
        os.ftruncate(self.fd, 0x10000)
        self.ranges = (RamRange(0, 0x8000, 0), RamRange(1 << 32, 0x8000, 0x8000))
        self.given = self.back = 0

    def view(self) -> Any:
        return rings.GuestView(self.fd, self.ranges)

    def ring(self) -> Any:
        return rings.SplitRing(self.view(), SIZE, DESC, AVAIL, USED)

    def put(self, address: int, layout: str, *values: int) -> None:
        os.pwrite(self.fd, struct.pack(layout, *values), address)

    def give(self, head: int) -> None:
        self.put(AVAIL + 4 + 2 * (self.given % SIZE), "<H", head)
        self.given += 1
        self.put(AVAIL + 2, "<H", self.given & 0xFFFF)

    def take_back(self, head: int) -> None:
        self.put(USED + 4 + 8 * (self.back % SIZE), "<II", head, 5)
        self.back += 1
        self.put(USED + 2, "<H", self.back & 0xFFFF)


@pytest.fixture
def ram() -> Iterator[Ram]:
    ram = Ram()
    yield ram
    os.close(ram.fd)


def test_arrays_follow_the_memory(ram: Ram) -> None:
    ring = ram.ring()
    assert ring.sample() == Sample(0, 0, 0, False)
    ram.put(DESC + 16 * 3, "<QIHH", 0x5000, 100, rings.NEXT, 4)
    ram.put(DESC + 16 * 4, "<QIHH", 0x6000, 8, rings.WRITE, 0)
    ram.give(3)
    assert ring.descriptors[3].tolist() == (0x5000, 100, 1, 4)
    assert list(ring.chain(3)) == [(0x5000, 100, rings.NEXT), (0x6000, 8, rings.WRITE)]
    assert ring.avail[0] == 3
    assert ring.sample() == Sample(1, 0, 0, True, (3,))
    ram.take_back(3)
    assert ring.sample() == Sample(1, 1, 1, False)
    assert ring.used[0].tolist() == (3, 5)


def test_the_arrays_cannot_be_written(ram: Ram) -> None:
    with pytest.raises(ValueError, match="read-only"):
        ram.ring().descriptors[0] = (1, 2, 3, 4)


@pytest.mark.parametrize("turns", [5, 100, 70_000])
def test_in_flight_after_many_turns(ram: Ram, turns: int) -> None:
    """Any number of turns of the ring and of its 16-bit indices."""
    chance = random.Random(turns)
    ring, out = ram.ring(), []
    for turn in range(turns):
        free = [head for head in range(SIZE) if head not in out]
        if free and (not out or chance.random() < 0.55):
            out.append(chance.choice(free))
            ram.give(out[-1])
        else:
            ram.take_back(out.pop(0))
        if turns - turn < 1000:
            assert ring.sample().heads == tuple(out)


def test_a_loop_in_the_descriptors_ends(ram: Ram) -> None:
    ram.put(DESC, "<QIHH", 0, 1, rings.NEXT, 0)
    assert len(list(ram.ring().chain(0))) == SIZE
    ram.put(DESC, "<QIHH", 0, 1, rings.NEXT, SIZE)
    assert len(list(ram.ring().chain(0))) == 1
    assert list(ram.ring().chain(0xFFFF)) == []


def test_used_ahead_of_avail_is_broken(ram: Ram) -> None:
    ram.take_back(0)
    found = ram.ring().sample()
    assert found == Sample(0, 1, 1, None, broken=True)
    assert rings.state([found]) == rings.BROKEN


BROKEN = Sample(0, 0, 0, None, broken=True)


def look(last: int, holds: bool | None) -> Sample:
    return Sample(9, last, last, holds)


@pytest.mark.parametrize(
    ("looks", "state"),
    [
        ([look(5, False), look(5, False)], rings.IDLE),
        ([look(4, True), look(9, False)], rings.IDLE),
        ([look(4, None), look(4, False)], rings.IDLE),
        ([look(4, True), look(5, True)], rings.BUSY),
        ([look(5, False), look(5, True)], rings.BUSY),
        ([look(4, None), look(5, None)], rings.BUSY),
        ([look(5, False), look(5, None)], rings.BUSY),
        ([look(4, True), look(5, True), look(4, True)], rings.BUSY),
        ([look(4, True), look(4, True)], rings.STUCK),
        ([look(4, True), BROKEN, look(4, True)], rings.STUCK),
        ([look(4, None), look(4, None)], rings.UNCLEAR),
        ([look(4, None), look(4, True)], rings.UNCLEAR),
        ([look(4, True), BROKEN], rings.STUCK),
        ([BROKEN, BROKEN], rings.BROKEN),
    ],
)
def test_states(looks: list[Sample], state: str) -> None:
    assert rings.state(looks) == state


@pytest.mark.parametrize("period", range(2, 65))
def test_a_steady_device_is_not_found_at_one_place_each_time(period: int) -> None:
    """It goes round `period` positions all the time, so often a second that they come out even."""
    found, moment = {0}, 0.0
    for pause in rings.pauses(1.0):
        moment += pause
        found.add(round(moment * period * 120) % period)
    assert moment == pytest.approx(1.0)
    assert len(found) > 1


@pytest.mark.parametrize("address", [0x7FF0, 0x8000, (1 << 32) - 8, (1 << 32) + 0x8000, 1 << 63])
def test_rings_outside_of_ram(ram: Ram, address: int) -> None:
    with pytest.raises(ValueError, match="not in RAM"):
        rings.SplitRing(ram.view(), SIZE, address, AVAIL, USED)


def test_the_second_piece_of_ram(ram: Ram) -> None:
    ram.put(0x8000, "<QIHH", 7, 8, 0, 0)
    ring = rings.SplitRing(ram.view(), SIZE, 1 << 32, AVAIL, USED)
    assert ring.descriptors[0].tolist() == (7, 8, 0, 0)


def test_a_short_file_is_refused(ram: Ram) -> None:
    with pytest.raises(ValueError, match="has 65536 bytes, its ranges need 131072"):
        rings.GuestView(ram.fd, [RamRange(0, 0x20000, 0)])


def test_live_queues(ram: Ram) -> None:
    queue = {"index": 1, "size": SIZE, "desc": DESC, "avail": AVAIL, "used": USED}
    machine = {
        "ram": [[0, 0x8000, 0]],
        "devices": [
            {"name": "a disk", "features": 1 << 32, "queues": [queue]},
            {"name": "a network", "features": 1 << 32 | 1 << 34, "queues": [{**queue, "desc": 0x4000}]},
        ],
    }
    ram.give(2)
    ram.put(0x4000, "<QIHH", 0x5000, 1, 0, 1 << 7)
    split, packed = rings.live_queues(machine, ram.fd)
    assert (split.device, split.index, split.ring.format, split.ring.sample().heads) == (
        "a disk",
        1,
        "split",
        (2,),
    )
    assert (packed.device, packed.ring.format, packed.ring.sample().heads) == ("a network", "packed", (0,))
