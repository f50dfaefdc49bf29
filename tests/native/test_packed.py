"""Packed virtqueues from the device's side; and both formats against a model, by random."""

from __future__ import annotations

import gc
import random
import struct

import pytest

vring = pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.packed_driver import AVAIL, EVENTS_AT, EVENTS_OFF, FRESH, PackedQueue  # noqa: E402
from fakes.ring_driver import INDIRECT, NEXT, USER_BASE, WRITE, DriverQueue, Ram  # noqa: E402


@pytest.fixture
def ram():
    ram = Ram(16 << 20)
    yield ram
    gc.collect()
    ram.close()


@pytest.fixture
def make(ram):
    def make(size=8, kind=PackedQueue, **options):
        queue = kind(ram, size, event_idx=options.get("event_idx", False))
        queues.append(queue)
        return queue, ring_of(queue, **options)

    queues: list[DriverQueue] = []
    yield make
    for queue in queues:
        queue.close()


def ring_of(queue, **options):
    memory = vring.GuestMemory([(0, USER_BASE, queue.ram.data)])
    places = (USER_BASE + at for at in (queue.desc, queue.avail, queue.used))
    kind = vring.PackedRing if isinstance(queue, PackedQueue) else vring.VRing
    return kind(memory, queue.size, *places, **options)


def test_reads_and_writes_a_chain(make):
    queue, ring = make()
    number = queue.add([b"hello ", b"world"], [4, 8])
    chain = ring.pop()
    assert (chain.head, chain.readable, chain.writable) == (number, 11, 12)
    assert chain.read() == b"hello world"
    assert chain.write(b"ABCDEF") == 6
    chain.push()
    assert queue.collect() == [(number, b"ABCDEF")]
    assert ring.pop() is None


@pytest.mark.parametrize("size", [1, 3, 5, 8, 250])
def test_wraps_at_any_size(make, size):
    queue, ring = make(size)
    for turn in range(2000):
        slots = 1 + turn % min(size, 3)
        number = queue.add_rows([(64, 4, WRITE)] * slots)
        assert ring.pending() == 1
        chain = ring.pop()
        chain.push(turn % 4)
        assert queue.collect()[0][0] == number
        assert ring.pop() is None


def test_completion_in_any_order(make):
    queue, ring = make(size=8)
    for turn in range(100):
        numbers = [queue.add_rows([(64, 1, 0)] * slots) for slots in (1, 3, 2)]
        chains = [ring.pop() for _ in numbers]
        assert ring.pop() is None
        for i in (2, 0, 1) if turn % 2 else (1, 2, 0):
            chains[i].push()
        assert {number for number, _ in queue.collect()} == set(numbers)


def test_indirect_table(make):
    queue, ring = make(indirect=True)
    queue.add([b"in", b"direct"] * 10, [3] * 10, indirect=True)
    chain = ring.pop()
    assert chain.read() == b"indirect" * 10
    assert chain.writable == 30
    chain.write(b"abc" * 10)
    chain.push()
    assert queue.collect()[0][1] == b"abc" * 10
    assert queue.room == 8


def test_base_goes_on_where_another_ring_ended(make):
    queue, ring = make(size=5)
    assert ring.base == FRESH == vring.PackedRing.FRESH
    seen = set()
    for turn in range(40):
        queue.add_rows([(64, 4, 0)] * (1 + turn % 3))
        chain = ring.pop()
        chain.push()
        assert len(queue.collect()) == 1
        base = ring.base
        seen.add(base)
        place = queue.place | queue.wrap << 15
        assert base == place | place << 16
        ring = ring_of(queue, base=base)
    assert len(seen) == 10  # five places, two rounds


def test_base_beyond_the_ring(make):
    with pytest.raises(ValueError, match="beyond a queue"):
        make(size=5, base=5)
    with pytest.raises(ValueError, match="beyond a queue"):
        make(size=5, base=5 << 16)


def test_rewind_gives_the_chains_again(make):
    queue, ring = make(size=5)
    for _ in range(30):
        numbers = [queue.add_rows([(64, 1, 0)] * slots) for slots in (1, 2, 1)]
        before = [ring.pop(), ring.base][1]
        assert [ring.pop().head for _ in numbers[1:]] == numbers[1:]
        ring.rewind(2)
        assert ring.base == before
        ring.rewind(1)
        for number in numbers:
            chain = ring.pop()
            assert chain.head == number
            chain.push()
        assert len(queue.collect()) == 3


