"""Connections end alike whatever a device does at the end, and whoever wants that."""

from __future__ import annotations

import gc
import os

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.census import leaves_nothing, mappings
from fakes.ring_driver import DriverQueue, Ram, RawFrontend
from native.backend.test_connection import Bench, Upper, check_works

from pyvmm.backend import DeviceThread, SharedMemory
from pyvmm.errors import RemoteProtocolError

ENDS = (EOFError, ConnectionError)


class Bug(Exception):
    """Of the device."""


class Stopping(Upper):
    """Raises when its first queue stops."""

    def __init__(self, error):
        super().__init__()
        self.error, self.closed = error, False

    def on_stop(self, queue):
        super().on_stop(queue)
        if queue.index == 0:
            raise self.error

    def close(self):
        self.closed = True


def run_both(frontend, ram):
    """Share the memory and start two queues."""
    frontend.negotiate()
    frontend.share(ram)
    queues = [DriverQueue(ram, event_idx=True) for _ in range(2)]
    for index, queue in enumerate(queues):
        assert frontend.start(index, queue) == 0
    return queues


@pytest.mark.parametrize(
    "act", [lambda frontend: frontend.stop(0), lambda frontend: frontend.tell("RESET_DEVICE")]
)
def test_a_bug_at_the_end_of_a_queue_ends_the_serving_in_order(act):
    device = Stopping(Bug("no"))
    with leaves_nothing():
        thread, ram = DeviceThread(device), Ram()
        frontend = RawFrontend(thread.take_socket())
        queues = run_both(frontend, ram)
        with pytest.raises(ENDS):
            act(frontend)
        with pytest.raises(Bug):
            thread.close()
        for thing in (*queues, ram):
            thing.close()
    assert device.closed
    assert device.calls[-3:] == [("stop", 0), ("stop", 1), "disconnect"]


def test_a_bug_at_the_end_of_everything(tmp_path):
    device = Stopping(Bug("no"))
    with leaves_nothing():
        bench = Bench(device, str(tmp_path / "sock"))
        frontend = bench.connect()
        queues = run_both(frontend, bench.ram)
        bench.loop.stop()
        with pytest.raises(ENDS):
            frontend.receive()
        bench.thread.join()
        failure, bench.failure = bench.failure, None
        bench.close()
        for queue in queues:
            queue.close()
    assert isinstance(failure, Bug) and device.closed
    assert device.calls[-3:] == [("stop", 0), ("stop", 1), "disconnect"]


@pytest.mark.parametrize("how", ["stop", "close"])
def test_a_peer_that_a_device_finds_wrong_at_the_end_costs_the_connection(tmp_path, how, capfd):
    bench = Bench(Stopping(RemoteProtocolError("it lies")), str(tmp_path / "sock"))
    frontend = bench.connect()
    queues = run_both(frontend, bench.ram)
    if how == "stop":
        with pytest.raises(ENDS):
            frontend.stop(0)
    frontend.close()
    check_works(bench.ready(), bench.queue(event_idx=True))
    assert bench.device.calls.count(("stop", 0)) == bench.device.calls.count(("stop", 1)) == 1
    bench.close()
    for queue in queues:
        queue.close()
    assert capfd.readouterr().err.count("it lies\n") == 2  # at the end of the second, too


class Holding(Upper):
    """Has a ring in the frame that raises."""

    def on_stop(self, queue):
        ring = queue.ring
        if ring.running:
            raise RemoteProtocolError("it lies")


def test_the_memory_is_unmapped_with_the_connection_whatever_was_raised(tmp_path):
    """At once, and not when the garbage collector finds it."""
    bench = Bench(Holding(), str(tmp_path / "sock"))
    gc.disable()
    try:
        for _ in range(3):
            frontend = bench.connect()
            queues = run_both(frontend, bench.ram)
            frontend.close()
            bench.connect().number("GET_FEATURES")
            bench.frontends[-1].close()
            assert mappings()["/memfd:ring-driver (deleted)"] == 1  # the driver's own
            for queue in queues:
                queue.close()
    finally:
        gc.enable()
        bench.close()


class Windowed(Upper):
    """Maps a file for each kick, without a thought of what may go wrong."""

    shared_memory = {0: 4096}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.memory = SharedMemory(self)

    def on_queue(self, queue):
        if queue.ring.pending():
            fd = os.memfd_create("window")
            try:
                self.memory.map(0, 0, fd, 4096)
            finally:
                os.close(fd)

    def on_disconnect(self):
        self.memory.forget()


@pytest.mark.parametrize("early", [False, True])
def test_a_frontend_that_does_not_answer_the_device_costs_the_connection(tmp_path, early):
    bench = Bench(Windowed(), str(tmp_path / "sock"))
    for _ in range(2):
        frontend, queue = bench.ready(), bench.queue(event_idx=True)
        frontend.backend_channel().close()
        if early:
            queue.add([b"abc"], [3])
            with pytest.raises(ENDS):
                frontend.start(0, queue)
        else:
            frontend.start(0, queue)
            queue.add([b"abc"], [3])
            queue.kick()
            with pytest.raises(ENDS):
                frontend.receive()
    bench.close()


@pytest.mark.parametrize("early", [False, True])
def test_a_device_that_hangs_up_while_it_serves(tmp_path, early):
    bench = Bench(Upper(), str(tmp_path / "sock"))
    bench.device.on_queue = lambda queue: queue.ring.pending() and bench.device.connection.hang_up()
    for _ in range(2):
        frontend, queue = bench.ready(), bench.queue(event_idx=True)
        if early:
            queue.add([b"abc"], [3])
        else:
            frontend.start(0, queue)
            queue.add([b"abc"], [3])
            queue.kick()
        with pytest.raises(ENDS):
            frontend.start(0, queue)
            frontend.receive()
    del bench.device.on_queue
    check_works(bench.ready(), bench.queue(event_idx=True))
    bench.close()
