"""What no device should do with rings and chains: an exception, and nothing has changed."""

from __future__ import annotations

import gc
import mmap
import os
import struct

import pytest

vring = pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.ring_driver import NEXT, USER_BASE, WRITE, DriverQueue, Ram  # noqa: E402


@pytest.fixture
def pair():
    """A driver's queue of 8 and the ring on it."""
    ram = Ram()
    queue = DriverQueue(ram, 8)
    memory = vring.GuestMemory([(0, USER_BASE, ram.data)])
    yield queue, vring.VRing(memory, 8, *(USER_BASE + at for at in (queue.desc, queue.avail, queue.used)))
    queue.close()
    os.close(ram.fd)  # the mapping goes with the ring, which the test still has


@pytest.mark.parametrize("length", [-1, 5, 1 << 32 | 3, 1 << 70])
def test_a_used_length_that_cannot_be_leaves_the_chain_in_hand(pair, length):
    queue, ring = pair
    head = queue.add([b"abc"], [4])
    chain = ring.pop()
    with pytest.raises(ValueError, match="room for 4"):
        chain.push(length)
    assert not chain.pushed and queue.collect() == []
    chain.push(4)
    assert queue.collect() == [(head, bytes(4))]


def test_chains_of_more_than_a_used_length_can_tell():
    """Section 2.7.5.1; the memory is not touched, so it takes none."""
    size = 1 << 30
    ram = mmap.mmap(-1, size)
    ring = vring.VRing(vring.GuestMemory([(0, 0, ram)]), 8, 0, 256, 512)
    for i in range(5):
        struct.pack_into("<QIHH", ram, 16 * i, 0, size, WRITE | (NEXT if i < 4 else 0), i + 1)
    ram[260:264] = struct.pack("<HH", 1, 0)  # four descriptors, then five
    ram[258:260] = struct.pack("<H", 1)
    assert ring.pop().writable == 1 << 32
    ram[258:260] = struct.pack("<H", 2)
    with pytest.raises(vring.RingError, match="too long"):
        ring.pop()
    del ring
    gc.collect()
    ram.close()


@pytest.mark.parametrize("kind", [vring.Chain, vring.VRing, vring.PackedRing])
def test_there_are_no_rings_and_chains_without_a_place(kind):
    with pytest.raises(TypeError):
        kind()
    with pytest.raises(TypeError):
        kind.__new__(kind)


def test_a_ring_that_is_neither_split_nor_packed_does_nothing():
    ring = vring.Ring()
    chain = vring.Chain(ring)
    assert chain.readable_views() == chain.writable_views() == []
    assert (chain.read(), chain.write(b"x")) == (b"", 0)
    chain.push()
    assert ring.pop() is None and not ring.enable_kicks() and not ring.should_call()


def test_a_ring_is_made_once(pair):
    queue, ring = pair
    queue.add([b"abc"])
    ring.__init__(vring.GuestMemory(), 4, 0, 0, 0)
    assert ring.size == 8 and ring.pop().read() == b"abc"


@pytest.mark.parametrize("slots", [0, 9, 60_000])
def test_elements_of_more_descriptors_than_the_ring_has(pair, slots):
    queue, ring = pair
    with pytest.raises(ValueError, match=f"{slots} descriptors of a ring of 8"):
        ring.use(0, 0, slots)
    assert queue.collect() == []


def test_a_driver_cannot_keep_the_echo_from_stopping():
    """A chain may have gigabytes, all in the same place; a ring full of them takes minutes."""
    ram = Ram(8 << 20)
    queue = DriverQueue(ram, 8)
    memory = vring.GuestMemory([(0, USER_BASE, ram.data)])
    places = (USER_BASE + at for at in (queue.desc, queue.avail, queue.used))
    ring = vring.VRing(memory, 8, *places, indirect=True)
    at = ram.alloc(1 << 20)
    for _ in range(4):
        queue.add_rows([(at, 1 << 20, flags) for flags in (0, WRITE) for _ in range(64)], indirect=True)
    kick, stop = os.eventfd(0), os.eventfd(1)
    assert ring.echo(kick, -1, stop) == 1
    for fd in (kick, stop, ram.fd):
        os.close(fd)
    queue.close()
