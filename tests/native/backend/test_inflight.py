"""Chains in flight outlive a backend: marks, recovery at every moment, and real kills."""

from __future__ import annotations

import os
import random
import resource
import struct
from contextlib import suppress

import pytest

vring = pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.lives import Life  # noqa: E402
from fakes.ring_driver import USER_BASE, DriverQueue, Ram, RawFrontend  # noqa: E402

from pyvmm.backend import inflight  # noqa: E402
from pyvmm.backend.device import Device  # noqa: E402
from pyvmm.backend.process import spawn  # noqa: E402
from pyvmm.errors import RemoteProtocolError  # noqa: E402
from pyvmm.vhost_user.payloads import Inflight, VringState  # noqa: E402

SIZE = 16


class Tracked:
    """A queue, its in-flight area, and one backend's ring after another."""

    def __init__(self, size=SIZE):
        self.ram = Ram(16 << 20)
        self.queue = DriverQueue(self.ram, size)
        self.area = bytearray(inflight.queue_bytes(size))
        self.payload = self.ram.alloc(64)

    def ring(self, base=0):
        places = (USER_BASE + at for at in (self.queue.desc, self.queue.avail, self.queue.used))
        memory = vring.GuestMemory([(0, USER_BASE, self.ram.data)])
        return vring.VRing(memory, self.queue.size, *places, base=base, inflight=self.area)

    def offer(self, count=1):
        return [self.queue.add_rows([(self.payload, 8, 0)]) for _ in range(count)]

    def header(self):
        return inflight.HEADER.unpack_from(self.area)

    def marks(self):
        at = inflight.HEADER.size
        rows = struct.iter_unpack("=B5xHQ", self.area[at : at + 16 * self.queue.size])
        return {head: counter for head, (mark, _, counter) in enumerate(rows) if mark}

    def set_mark(self, head, mark):
        self.area[inflight.HEADER.size + 16 * head] = mark


@pytest.fixture
def tracked():
    return Tracked()


def drain(ring):
    chains = []
    while (chain := ring.pop()) is not None:
        chains.append(chain)
    return chains


def test_layout_is_the_specified_one(tracked):
    ring = tracked.ring()
    assert tracked.header()[1:] == (1, 0, 0, 0)
    first, second = tracked.offer(2)
    chains = drain(ring)
    assert tracked.marks() == {first: 0, second: 1}
    chains[1].push()
    assert tracked.marks() == {first: 0}
    assert tracked.header()[3:] == (second, 1)
    assert not ring.resumed


def test_successor_gets_the_chains_in_their_order_then_new_ones(tracked):
    heads = tracked.offer(6)
    ring = tracked.ring()
    chains = [ring.pop() for _ in range(5)]
    chains[3].push()
    chains[0].push()
    after = tracked.ring(base=77)  # frontends know no better after a crash; the marks do
    assert after.resumed
    assert after.pending() == 4
    assert [chain.head for chain in drain(after)] == [heads[1], heads[2], heads[4], heads[5]]
    assert after.next_avail == 6
    third = tracked.ring()
    new = tracked.offer()
    assert [chain.head for chain in drain(third)] == [heads[1], heads[2], heads[4], heads[5], *new]


def test_order_is_that_of_taking_not_of_descriptors(tracked):
    tracked.queue.free.reverse()
    heads = tracked.offer(5)
    assert heads == sorted(heads, reverse=True)
    drain(tracked.ring())
    for _ in range(2):  # a second successor finds the same
        assert [chain.head for chain in drain(tracked.ring())] == heads


def killed_before_the_index(tracked, head):
    """last_batch_head is set, the used index has not moved."""
    struct.pack_into("=H", tracked.area, 12, head)
    return True


def killed_after_the_index(tracked, head):
    """The used index has moved, the mark is still there."""
    killed_before_the_index(tracked, head)
    put_used(tracked, head)
    return False


def killed_after_the_mark(tracked, head):
    """All but the area's own used index is done."""
    killed_after_the_index(tracked, head)
    tracked.set_mark(head, 0)
    return False


def put_used(tracked, head):
    ram, used = tracked.ram, tracked.queue.used
    index = ram.u16(used + 2)
    struct.pack_into("<II", ram.data, used + 4 + 8 * (index % tracked.queue.size), head, 0)
    ram.set_u16(used + 2, index + 1)


@pytest.mark.parametrize("moment", [killed_before_the_index, killed_after_the_index, killed_after_the_mark])
def test_every_moment_of_a_push_is_safe_to_die_at(tracked, moment):
    heads = tracked.offer(4)
    ring = tracked.ring()
    chains = drain(ring)
    chains[2].push()
    again = moment(tracked, heads[1])
    expected = [heads[0], heads[1], heads[3]] if again else [heads[0], heads[3]]
    assert [chain.head for chain in drain(tracked.ring())] == expected
    assert tracked.header()[4] == tracked.ram.u16(tracked.queue.used + 2)