def test_kick_suppression(make, ram):
    queue, ring = make()
    ring.disable_kicks()
    assert ram.u16(queue.used + 2) == EVENTS_OFF
    assert not ring.enable_kicks()
    assert ram.u16(queue.used + 2) == 0
    queue.add([b"x"])
    assert ring.enable_kicks()


def test_kick_event(make, ram):
    queue, ring = make(size=2, event_idx=True)
    for place, wrap in ((1, 1), (0, 0), (1, 0), (0, 1)):
        queue.add_rows([(64, 1, 0)])
        ring.pop().push()
        queue.collect()
        assert not ring.enable_kicks()
        assert ram.u16(queue.used) == place | wrap << 15
        assert ram.u16(queue.used + 2) == EVENTS_AT


def test_call_by_flag(make, ram):
    queue, ring = make()
    assert not ring.should_call()
    for flags, wanted in ((0, True), (EVENTS_OFF, False), (0, True)):
        ram.set_u16(queue.avail + 2, flags)
        queue.add([b"x"])
        ring.pop().push()
        assert ring.should_call() is wanted
        assert not ring.should_call()
        queue.collect()


@pytest.mark.parametrize("size", [4, 5])
def test_call_event(make, size):
    """Each place of both rounds is asked for; the call comes with it and not before or after."""
    queue, ring = make(size, event_idx=True)
    for _ in range(3 * size):
        place, wrap = queue.used_place, queue.used_wrap
        for step in range(2):
            queue.add_rows([(64, 1, 0)])
            ring.pop().push()
            target = place + 1
            queue.want_call_at(target % size, wrap ^ (target >= size))
            assert ring.should_call() is (step == 1)
            queue.event_idx = False  # or it would ask for the next one
            queue.collect()
            queue.event_idx = True


def test_stopped_ring_gives_and_takes_nothing(make):
    queue, ring = make()
    queue.add([b"a"])
    queue.add([b"b"])
    chain = ring.pop()
    ring.stop()
    chain.push()
    assert ring.pop() is None
    assert queue.collect() == []
    assert not ring.should_call()


HOSTILE = {
    "outside": ([(1 << 40, 1, 0)], "outside"),
    "end outside": ([((16 << 20) - 4, 5, 0)], "outside"),
    "wraps": ([((1 << 64) - 4, 0xFFFF_FFFF, 0)], "outside"),
    "readable after writable": ([(0, 1, WRITE), (0, 1, 0)], "readable buffer after"),
    "indirect with next": ([(0, 16, INDIRECT), (0, 1, 0)], "indirect"),
    "indirect after another": ([(0, 1, 0), (0, 16, INDIRECT)], "indirect"),
    "indirect of odd length": ([(0, 17, INDIRECT)], "indirect"),
    "indirect empty": ([(0, 0, INDIRECT)], "indirect"),
    "indirect outside": ([((16 << 20) - 16, 32, INDIRECT)], "outside"),
    "indirect too long": ([(0, 16 << 20, INDIRECT)], "too long"),
}


