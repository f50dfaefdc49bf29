"""Loops over a queue: whose chains go back when, however the loop ends."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.packed_driver import FRESH, PackedQueue
from fakes.ring_driver import RING_PACKED, DriverQueue, Ram, RawFrontend

from pyvmm import backend
from pyvmm.backend import Device, DeviceThread
from pyvmm.vhost_user.payloads import Inflight

SIZE = 16


class Driver:
    """A driver before one device after the other, with the same ring and in-flight file."""

    def __init__(self):
        self.ram = Ram()
        self.queue = DriverQueue(self.ram, SIZE)
        self.file = None
        self.thread = self.frontend = None

    def plug(self, device):
        """Connect, and run the queue; the device may break at once."""
        self.thread = DeviceThread(device)
        self.frontend = RawFrontend(self.thread.take_socket())
        self.frontend.negotiate(1 << 30 | 1 << 32)
        if self.file is None:
            self.frontend.send("GET_INFLIGHT_FD", Inflight(0, 0, 1, SIZE))
            message = self.frontend.receive()
            self.file = message.payload, message.take_fds()[0]
        assert self.frontend.tell("SET_INFLIGHT_FD", self.file[0], [self.file[1]]) == 0
        self.frontend.share(self.ram)
        self.frontend.start(0, self.queue)

    def unplug(self):
        self.frontend.close()
        self.thread.close()

    def ask(self, *texts):
        """Make all available at once."""
        for text in texts:
            self.queue.add([text], [len(text)])
        self.queue.kick()

    def answers(self, count, seconds=10.0):
        """What was given back, waiting for calls until there are so many."""
        got = []
        while len(got) < count and (used := self.queue.wait(seconds)):
            got += [data for _, data in used]
        return got

    def no_kicks(self):
        """Whether the device asked not to be kicked (VIRTQ_USED_F_NO_NOTIFY)."""
        return bool(self.ram.u16(self.queue.used))

    def close(self):
        self.unplug()
        os.close(self.file[1])
        self.queue.close()
        self.ram.close()


@pytest.fixture
def driver():
    driver = Driver()
    yield driver
    driver.close()


class Upper(Device):
    device_id = 63
    queue_sizes = (SIZE,)

    def __init__(self):
        super().__init__()
        self.calls = 0

    def on_queue(self, queue):
        self.calls += 1
        self.work(queue)

    def work(self, queue):
        for chain in queue:
            chain.write(chain.read().upper())


class One(Upper):
    """Leaves the loop after each chain."""

    def work(self, queue):
        for chain in queue:
            chain.write(chain.read().upper())
            break


class Bug(Upper):
    def work(self, queue):
        for chain in queue:
            chain.write(b"half")
            raise ZeroDivisionError("a bug")


class Careful(Bug):
    """Catches its own exceptions."""

    def work(self, queue):
        try:
            super().work(queue)
        except ZeroDivisionError:
            return


def test_break_gives_the_chain_back_and_the_rest_comes_in_further_calls(driver):
    device = One()
    driver.plug(device)
    for _ in range(3):
        driver.ask(b"ab", b"cd", b"ef")
        assert driver.answers(3) == [b"AB", b"CD", b"EF"]
        assert not driver.no_kicks()
    assert device.calls >= 9


def test_break_in_the_last_turn_of_a_pass(driver):
    driver.plug(One())
    driver.ask(*[b"ab"] * (SIZE // 2))
    assert len(driver.answers(SIZE // 2)) == SIZE // 2


def test_chain_in_hand_when_the_device_raises_is_for_its_successor(driver):
    driver.plug(Bug())
    driver.ask(b"request", b"another")
    with pytest.raises((EOFError, ConnectionError)):
        driver.frontend.receive()
    assert driver.ram.u16(driver.queue.used + 2) == 0
    with pytest.raises(ZeroDivisionError):
        driver.unplug()
    driver.plug(Upper())
    assert driver.answers(2) == [b"REQUEST", b"ANOTHER"]


def test_device_that_catches_its_exception_has_the_chain_given_back(driver):
    driver.plug(Careful())
    driver.ask(b"request", b"another")
    assert driver.answers(2) == [b"half", b"half"]


class Later(Upper):
    """Takes chains outside of `on_queue`, where only `notify` tells that the loop is over."""

    def on_queue(self, queue):
        self.connection.loop.call_later(0, lambda: self.later(queue))

    def later(self, queue):
        self.work(queue)
        queue.notify()


class LaterOne(Later, One):
    pass


def test_break_outside_of_on_queue(driver):
    driver.plug(LaterOne())
    for _ in range(3):
        driver.ask(b"ab")
        assert driver.answers(1) == [b"AB"]


class LaterBug(Later, Bug):
    pass


def test_exception_outside_of_on_queue(driver):
    driver.plug(LaterBug())
    driver.ask(b"request")
    with pytest.raises((EOFError, ConnectionError)):
        driver.frontend.receive()
    with pytest.raises(ZeroDivisionError):
        driver.unplug()
    driver.plug(Upper())
    assert driver.answers(1) == [b"REQUEST"]


class Last(One):
    """Takes chains when the queue ends."""

    def on_queue(self, queue):
        pass

    def on_stop(self, queue):
        self.work(queue)


def test_break_in_on_stop(driver):
    driver.plug(Last())
    driver.ask(b"ab", b"cd")
    assert driver.frontend.stop(0) == 1
    assert driver.answers(1) == [b"AB"]


def test_public_names(driver):
    """All that a device's type hints need is in the package."""
    for name in backend.__all__:
        assert getattr(backend, name).__name__ == name
    with pytest.raises(AttributeError):
        backend.Ring  # noqa: B018
    driver.plug(taker := Taker())
    driver.ask(b"ab")
    driver.answers(1)
    assert [type(thing) for thing in taker.seen] == [backend.Queue, backend.Chain]