def test_foreign_batch_of_several_is_settled(tracked):
    """QEMU's rules allow batches: entries linked by `next`, one move of the used index."""
    heads = tracked.offer(5)
    drain(tracked.ring())
    last = 0
    for head in heads[1:4]:
        struct.pack_into("=H", tracked.area, inflight.HEADER.size + 16 * head + 6, last)
        struct.pack_into("=H", tracked.area, 12, head)
        last = head
        put_used(tracked, head)
    assert [chain.head for chain in drain(tracked.ring())] == [heads[0], heads[4]]


def test_rewound_chains_are_not_in_flight(tracked):
    heads = tracked.offer(3)
    ring = tracked.ring()
    drain(ring)
    ring.rewind(2)
    assert list(tracked.marks()) == heads[:1]
    assert [chain.head for chain in drain(ring)] == heads[1:]
    after = tracked.ring()
    assert after.pop().head == heads[0]
    after.rewind(1)
    assert [chain.head for chain in drain(after)] == heads
    assert [chain.head for chain in drain(tracked.ring())] == heads


def test_area_that_lies_costs_no_memory_safety(tracked):
    """Marks and links are only hints of the peer's: random ones end in chains or RingError."""
    rng = random.Random(6)
    for _ in range(300):
        tracked.area[:] = rng.randbytes(len(tracked.area))
        struct.pack_into("=QHH", tracked.area, 0, 0, 1, SIZE)
        for head in range(SIZE):
            tracked.set_mark(head, rng.randrange(2))
        ring = tracked.ring()
        assert ring.pending() <= 0xFFFF + SIZE
        try:
            for chain in drain(ring):
                chain.push()
        except vring.RingError:
            continue


def test_area_too_small_for_the_queue(tracked):
    tracked.area = bytearray(inflight.queue_bytes(SIZE) - 64)
    with pytest.raises(ValueError, match="in-flight area of"):
        tracked.ring()


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_over_random_crashes(seed):
    """Chains are taken, pushed in any order, rewound; backends come and go."""
    rng = random.Random(seed)
    tracked = Tracked(8)
    ring, hand, done, last = tracked.ring(), [], 0, None
    for _ in range(3000):
        act = rng.randrange(12)
        if act < 4 and tracked.queue.free:
            tracked.offer()
        elif act < 7 and (chain := ring.pop()) is not None:
            hand.append(chain)
            last = chain
        elif act < 10 and hand:
            hand.pop(rng.randrange(len(hand))).push()
        elif act == 10 and hand and hand[-1] is last:
            ring.rewind(1)
            assert ring.pending()
            hand.pop()
        elif act == 11:
            expected = set(tracked.marks())
            assert expected >= {chain.head for chain in hand}
            ring = tracked.ring(base=rng.randrange(1 << 16))
            hand = [ring.pop() for _ in expected]
            last = hand[-1] if hand else None
            assert {chain.head for chain in hand} == expected
        done += len(tracked.queue.collect())  # fails when a head is used twice
    for chain in hand + drain(ring):
        chain.push()
    done += len(tracked.queue.collect())
    assert not tracked.queue.chains
    assert done > 500


# -- the file ------------------------------------------------------------------------------


def test_no_descriptor_is_left_for_a_file():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(RemoteProtocolError, match="Too many open files"):
            inflight.create(1, 16)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_file_is_sealed_and_as_large_as_described():
    description, fd = inflight.create(3, 256)
    assert description == Inflight(3 * (256 * 16 + 64), 0, 3, 256)
    assert os.fstat(fd).st_size == description.mmap_size
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    assert [len(area) for area in inflight.map_areas(description, fd)] == [256 * 16 + 64] * 3
    os.close(fd)


WRONG = {
    "no queues": (Inflight(4096, 0, 0, 16), b""),
    "queues of nothing": (Inflight(4096, 0, 1, 0), b""),
    "too many queues": (Inflight(1 << 40, 0, 300, 16), b""),
    "too large": (Inflight(1 << 40, 0, 1, 0xFFFF), b""),
    "area too short": (Inflight(319, 0, 1, 16), b""),
    "beyond the file": (Inflight(1 << 20, 0, 1, 32768), b""),
    "offset beyond the file": (Inflight(4096, 1 << 30, 1, 16), b""),
    "offset over the end": (Inflight(4096, (1 << 64) - 4096, 1, 16), b""),
    "odd offset": (Inflight(2048, 4, 1, 16), b""),
    "unknown version": (Inflight(4096, 0, 1, 16), struct.pack("=QHH", 0, 2, 16)),
    "unknown features": (Inflight(4096, 0, 1, 16), struct.pack("=QHH", 1, 1, 16)),
    "more entries than fit": (Inflight(4096, 0, 1, 16), struct.pack("=QHH", 0, 1, 17)),
}


