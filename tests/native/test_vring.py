"""The device's side of virtqueues against a driver in plain Python, honest and hostile."""

from __future__ import annotations

import gc
import struct

import pytest

vring = pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.ring_driver import INDIRECT, NEXT, USER_BASE, WRITE, DriverQueue, Ram  # noqa: E402


@pytest.fixture
def ram():
    ram = Ram()
    yield ram
    gc.collect()
    ram.close()


def memory_of(ram, parts=1):
    step = ram.size // parts
    view = memoryview(ram.data)
    return vring.GuestMemory(
        (i * step, USER_BASE + i * step, view[i * step : (i + 1) * step]) for i in reversed(range(parts))
    )


@pytest.fixture
def make(ram):
    def make(size=8, parts=1, **options):
        queue = DriverQueue(ram, size, event_idx=options.get("event_idx", False))
        places = (USER_BASE + at for at in (queue.desc, queue.avail, queue.used))
        ring = vring.VRing(memory_of(ram, parts), size, *places, **options)
        queues.append(queue)
        return queue, ring

    queues: list[DriverQueue] = []
    yield make
    for queue in queues:
        queue.close()


def test_reads_and_writes_a_chain(make):
    queue, ring = make()
    head = queue.add([b"hello ", b"world"], [4, 8])
    chain = ring.pop()
    assert (chain.head, chain.readable, chain.writable) == (head, 11, 12)
    assert chain.read(3) == b"hel"
    assert chain.read() == b"lo world"
    assert chain.read() == b""
    assert chain.write(b"ABCDEF") == 6
    assert chain.write(b"0123456789") == 6
    assert chain.writable == 0
    chain.push()
    assert queue.collect() == [(head, b"ABCDEF012345")]
    assert ring.pop() is None


def test_views_are_the_guest_memory(make):
    queue, ring = make()
    queue.add([b"abc", b"defg"], [4, 4])
    chain = ring.pop()
    chain.skip(1)
    assert [bytes(view) for view in chain.readable_views()] == [b"bc", b"defg"]
    assert all(view.readonly for view in chain.readable_views())
    chain.wrote(2)
    first, second = chain.writable_views()
    first[:], second[:] = b"xy", b"zzzz"
    chain.wrote(6)
    chain.push()
    assert queue.collect()[0][1] == b"\0\0xyzzzz"


def test_views_keep_the_memory_mapped(ram):
    queue = DriverQueue(ram)
    queue.add([b"still here"])
    ring = vring.VRing(memory_of(ram), 16, *(USER_BASE + at for at in (queue.desc, queue.avail, queue.used)))
    view = ring.pop().readable_views()[0]
    del ring
    gc.collect()
    with pytest.raises(BufferError):
        ram.data.close()
    assert bytes(view) == b"still here"
    view.release()
    queue.close()


def test_more_is_counted_than_the_chain_has(make):
    queue, ring = make()
    queue.add([b"abc"], [2])
    chain = ring.pop()
    with pytest.raises(ValueError, match="left to read"):
        chain.skip(4)
    with pytest.raises(ValueError, match="left to write"):
        chain.wrote(3)
    chain.push()
    with pytest.raises(ValueError, match="already"):
        chain.push()


def test_indices_wrap(make):
    queue, ring = make(size=4)
    for turn in range(70_000):
        head = queue.add_rows([(64, 255, WRITE)])
        chain = ring.pop()
        chain.push(turn & 0xFF)
        assert [used[0] for used in queue.collect()] == [head]
    assert ring.next_avail == ring.next_used == 70_000 & 0xFFFF


def test_completion_in_any_order(make):
    queue, ring = make()
    heads = [queue.add([], [1]) for _ in range(3)]
    chains = [ring.pop() for _ in heads]
    for chain in reversed(chains):
        chain.write(b"x")
        chain.push()
    assert [head for head, _ in queue.collect()] == heads[::-1]