class Taker(Upper):
    """Notes what it is given."""

    def work(self, queue):
        for chain in queue:
            self.seen = [queue, chain]


class Starts(Upper):
    """Notes which of its queues began anew."""

    def __init__(self):
        super().__init__()
        self.fresh = []

    def on_start(self, queue):
        self.fresh.append(queue.fresh)


@pytest.mark.parametrize(
    ("kind", "features", "bases"),
    [(DriverQueue, 0, {0: True, 5: False}), (PackedQueue, RING_PACKED, {FRESH: True, 0x8005_8005: False})],
)
def test_queue_knows_whether_it_begins_anew(kind, features, bases):
    device, ram = Starts(), Ram()
    with DeviceThread(device) as thread:
        frontend, queue = RawFrontend(thread.take_socket()), kind(ram, SIZE)
        frontend.negotiate(1 << 30 | 1 << 32 | features)
        frontend.share(ram)
        for base in bases:
            assert frontend.start(0, queue, base=base) == 0
            assert frontend.stop(0) == base
        frontend.close()
    assert device.fresh == list(bases.values())
    queue.close()
    ram.close()


def test_queue_with_chains_in_flight_does_not_begin_anew(driver):
    """Though its base may say so: where nothing came back, that is the used index."""
    bug = Bug()
    driver.plug(bug)
    driver.ask(b"request")
    with pytest.raises((EOFError, ConnectionError)):
        driver.frontend.receive()
    with pytest.raises(ZeroDivisionError):
        driver.unplug()
    device = Starts()
    driver.plug(device)
    assert driver.answers(1) == [b"REQUEST"]
    assert device.fresh == [False]


class Keeper(Upper):
    """Keeps the first chain, which it has popped: that is not needed."""

    def on_queue(self, queue):
        if self.calls:
            super().on_queue(queue)
        elif (chain := queue.pop()) is not None:
            self.calls += 1
            queue.keep(chain)
            chain.push(0)
            queue.notify()


def test_keeping_a_popped_chain_says_nothing_about_later_ones(driver):
    """Whose objects are likely to have the same place in memory."""
    driver.plug(Keeper())
    for answer in (b"", b"AB", b"AB", b"AB"):
        driver.ask(b"ab")
        assert driver.answers(1, 2) == [answer]
