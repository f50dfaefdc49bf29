"""Faults on purpose: what each makes a driver see, and that a plan does the same again."""

from __future__ import annotations

import os
import select
import signal
import struct
import threading
from time import monotonic, sleep

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.packed_driver import FRESH, PackedQueue
from fakes.ring_driver import RING_PACKED, DriverQueue, Ram, RawFrontend

from pyvmm.backend import ConfigSpace, Device, DeviceThread, spawn
from pyvmm.backend.faults import Faults
from pyvmm.backend.faulty import EFFECTS
from pyvmm.vhost_user.payloads import Config


class Upper(Device):
    device_id = 63
    features = 1 << 3
    queue_sizes = (16,)

    def __init__(self):
        super().__init__()
        self.config = ConfigSpace([("word", 4)])

    def on_queue(self, queue):
        for chain in queue:
            chain.write(chain.read().upper())


class Driver:
    """A driver that believes nothing: it reads the used ring as numbers."""

    def __init__(self, sock):
        self.ram = Ram()
        self.queue = DriverQueue(self.ram, 16)
        self.frontend = RawFrontend(sock)
        self.offered = self.frontend.negotiate(1 << 30 | 1 << 32)
        self.frontend.share(self.ram)
        assert self.frontend.start(0, self.queue) == 0

    def send(self, *texts):
        """Make all available at once; their heads."""
        heads = [self.queue.add([text], [len(text)]) for text in texts]
        self.queue.kick()
        return heads

    def used(self):
        """All used elements so far: identifier and length."""
        index = self.ram.u16(self.queue.used + 2)
        return [struct.unpack_from("<II", self.ram.data, self.queue.used + 4 + 8 * i) for i in range(index)]

    def called(self, seconds=10.0):
        if not select.select([self.queue.call_fd], [], [], seconds)[0]:
            return False
        os.eventfd_read(self.queue.call_fd)
        return True

    def settle(self):
        """Wait until the device has taken the kick, and then until its thread has served that."""
        end = monotonic() + 10
        while select.select([self.queue.kick_fd], [], [], 0)[0]:
            assert monotonic() < end, "the device does not take its kick"
            sleep(0.001)
        self.frontend.number("GET_FEATURES")

    def do(self, work):
        """Do `work(device)` in the device's thread."""
        done = threading.Event()
        self.thread.call(lambda: (work(self.device), done.set()))
        assert done.wait(10)

    def close(self):
        self.frontend.close()
        self.queue.close()
        self.ram.close()


@pytest.fixture
def plug():
    """A faulty device in a thread, and its driver."""
    running = []

    def plug(device=None, faults=None, **plan):
        device, faults = device or Upper(), faults or Faults(**plan)
        faults.attach(device)
        thread = DeviceThread(device)
        driver = Driver(thread.take_socket())
        driver.device, driver.thread = device, thread
        running.extend((driver, thread))
        return driver, faults

    yield plug
    for thing in running:
        thing.close()


SEEN = {  # what three chains of 2, 3 and 4 bytes become when the fault hits the second
    "drop": lambda a, b, c: [(a, 2), (c, 4)],
    "short_write": lambda a, b, c: [(a, 2), (b, 1), (c, 4)],
    "used_len": lambda a, b, c: [(a, 2), (b, 3 + 4096), (c, 4)],
    "bad_used_id": lambda a, b, c: [(a, 2), (16 + b, 3), (c, 4)],
    "duplicate": lambda a, b, c: [(a, 2), (b, 3), (b, 3), (c, 4)],
    "reorder": lambda a, b, c: [(a, 2), (c, 4), (b, 3)],
}


@pytest.mark.parametrize("fault", SEEN)
def test_used_ring_shows_the_fault(plug, fault):
    driver, faults = plug(**{fault: {1}})
    heads = driver.send(b"ab", b"cde", b"fghi")
    assert driver.called()
    assert driver.used() == SEEN[fault](*heads)
    assert [(hit.number, hit.queue, hit.fault) for hit in faults.hits] == [(1, 0, fault)]


def test_a_false_length_in_a_packed_ring_is_in_its_place():
    device = Upper()
    Faults(used_len={0}).attach(device)
    with DeviceThread(device) as thread:
        ram, frontend = Ram(), RawFrontend(thread.take_socket())
        frontend.negotiate(1 << 30 | 1 << 32 | RING_PACKED)
        frontend.share(ram)
        queue = PackedQueue(ram, 16)
        assert frontend.start(0, queue, base=FRESH) == 0
        for text in (b"abc", b"def"):
            queue.add([text, text], [2, 4])
        queue.kick()
        got = []
        while len(got) < 2:
            got += [data for _, data in queue.wait()]
        assert got == [b"ABCABC", b"DEFDEF"]
        for thing in (frontend, queue, ram):
            thing.close()


