"""Devices with loops of their own: their threads are in a queue exactly while it runs."""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.census import leaves_nothing
from fakes.ring_driver import USER_BASE, addresses
from native.backend.test_connection import Bench
from native.backend.test_hostile_frontend import until

from pyvmm import eventfd
from pyvmm.backend import Device
from pyvmm.backend.echo import Echo
from pyvmm.vhost_user.payloads import MemRegion, MemTable, SingleRegion, VringAddr, VringFile, VringState

NOWHERE = VringAddr(0, 0, 8, 8, 8, 0)


class Noting(Device):
    """Notes when it begins and ends: in turns, and with everything at hand."""

    device_id = 63
    queue_sizes = (16, 16)
    threaded = True

    def __init__(self):
        super().__init__()
        self.calls = []
        self.within = {}

    def on_start(self, queue):
        assert queue.running and queue.index not in self.within
        self.within[queue.index] = held(queue)
        self.calls.append("start")

    def on_stop(self, queue):
        assert self.within.pop(queue.index) == held(queue)
        self.calls.append("stop")


def held(queue):
    """What a thread uses; the descriptors are open."""
    fds = [fd for fd in (queue.kick_fd, queue.call_fd, queue.error_fd) if fd >= 0]
    return [queue.ring, *fds, *map(os.fstat, fds)][: 1 + len(fds)]


@contextmanager
def plugged(device, path):
    """The device with its first queue running: bench, frontend, queue."""
    with leaves_nothing():
        bench = Bench(device, str(path))
        try:
            frontend, queue = bench.ready(), bench.queue(event_idx=True)
            assert frontend.start(0, queue) == 0
            yield bench, frontend, queue
        finally:
            bench.close()


def echoed(queue, seconds=5.0):
    queue.add([b"abc"], [3])
    queue.kick()
    return [data for _, data in queue.wait(seconds)]


def threads():
    return len(os.listdir("/proc/self/task"))


def with_fd(name):
    def change(frontend, queue):
        fd = os.eventfd(0)
        status = frontend.tell(name, VringFile(0, True), [fd])
        os.close(fd)
        return status

    return change


CHANGES = {
    "kick": with_fd("SET_VRING_KICK"),
    "call": with_fd("SET_VRING_CALL"),
    "error": with_fd("SET_VRING_ERR"),
    "memory": lambda frontend, queue: frontend.share(queue.ram, 2),
    "addresses": lambda frontend, queue: frontend.tell("SET_VRING_ADDR", addresses(0, queue)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_device_stops_and_starts_again_when_something_changes(tmp_path, name):
    device = Noting()
    with plugged(device, tmp_path / "sock") as (_, frontend, queue):
        assert CHANGES[name](frontend, queue) == 0
        assert device.calls == ["start", "stop", "start"]
        frontend.stop(0)
        assert device.calls == ["start", "stop", "start", "stop"]


def test_a_queue_that_is_disabled_rests_whatever_changes(tmp_path):
    device = Noting()
    with plugged(device, tmp_path / "sock") as (_, frontend, queue):
        assert frontend.tell("SET_VRING_ENABLE", VringState(0, 0)) == 0
        for change in CHANGES.values():
            assert change(frontend, queue) == 0
        assert device.calls == ["start", "stop"]
        assert frontend.tell("SET_VRING_ENABLE", VringState(0, 1)) == 0
        assert device.calls == ["start", "stop", "start"]


def test_echo_leaves_a_disabled_queue_alone(tmp_path):
    with plugged(Echo(), tmp_path / "sock") as (_, frontend, queue):
        assert frontend.tell("SET_VRING_ENABLE", VringState(0, 0)) == 0
        assert echoed(queue, 0.2) == []
        assert frontend.tell("SET_VRING_ENABLE", VringState(0, 1)) == 0
        assert queue.wait()[0][1] == b"abc"


def test_another_kick_descriptor_is_heard_and_the_old_one_is_not(tmp_path):
    with plugged(Echo(), tmp_path / "sock") as (_, frontend, queue):
        assert echoed(queue) == [b"abc"]
        old, queue.kick_fd = queue.kick_fd, os.eventfd(0, os.EFD_NONBLOCK)
        assert frontend.tell("SET_VRING_KICK", VringFile(0, True), [queue.kick_fd]) == 0
        eventfd.drain(old)  # of the kick that was not needed for the first
        os.eventfd_write(old, 1)
        assert echoed(queue) == [b"abc"]
        assert eventfd.drain(old)
        os.close(old)


def nowhere(frontend, queue):
    return frontend.tell("SET_VRING_ADDR", NOWHERE)


def other_memory(frontend, queue):
    region = MemRegion(0, queue.ram.size, 1 << 40, 0)
    return frontend.tell("SET_MEM_TABLE", MemTable((region,)), [queue.ram.fd])


def no_memory(frontend, queue):
    return frontend.tell("REM_MEM_REG", SingleRegion(0, queue.ram.size, USER_BASE, 0))


@pytest.mark.parametrize("lose", [nowhere, other_memory, no_memory])
@pytest.mark.parametrize("make", [Noting, lambda: Echo(2, 16)])
def test_a_ring_that_is_lost_has_no_thread_again(tmp_path, make, lose):
    with plugged(make(), tmp_path / "sock") as (bench, frontend, queue):
        running = threads()
        assert lose(frontend, queue) == 1
        for change in CHANGES.values():
            change(frontend, queue)
        assert frontend.tell("SET_VRING_ENABLE", VringState(0, 1)) in (0, 1)
        if make is Noting:
            assert bench.device.calls == ["start", "stop"]
        else:
            until(lambda: threads() == running - 1)


def test_all_rings_are_lost_with_their_memory(tmp_path):
    """The first of them is not the only one."""
    with plugged(Noting(), tmp_path / "sock") as (bench, frontend, queue):
        assert frontend.start(1, bench.queue()) == 0
        assert other_memory(frontend, queue) == 1
        assert not bench.device.within