@pytest.mark.parametrize(("rows", "text"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_ring(make, rows, text):
    queue, ring = make(indirect=True)
    queue.add_rows(rows)
    with pytest.raises(vring.RingError, match=text):
        ring.pop()
    assert not ring.running
    assert ring.pop() is None


def test_indirect_in_indirect(make):
    queue, ring = make(indirect=True)
    table = queue.ram.put(struct.pack("<QIHH", 0, 16, 0, INDIRECT))
    queue.add_rows([(table, 16, INDIRECT)])
    with pytest.raises(vring.RingError, match="indirect"):
        ring.pop()


def test_chain_without_an_end(make):
    queue, ring = make(size=4)
    for i in range(4):
        struct.pack_into("<QIHH", queue.ram.data, queue.desc + 16 * i, 0, 1, 0, NEXT | AVAIL)
    with pytest.raises(vring.RingError, match="loop"):
        ring.pop()


def test_identifier_beyond_the_ring(make):
    queue, ring = make(size=4)
    queue.write_rows(4, [(64, 1, 0)])
    with pytest.raises(vring.RingError, match="beyond"):
        ring.pop()


def test_more_in_flight_than_the_ring_has(make):
    """A driver that marks descriptors available again that the device still has."""
    queue, ring = make(size=2)
    for _ in range(2):
        queue.add_rows([(64, 1, 0)])
    first, second = ring.pop(), ring.pop()
    for i in range(2):
        queue.ram.set_u16(queue.desc + 16 * i + 14, 1 << 15)
    with pytest.raises(vring.RingError, match="moved by more"):
        ring.pop()
    assert first.head != second.head


@pytest.mark.parametrize(
    ("size", "move", "text"),
    [
        (0, (0, 0, 0), "not from 1"),
        ((1 << 15) + 1, (0, 0, 0), "not from 1"),
        (8, (8, 0, 0), "descriptor ring .* aligned"),
        (8, (0, 2, 0), "driver event .* aligned"),
        (8, (0, 0, 2), "device event .* aligned"),
        (8, (1 << 30, 0, 0), "descriptor ring .* outside"),
    ],
)
def test_ring_in_a_wrong_place(ram, size, move, text):
    memory = vring.GuestMemory([(0, USER_BASE, ram.data)])
    places = (USER_BASE + at + shift for at, shift in zip((0, 1 << 20, 2 << 20), move, strict=True))
    with pytest.raises(ValueError, match=text):
        vring.PackedRing(memory, size, *places)


# -- both formats ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DriverQueue, PackedQueue])
@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_random_traffic_keeps_every_byte(make, kind, event_idx, seed):
    """Chains of all shapes, completed in any order; no call is missed when one was due."""
    rng = random.Random(seed)
    queue, ring = make(rng.choice((4, 8, 16)), kind, event_idx=event_idx, indirect=True)
    place = queue.ram.alloc(64 * 64)
    slots, where, hand, done = list(range(64)), {}, [], 0
    for _ in range(4000):
        act = rng.randrange(3)
        pieces = rng.randrange(1, 4)
        indirect = rng.random() < 0.3
        if act == 0 and len(queue.free) >= (1 if indirect else 2 * pieces):
            slot = slots.pop()
            at, data = place + 64 * slot, rng.randbytes(8 * pieces)
            queue.ram.data[at : at + len(data)] = data
            rows = [(at + 8 * i, 8, 0) for i in range(pieces)]
            rows += [(at + 32 + 8 * i, 8, WRITE) for i in range(pieces)]
            if queue.ram._next > 15 << 20:
                queue.ram._next = 8 << 20
            where[queue.add_rows(rows, indirect=indirect)] = slot, data[::-1]
        elif act == 1 and (chain := ring.pop()) is not None:
            chain.write(chain.read()[::-1])
            hand.append(chain)
        elif hand:
            hand.pop(rng.randrange(len(hand))).push()
            called = ring.should_call()
            used = queue.collect()
            assert called or not used  # the driver always wants to know
            for head, data in used:
                slot, wanted = where.pop(head)
                assert data == wanted
                slots.append(slot)
                done += 1
        assert ring.pending() <= len(queue.chains)
    assert done > 500
    assert len(where) == len(queue.chains)


@pytest.mark.parametrize("kind", [DriverQueue, PackedQueue])
def test_random_rings_are_safe(make, kind):
    rng = random.Random(3)
    queue, _ = make(16, kind)
    for _ in range(2000):
        for at, length in ((queue.desc, 256), (queue.avail, 38 if kind is DriverQueue else 4)):
            queue.ram.data[at : at + length] = rng.randbytes(length)
        base = rng.randrange(1 << 16) if kind is DriverQueue else rng.choice((FRESH, 0, 0x8003_8003))
        ring = ring_of(queue, indirect=True, event_idx=True, base=base)
        try:
            while (chain := ring.pop()) is not None:
                chain.write(chain.read(100))
                chain.push()
                ring.should_call()
        except vring.RingError:
            continue


def test_elements_of_many_descriptors_stay_in_the_ring(make, ram):
    """What comes after the ring is somebody else's."""
    queue, ring = make(4)
    before = bytes(ram.data)
    with pytest.raises(ValueError, match="60000 descriptors of a ring of 4"):
        ring.use(0, 0, 60_000)
    for slots in (4, 3, 2, 1) * 5:
        ring.use(0, 0, slots)
        assert ring.next_used < 4
    end = queue.desc + 16 * queue.size
    assert ram.data[end:] == before[end:]