def test_a_wrong_length_is_refused_before_its_fault(plug):
    driver, faults = plug(drop={0})
    told = []

    def on_queue(queue):
        for chain in queue:
            for length in (-1, 3):
                with pytest.raises(ValueError, match="room for 2"):
                    chain.push(length)
            told.append(chain.pushed)

    driver.device.on_queue = on_queue
    driver.send(b"ab")
    driver.settle()
    assert told == [False] and [hit.fault for hit in faults.hits] == ["drop"]


@pytest.mark.parametrize(
    ("rule", "order", "done"),
    [
        (1.0, "edcba", [3, 2, 1, 0]),
        ({0, 1}, "cbade", [1, 0]),
        ({1, 2}, "adcbe", [2, 1]),
        ({1, 3}, "acbed", [1, 3]),
        ({4}, "abcde", []),
    ],
)
def test_reordered_chains_come_after_the_next_one(plug, rule, order, done):
    """And `hits` has those after which one came: not the last one that the driver sent."""
    driver, faults = plug(reorder=rule)
    heads = dict(zip(driver.send(*[b"ab"] * 5), "abcde", strict=True))
    assert driver.called()
    assert "".join(heads[head] for head, _ in driver.used()) == order
    assert [hit.number for hit in faults.hits] == done


class Hand(Upper):
    """Keeps chains until it is told to give one back, and then tells the driver each time."""

    def __init__(self):
        super().__init__()
        self.hand = []

    def on_queue(self, queue):
        for chain in queue:
            queue.keep(chain)
            self.hand.append(chain)

    def finish(self, index):
        self.hand.pop(index).push(1)
        self.queues[0].notify()


def test_reordered_chain_waits_for_one_that_is_in_hand(plug):
    driver, faults = plug(Hand(), reorder={0}, delay_seconds=60)
    first, second = driver.send(b"a", b"b")
    driver.settle()
    for _ in range(2):
        driver.do(lambda device: device.finish(0))
    assert driver.used() == [(second, 1), (first, 1)]
    assert [hit.number for hit in faults.hits] == [0]


@pytest.mark.parametrize("fault", ["drop", "delay"])
def test_reordered_chain_waits_for_one_that_does_come_back(plug, fault):
    driver, _ = plug(reorder={0}, delay_seconds=60, **{fault: {1}})
    first, _, third = driver.send(b"ab", b"cd", b"ef")
    assert driver.called()
    assert driver.used() == [(third, 2), (first, 2)]


def test_reordered_chain_comes_after_one_that_was_delayed(plug):
    driver, _ = plug(Hand(), reorder={0}, delay={1}, delay_seconds=0.3)
    first, second, _ = driver.send(b"a", b"b", b"c")
    driver.settle()
    driver.do(lambda device: device.finish(1))
    driver.do(lambda device: device.finish(0))
    assert driver.called()
    assert driver.used() == [(second, 1), (first, 1)]


@pytest.mark.parametrize("fault", ["reorder", "delay"])
def test_chains_that_are_given_back_to_nobody(plug, fault):
    driver, _ = plug(Hand(), **{fault: {0}})
    driver.send(b"a")
    driver.settle()
    driver.frontend.close()
    driver.thread.close()
    driver.device.hand.pop().push()
    assert driver.used() == []


def test_reordered_chain_does_not_wait_for_ever(plug):
    driver, faults = plug(Hand(), reorder={0}, delay_seconds=0.2)
    first, _ = driver.send(b"a", b"b")
    driver.settle()
    driver.do(lambda device: device.finish(0))
    assert driver.used() == []
    assert driver.called()
    assert driver.used() == [(first, 1)]
    assert faults.hits == []


def test_reordered_chain_goes_back_when_the_queue_stops(plug):
    driver, _ = plug(Hand(), reorder={0}, delay_seconds=60)
    first, _ = driver.send(b"a", b"b")
    driver.settle()
    driver.do(lambda device: device.finish(0))
    driver.frontend.stop(0)
    assert driver.used() == [(first, 1)]
    assert driver.called()