def test_indirect_table(make):
    queue, ring = make(indirect=True)
    queue.add([b"in", b"direct"] * 10, [3] * 10, indirect=True)
    chain = ring.pop()
    assert chain.read() == b"indirect" * 10
    assert chain.writable == 30


def test_buffer_across_adjacent_regions(make, ram):
    queue, ring = make(parts=2)
    middle = ram.size // 2
    ram.data[middle - 3 : middle + 3] = b"abcdef"
    queue.add_rows([(middle - 3, 6, 0)])
    chain = ring.pop()
    assert [bytes(view) for view in chain.readable_views()] == [b"abc", b"def"]
    assert chain.read() == b"abcdef"


def test_rewind_gives_the_chains_again(make):
    queue, ring = make()
    heads = [queue.add([bytes([i])]) for i in range(3)]
    assert [ring.pop().head for _ in heads] == heads
    ring.rewind(2)
    assert [ring.pop().head for _ in heads[1:]] == heads[1:]


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


@pytest.mark.parametrize("event_idx", [False, True])
def test_call_only_when_wanted(make, event_idx):
    queue, ring = make(event_idx=event_idx)
    assert not ring.should_call()
    for _ in range(2):
        queue.add([b"x"])
    ring.pop().push()
    assert ring.should_call()
    assert not ring.should_call()  # nothing new since
    if event_idx:
        queue.ram.set_u16(queue.avail + 4 + 2 * queue.size, 5)
    else:
        queue.ram.set_u16(queue.avail, 1)
    ring.pop().push()
    assert not ring.should_call()


def test_kick_suppression_by_flag(make, ram):
    queue, ring = make()
    ring.disable_kicks()
    assert ram.u16(queue.used) == 1
    assert not ring.enable_kicks()
    assert ram.u16(queue.used) == 0
    queue.add([b"x"])
    assert ring.enable_kicks()


def test_kick_event_index(make, ram):
    queue, ring = make(event_idx=True)
    queue.add([b"x"])
    ring.pop()
    assert not ring.enable_kicks()
    assert ram.u16(queue.used + 4 + 8 * queue.size) == 1


def break_with(text):
    def decorate(change):
        change.text = text
        return change

    return decorate


@break_with("beyond its table")
def head_too_large(queue):
    queue.offer(queue.size)


@break_with("beyond its table")
def next_too_large(queue):
    queue.descriptor(0, 0, 4, NEXT, queue.size)
    queue.offer(0)


@break_with("outside")
def address_outside(queue):
    queue.descriptor(0, queue.ram.size, 1)
    queue.offer(0)


@break_with("outside")
def end_outside(queue):
    queue.descriptor(0, queue.ram.size - 4, 5)
    queue.offer(0)


@break_with("outside")
def address_wraps(queue):
    queue.descriptor(0, (1 << 64) - 4, 0xFFFF_FFFF)
    queue.offer(0)


@break_with("loop")
def chain_loops(queue):
    queue.descriptor(0, 0, 1, NEXT, 1)
    queue.descriptor(1, 0, 1, NEXT, 0)
    queue.offer(0)


@break_with("readable buffer after")
def readable_after_writable(queue):
    queue.descriptor(0, 0, 1, NEXT | WRITE, 1)
    queue.descriptor(1, 0, 1)
    queue.offer(0)


@break_with("available index")
def available_jumps(queue):
    queue.ram.set_u16(queue.avail + 2, queue.size + 1)


@break_with("indirect")
def indirect_with_next(queue):
    queue.descriptor(0, 0, 16, INDIRECT | NEXT, 1)
    queue.offer(0)


@break_with("indirect")
def indirect_of_odd_length(queue):
    queue.descriptor(0, 0, 17, INDIRECT)
    queue.offer(0)


@break_with("indirect")
def indirect_empty(queue):
    queue.descriptor(0, 0, 0, INDIRECT)
    queue.offer(0)


