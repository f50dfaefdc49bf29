"""What the rings tell of a lost backend's progress, against a device whose every step is known."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.layout import RamRange
from pyvmm.vhost_user.memory import GuestRam, MemoryTable
from pyvmm.vhost_user.progress import in_order
from pyvmm.virtio.queue import QueueSetup

AVAIL, USED, BYTES = 0x1000, 0x2000, 0x4000
SIZE = 8


@pytest.fixture(scope="module")
def memory() -> Iterator[MemoryTable]:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, BYTES)
    yield MemoryTable(GuestRam(fd, (RamRange(0, BYTES, 0),)))
    os.close(fd)


class Rings:
    """Both rings of a queue, from the first request on, and what their ends know and memory does not."""

    def __init__(self, memory: MemoryTable, size: int = SIZE) -> None:
        self._memory, self.size = memory, size
        self.queue = QueueSetup(0, size, 0, AVAIL, USED, 0, None)
        self.made: list[int] = []
        self.used: list[int] = []
        self.pending: list[tuple[int, int]] = []  # (place in the available ring, head)
        self.free = list(range(size))
        os.pwrite(memory.fd, bytes(BYTES), 0)

    def make(self, head: int | None = None) -> None:
        """The driver makes a request available, with the head that it got back last if there is no other."""
        head = self.free[-1] if head is None else head
        self.free.remove(head)
        self.begin(head)
        self.pending.append((len(self.made), head))
        self.made.append(head)
        self._write(AVAIL + 2, struct.pack("<H", len(self.made) & 0xFFFF))

    def begin(self, head: int) -> None:
        """The driver has written the entry, and not the index yet."""
        self._write(AVAIL + 4 + len(self.made) % self.size * 2, struct.pack("<H", head))

    def use(self, which: int = 0, length: int = 1) -> None:
        """The device answers the request that is `which` of those under way."""
        _, head = self.pending.pop(which)
        self._write(USED + 4 + len(self.used) % self.size * 8, struct.pack("<II", head, length))
        self.used.append(head)
        self.free.append(head)
        self._write(USED + 2, struct.pack("<H", len(self.used) & 0xFFFF))

    def _write(self, address: int, data: bytes) -> None:
        os.pwrite(self._memory.fd, data, address)

    @property
    def known(self) -> bool:
        return in_order(self._memory, self.queue)

    @property
    def true(self) -> bool:
        """Whether what is left is what the used index says."""
        return sorted(head for _, head in self.pending) == sorted(self.made[len(self.used) :])

    @property
    def old(self) -> bool:
        """Whether something is left that was made available so long ago that no ring shows it."""
        return bool(self.pending) and min(self.pending)[0] < len(self.made) - self.size

    def stream(self, count: int, skip: int = 0) -> None:
        """So many requests, one after the other, that overtake the first `skip`."""
        for _ in range(count):
            self.make()
            self.use(skip)


# -- what is known -----------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("left", range(SIZE + 1))
def test_nothing_was_used_yet(memory: MemoryTable, left: int, length: int) -> None:
    rings = Rings(memory)
    for head in range(left):
        rings.make(head)
    assert rings.known


@pytest.mark.parametrize("left", range(SIZE + 1))
@pytest.mark.parametrize("before", [1, 5, SIZE, 3 * SIZE + 1, (1 << 16) + 3])
def test_buffers_that_go_round_in_order(memory: MemoryTable, before: int, left: int) -> None:
    """A receive queue: however many are left, each was given back a whole ring ago."""
    rings = Rings(memory)
    for head in range(before):
        rings.make(head % SIZE)
        rings.use()
    for head in range(before, before + left):
        rings.make(head % SIZE)
    assert rings.known


@pytest.mark.parametrize("depth", range(1, SIZE - 1))
def test_a_few_at_a_time_in_order(memory: MemoryTable, depth: int) -> None:
    rings = Rings(memory)
    for _ in range(4 * SIZE):
        while len(rings.pending) < depth:
            rings.make()
        assert rings.known
        rings.use()


def test_a_queue_of_two(memory: MemoryTable) -> None:
    rings = Rings(memory, 2)
    rings.stream(5)
    rings.make()
    assert rings.known


def test_overtaken_and_caught_up(memory: MemoryTable) -> None:
    rings = Rings(memory)
    for head in range(4):
        rings.make(head)
    rings.use(1)
    assert not rings.known
    rings.use(0)
    assert rings.known


def test_all_that_there_is_is_left(memory: MemoryTable) -> None:
    """In whatever order they came: there are no other heads."""
    rings = Rings(memory)
    for head in range(SIZE):
        rings.make(head)
    rings.use(3)
    rings.use(0)
    rings.make()
    rings.make()
    assert len(rings.pending) == SIZE and not rings.known, "a head cannot wait twice"


# -- what contradicts ----------------------------------------------------------------


@pytest.mark.parametrize("overtakers", range(1, SIZE - 1))
def test_a_full_ring_in_which_some_overtook(memory: MemoryTable, overtakers: int) -> None:
    rings = Rings(memory)
    for head in range(SIZE):
        rings.make(head)
    for _ in range(overtakers):
        rings.use(1)
        assert not rings.known
        rings.make()
        assert not rings.known, "a head cannot wait twice"


def test_an_entry_that_the_driver_is_writing_is_no_evidence(memory: MemoryTable) -> None:
    rings = Rings(memory)
    for head in range(SIZE):
        rings.make(head)
    rings.use(3)
    rings.begin(3)
    assert not rings.known


def test_more_left_than_fits(memory: MemoryTable) -> None:
    rings = Rings(memory)
    rings.made = [0] * (SIZE + 1)
    rings.free.append(8)
    rings.make(8)
    assert not rings.known


@pytest.mark.parametrize("slow", range(2, 5))
def test_slow_ones_beside_a_stream(memory: MemoryTable, slow: int) -> None:
    rings = Rings(memory)
    for _ in range(slow):
        rings.make()
    rings.stream(5 * SIZE, slow)
    assert not rings.known


def test_a_slow_one_beside_two_that_take_turns(memory: MemoryTable) -> None:
    rings = Rings(memory)
    rings.make(0)
    for count in range(4 * SIZE):
        rings.make(1 + count % 2)
        rings.use(1)
        assert not rings.known


def test_what_is_undecidable(memory: MemoryTable) -> None:
    """One request that is older than the rings reach, beside one head that is used over and over."""
    rings = Rings(memory)
    rings.make(0)
    rings.stream(SIZE - 2, 1)
    assert not rings.known, "the rings show it still"
    rings.stream(4 * SIZE, 1)
    assert rings.old and rings.known
    shown = os.pread(memory.fd, BYTES, 0)

    other = Rings(memory)  # the same with nothing that was overtaken
    other.stream(5 * SIZE - 2)
    other.make()
    assert other.true and os.pread(memory.fd, BYTES, 0) == shown


# -- whatever happens ------------------------------------------------------------------


@given(seed=st.integers(0, 1 << 32), disorder=st.floats(0, 1), depth=st.integers(1, SIZE), size=st.just(SIZE))
@settings(max_examples=300, deadline=None)
def test_it_goes_on_wrongly_only_where_no_ring_shows_it(
    memory: MemoryTable, seed: int, disorder: float, depth: int, size: int
) -> None:
    random, rings = Random(seed), Rings(memory, size)
    for _ in range(60):
        if rings.free and len(rings.pending) < depth and random.random() < 0.6:
            rings.make(random.choice(rings.free) if random.random() < 0.2 else None)
        elif rings.pending:
            rings.use(random.randrange(len(rings.pending)) if random.random() < disorder else 0)
        assert rings.true or rings.old or not rings.known