def test_no_reordered_chain_waits_for_one_that_went_back_into_the_ring(plug):
    driver, _ = plug(Hand(), reorder={3}, delay_seconds=60)
    driver.send(b"a", b"b")
    driver.settle()

    def retract(device):
        device.hand.pop()
        device.queues[0].rewind(1)
        device.on_queue(device.queues[0])
        device.finish(0)
        device.finish(0)

    driver.do(retract)
    assert driver.called()
    driver.send(b"c")
    driver.settle()
    driver.do(lambda device: device.finish(0))
    assert driver.called()
    assert len(driver.used()) == 3


def test_one_at_a_time_cannot_be_reordered(plug):
    driver, faults = plug(reorder=1.0, delay_seconds=60)
    for _ in range(3):
        driver.send(b"ab")
        assert driver.called()
    assert len(driver.used()) == 3
    assert faults.hits == []


def test_delay(plug):
    driver, _ = plug(delay={0}, delay_seconds=0.2)
    late, early = driver.send(b"ab", b"cd")
    assert driver.called()
    assert driver.used() == [(early, 2)]
    assert driver.called()
    assert driver.used() == [(early, 2), (late, 2)]


def test_lost_call_and_call_for_nothing(plug):
    driver, _ = plug(never_call={0}, spurious_call={1})
    driver.send(b"ab")
    driver.settle()
    assert len(driver.used()) == 1
    assert not driver.called(0)
    driver.send(b"cd")
    assert driver.called()
    driver.settle()
    assert len(driver.used()) == 2


def test_needs_reset_ends_the_connection(plug):
    driver, _ = plug(needs_reset={0})
    driver.send(b"ab")
    with pytest.raises((EOFError, ConnectionError)):
        driver.frontend.receive()
    assert driver.used() == []


def test_die():
    def make():
        device = Upper()
        Faults(die={1}).attach(device)
        return device

    process = spawn(make)
    driver = Driver(process.take_socket())
    driver.send(b"ab")
    assert driver.called()
    driver.send(b"cd")
    assert process.wait(10) == 128 + signal.SIGKILL
    assert len(driver.used()) == 1
    driver.close()
    process.close()


def test_features_and_configuration(plug):
    driver, faults = plug(features=1 << 3 | 1 << 5, config_flip={1})
    assert driver.offered & 0xFF == 1 << 5
    reads = [driver.frontend.ask("GET_CONFIG", Config(0, 0, bytes(4))).data for _ in range(3)]
    assert reads[0] == reads[2] == bytes(4)
    assert int.from_bytes(reads[1], "little").bit_count() == 1
    assert faults.hits[0].fault == "config_flip"


@pytest.mark.parametrize("bit", [3, 26, 28, 29, 30, 32, 34, 35])
def test_any_bit_of_the_offer_can_be_turned_over(bit):
    """Those of the device, and those of the transport that no device names."""
    offers = []
    for plan in ({}, {"features": 1 << bit}):
        device = Upper()
        Faults(**plan).attach(device)
        with DeviceThread(device) as thread:
            offers.append(RawFrontend(thread.take_socket()).number("GET_FEATURES"))
    assert offers[0] ^ offers[1] == 1 << bit


def traffic(plug, **plan):
    driver, faults = plug(**plan)
    for i in range(16 // 2 - 1):
        driver.send(bytes([65 + i]) * 4)
    driver.settle()
    return [length for _, length in driver.used()], faults


def test_same_seed_does_the_same_and_a_replay_too(plug):
    plan = {"drop": 0.3, "duplicate": 0.3, "short_write": 0.3}
    seen, faults = traffic(plug, seed=3, **plan)
    assert faults.hits
    again, _ = traffic(plug, seed=3, **plan)
    replayed, replay = traffic(plug, **{**faults.replay().rules})
    assert seen == again == replayed
    assert replay.hits == faults.hits
    others = {tuple(traffic(plug, seed=seed, **plan)[0]) for seed in range(4, 9)}
    assert len(others | {tuple(seen)}) > 1


def test_replay_flips_the_same_bits(plug):
    def reads(faults):
        driver, _ = plug(faults=faults)
        return [driver.frontend.ask("GET_CONFIG", Config(0, 0, bytes(4))).data for _ in range(8)]

    faults = Faults(seed=7, config_flip=0.5)
    seen = reads(faults)
    assert len(set(seen)) > 2
    assert reads(faults.replay()) == seen


def test_after(plug):
    _, faults = traffic(plug, after=4, drop=1.0)
    assert [hit.number for hit in faults.hits] == [4, 5, 6]


def test_every_fault_is_tested():
    tested = {*SEEN, "delay", "never_call", "spurious_call", "needs_reset", "die"}
    assert tested == set(EFFECTS)
