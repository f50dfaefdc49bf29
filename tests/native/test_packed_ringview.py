"""Packed rings that our own library serves, as they look from outside, beside what driver and device know."""

from __future__ import annotations

import gc
import random
import sys
import threading
import time

import pytest

pytest.importorskip("numpy")
pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.packed_driver import PackedQueue
from fakes.ring_driver import USER_BASE, WRITE, Ram
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm._native import vring
from pyvmm.layout import RamRange
from pyvmm.ringview import BUSY, IDLE, STUCK, GuestView, PackedRing, pauses, state
from pyvmm.virtio.spec import F_EVENT_IDX

ROWS = [(64, 4, 0), (64, 4, 0), (64, 4, WRITE), (64, 4, WRITE)]


class Played:
    """A driver, a device of our library, and who looks at their ring.

    `held` is the truth: the place of the first descriptor of each chain that the device has, with the chain.
    """

    def __init__(self, size, *, event_idx=False, lifo=False):
        self.ram = Ram()
        self.queue = PackedQueue(self.ram, size, event_idx=event_idx)
        self.lifo, self.held, self.popped = lifo, [], []
        memory = vring.GuestMemory([(0, USER_BASE, self.ram.data)])
        places = self.queue.desc, self.queue.avail, self.queue.used
        user = (USER_BASE + place for place in places)
        self.device = vring.PackedRing(memory, size, *user, event_idx=event_idx, indirect=True)
        view = GuestView(self.ram.fd, [RamRange(0, self.ram.size, 0)])
        self.view = PackedRing(view, size, *places, F_EVENT_IDX if event_idx else 0)

    def close(self):
        self.queue.close()
        self.device = self.held = None
        gc.collect()
        self.ram.close()

    def add(self, slots=1, indirect=False):
        place = self.queue.place
        self.queue.add_rows(ROWS[-slots:], indirect=indirect)
        self.held.append((place, self.device.pop()))

    def give(self, turn=0):
        self.held.pop(turn)[1].push()

    def look(self):
        """The driver's, and what it got back; Linux uses an ID first that it got back last."""
        numbers = [number for number, _ in self.queue.collect()]
        for number in numbers if self.lifo else []:
            self.queue.ids.remove(number)
            self.queue.ids.insert(0, number)
        return numbers

    @property
    def heads(self):
        return tuple(place for place, _ in self.held)

    def check(self, in_order):
        found, queue = self.view.sample(), self.queue
        assert found.avail == queue.place + (0 if queue.wrap else queue.size)
        assert found.holds in (None, bool(self.held))
        assert not found.broken
        if in_order:
            assert self.heads in [found.heads[turn:] for turn in range(found.unsure + 1)]
        return found


@pytest.fixture
def play():
    played = []

    def play(*arguments, **options):
        played.append(Played(*arguments, **options))
        return played[-1]

    yield play
    for one in played:
        one.close()


ADD = st.tuples(st.just("add"), st.integers(1, 4), st.booleans())
GIVE = st.tuples(st.just("give"), st.integers(0, 7), st.just(False))
LOOK = st.tuples(st.just("look"), st.just(0), st.just(False))


@settings(deadline=None)
@given(
    size=st.sampled_from([1, 2, 3, 4, 5, 7, 8]),
    event_idx=st.booleans(),
    lifo=st.booleans(),
    in_order=st.booleans(),
    steps=st.lists(st.one_of(ADD, GIVE, LOOK), max_size=60),
    times=st.integers(1, 4),
)
def test_what_is_told_is_true(size, event_idx, lifo, in_order, steps, times):
    """At each step of any driver and device; the steps are repeated, so that they go round the ring."""
    played = Played(size, event_idx=event_idx, lifo=lifo)
    try:
        for act, number, indirect in steps * times:
            if act == "add" and played.queue.room >= (1 if indirect else number):
                played.add(number, indirect)
            elif act == "give" and played.held:
                played.give(0 if in_order else number % len(played.held))
            elif act == "look" and played.look() and event_idx:
                assert played.check(in_order).holds is not None
            played.check(in_order)
    finally:
        played.close()


@pytest.mark.parametrize("size", [1, 3, 8, 250, 256])
@pytest.mark.parametrize("lifo", [True, False])
def test_one_request_at_a_time_for_many_laps(play, size, lifo):
    """Linux with indirect descriptors: the same ID in the next slot, each time, and all is certain."""
    played = play(size, event_idx=True, lifo=lifo)
    for turn in range(2000):
        played.add(3, indirect=True)
        found = played.check(in_order=True)
        assert (found.holds, found.heads, found.unsure) == (True, (turn % size,), 0)
        played.give()
        assert played.check(in_order=True).holds is False
        played.look()


@pytest.mark.parametrize("event_idx", [True, False])
@pytest.mark.parametrize("size", [7, 64])
def test_deep_queues_out_of_order(play, size, event_idx):
    """Chains of one slot, as many as fit, in any order: how many is known for certain."""
    chance = random.Random(size)
    played = play(size, event_idx=event_idx, lifo=True)
    for _ in range(3000):
        while played.queue.room and chance.random() < 0.8:
            played.add()
        if played.held:
            played.give(chance.randrange(len(played.held)))
        played.look()
        found = played.check(in_order=False)
        assert len(found.heads) - found.unsure <= len(played.held) <= len(found.heads)


def test_states(play):
    played = play(8, event_idx=True, lifo=True)
    for _ in range(3):
        played.add(2)
        played.give()
        played.look()
    idle = played.view.sample()
    assert state([idle, idle]) == IDLE
    played.add(2)
    new = played.view.sample()
    assert state([idle, new]) == BUSY
    assert state([new, played.view.sample()]) == STUCK
    played.add(1)
    assert state([new, played.view.sample()]) == STUCK
    played.give()
    assert state([new, played.view.sample()]) == BUSY


@pytest.fixture
def quick_switches():
    """Threads get in between each other's steps."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("quick_switches")
def test_a_ring_at_work_is_never_broken_or_stuck(play):
    """Chains of three, seen while they are written; positions in a small ring come round soon."""
    played, stop = play(7, event_idx=True, lifo=True), threading.Event()

    def work():
        while not stop.is_set():
            while played.queue.room >= 3:
                played.add(3)
            played.give()
            played.look()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(10):
            looks = [played.view.sample()]
            for pause in pauses(0.2):
                time.sleep(pause)
                looks.append(played.view.sample())
            assert state(looks) in (BUSY, IDLE)
    finally:
        stop.set()
        worker.join()