@break_with("outside")
def indirect_outside(queue):
    queue.descriptor(0, queue.ram.size - 16, 32, INDIRECT)
    queue.offer(0)


@break_with("indirect")
def indirect_in_indirect(queue):
    table = queue.ram.put(struct.pack("<QIHH", 0, 16, INDIRECT, 0))
    queue.descriptor(0, table, 16, INDIRECT)
    queue.offer(0)


@break_with("indirect")
def indirect_table_is_the_ring_itself(queue):
    queue.descriptor(0, queue.desc, 16 * queue.size, INDIRECT)
    queue.offer(0)


@break_with("loop")
def indirect_loops(queue):
    table = queue.ram.put(struct.pack("<QIHH", 0, 1, NEXT, 0))
    queue.descriptor(0, table, 16, INDIRECT)
    queue.offer(0)


HOSTILE = [value for value in list(globals().values()) if hasattr(value, "text")]


@pytest.mark.parametrize("change", HOSTILE, ids=lambda change: change.__name__)
def test_hostile_ring(make, change):
    queue, ring = make(indirect=True)
    change(queue)
    with pytest.raises(vring.RingError, match=change.text):
        ring.pop()
    assert not ring.running
    assert ring.pop() is None


def test_indirect_that_was_not_negotiated(make):
    queue, ring = make()
    queue.add([b"x"], indirect=True)
    with pytest.raises(vring.RingError, match="indirect"):
        ring.pop()


@pytest.mark.parametrize(
    ("size", "move", "text"),
    [
        (0, (0, 0, 0), "power of two"),
        (3, (0, 0, 0), "power of two"),
        (1 << 16, (0, 0, 0), "power of two"),
        (8, (8, 0, 0), "descriptor table .* aligned"),
        (8, (0, 1, 0), "available ring .* aligned"),
        (8, (0, 0, 2), "used ring .* aligned"),
        (8, (1 << 30, 0, 0), "descriptor table .* outside"),
        (8, (0, 1 << 30, 0), "available ring .* outside"),
        (8, (0, 0, -(1 << 30)), "used ring .* outside"),
    ],
)
def test_ring_in_a_wrong_place(ram, size, move, text):
    places = (USER_BASE + at + shift for at, shift in zip((0, 1024, 2048), move, strict=True))
    with pytest.raises(ValueError, match=text):
        vring.VRing(memory_of(ram), size, *places)


def test_ring_across_regions_is_refused(ram):
    middle = USER_BASE + ram.size // 2
    with pytest.raises(ValueError, match="outside"):
        vring.VRing(memory_of(ram, 2), 8, middle - 64, USER_BASE, USER_BASE + 1024)


def test_memory_regions():
    with pytest.raises(ValueError, match="overlaps"):
        vring.GuestMemory([(0, 0, bytearray(32)), (16, 99, bytearray(32))])
    with pytest.raises(ValueError, match="end of the address space"):
        vring.GuestMemory([((1 << 64) - 16, 0, bytearray(32))])
    with pytest.raises((BufferError, TypeError)):
        vring.GuestMemory([(0, 0, b"read-only")])
    memory = vring.GuestMemory([(0x1000, 0, bytearray(b"0123"))])
    assert bytes(memory.view(0x1001, 3)) == b"123"
    for address, length in ((0xFFF, 1), (0x1001, 4), (0x1004, 1)):
        with pytest.raises(ValueError, match="not mapped"):
            memory.view(address, length)


def test_move_goes_on_at_the_same_indices(make, ram):
    queue, ring = make()
    queue.add([b"one"])
    queue.add([b"two"])
    assert ring.pop().read() == b"one"
    fresh = memory_of(ram, 2)
    ring.move(fresh, *(USER_BASE + at for at in (queue.desc, queue.avail, queue.used)))
    assert ring.pop().read() == b"two"
    with pytest.raises(ValueError, match="outside"):
        ring.move(vring.GuestMemory(), *(USER_BASE + at for at in (queue.desc, queue.avail, queue.used)))