@pytest.mark.parametrize(("description", "data"), WRONG.values(), ids=WRONG)
def test_wrong_descriptions(description, data):
    fd = os.memfd_create("inflight")
    os.write(fd, data)
    os.ftruncate(fd, 4096)
    with pytest.raises(RemoteProtocolError, match="in-flight"):
        inflight.map_areas(description, fd)
    os.close(fd)


# -- processes that are killed -------------------------------------------------------------


class Slow(Device):
    """Holds chains and pushes them out of order; counts in each what it was told."""

    device_id = 63
    queue_sizes = (SIZE,)

    def __init__(self):
        super().__init__()
        self._hand = []
        self._rng = random.Random()

    def on_queue(self, queue):
        for chain in queue:
            queue.keep(chain)
            chain.write(chain.read().upper())
            self._hand.append(chain)
            if len(self._hand) >= self._rng.randrange(1, 6):
                self._hand.pop(self._rng.randrange(len(self._hand))).push()
        while self._hand:
            self._hand.pop().push()
        queue.notify()


@pytest.fixture
def life():
    life = Life(Slow, SIZE)
    life.start()
    yield life
    life.close()


def test_kills_at_any_moment_lose_and_repeat_nothing_that_the_driver_sees(life):
    rng = random.Random(9)
    ram, queue = life.ram, life.queue
    room = ram.alloc(16 * SIZE)
    sent = done = 0
    slots, expected = list(range(SIZE // 2)), {}
    for _ in range(40):
        goal = done + rng.randrange(1, 60)
        while done < goal:
            while slots and len(queue.free) >= 2:
                slot = slots.pop()
                place, data = room + 32 * slot, b"req %08x" % sent
                ram.data[place : place + 12] = data
                expected[queue.add_rows([(place, 12, 0), (place + 16, 12, 2)])] = (slot, data.upper())
                sent += 1
            queue.kick()
            used = queue.wait(20)
            assert used, f"stuck at {done} of {sent}"
            for head, data in used:
                slot, wanted = expected.pop(head)
                assert data == wanted
                slots.append(slot)
            done += len(used)
        queue.kick()
        life.kill()
        life.start()
    assert done > 500


def test_successor_makes_up_for_a_call_that_the_kill_prevented(life):
    life.queue.add([b"x"], [1])
    life.queue.kick()
    while life.ram.u16(life.queue.used + 2) == 0:
        os.sched_yield()
    life.kill()
    with suppress(BlockingIOError):  # the call came after all: lose it
        os.eventfd_read(life.queue.call_fd)
    life.start()
    assert life.queue.wait(20)[0][1] == b"X"
    os.eventfd_read(life.queue.call_fd)  # was there, or this raises


def test_orderly_stop_leaves_nothing_in_flight(life):
    for turn in range(3):
        life.queue.add([b"x"], [1])
        life.queue.kick()
        assert life.queue.wait(20)[0][1] == b"X"
        assert life.frontend.stop(0) == turn + 1
        assert life.frontend.start(0, life.queue, base=turn + 1) == 0
    life.frontend.stop(0)
    life.queue.reset()  # a driver that starts anew, while the frontend kept the file
    assert life.frontend.start(0, life.queue) == 0
    life.queue.add([b"y"], [1])
    life.queue.kick()
    assert life.queue.wait(20)[0][1] == b"Y"


class Forgetful(Slow):
    inflight = False


def test_device_that_must_not_repeat_does_not_offer_it():
    process = spawn(Forgetful)
    frontend = RawFrontend(process.take_socket())
    frontend.tell("SET_OWNER")
    frontend.number("GET_FEATURES")
    assert not frontend.number("GET_PROTOCOL_FEATURES") >> 12 & 1
    frontend.close()
    process.close()


@pytest.mark.parametrize("name", ["GET_INFLIGHT_FD", "SET_INFLIGHT_FD"])
def test_malformed_request_costs_the_connection_only(name):
    process = spawn(Slow)
    frontend = RawFrontend(process.take_socket())
    frontend.negotiate()
    fds = [os.memfd_create("short")] if name.startswith("SET") else []
    frontend.send(name, Inflight(1 << 50, 0, 999, 999), fds)
    with pytest.raises((EOFError, ConnectionError)):
        frontend.ask("GET_VRING_BASE", VringState(0, 0))
    assert process.wait(10) == 0
    for fd in fds:
        os.close(fd)
    frontend.close()
    process.close()
