"""Packed rings from pyvmm's frontend to our own backend, with a driver that speaks them."""

from __future__ import annotations

import os
import select

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.backend import FakeKind, no_new_fds
from fakes.packed_driver import PackedQueue
from fakes.ring_driver import DriverQueue, Ram

from pyvmm.backend import DeviceThread
from pyvmm.backend.echo import Echo
from pyvmm.layout import RamRange
from pyvmm.loop import EventLoop
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.vhost_user.memory import GuestRam
from pyvmm.virtio.queue import QueueSetup

PACKED, EVENT_IDX, VERSION_1 = 1 << 34, 1 << 29, 1 << 32


def wait(queue):
    poll = select.poll()
    poll.register(queue.call_fd, select.POLLIN)
    while not (done := queue.collect()):
        assert poll.poll(10_000), "no interrupt came"
        os.eventfd_read(queue.call_fd)
    return done


@pytest.mark.parametrize("kind", [PackedQueue, DriverQueue])
@pytest.mark.parametrize("native", [True, False])
def test_bytes_come_back_after_each_start(kind, native):
    """Several rounds of the ring, and several resets, after each of which it begins anew."""
    with no_new_fds():
        ram, loop = Ram(8 << 20), EventLoop()
        with DeviceThread(Echo(native=native, size=16)) as thread:
            socket = thread.take_socket()
            memory = GuestRam(ram.fd, (RamRange(0, ram.size, 0),))
            frontend = Frontend(lambda _: socket, FakeKind(device_id=63), (16,), None, memory, loop)
            assert frontend.features & PACKED
            queue = kind(ram, 16)
            packed = PACKED if kind is PackedQueue else 0
            for start in range(3):
                queue.reset()
                setup = QueueSetup(0, 16, queue.desc, queue.avail, queue.used, queue.kick_fd, queue.call_fd)
                frontend.activate(VERSION_1 | packed, [setup])
                for turn in range(50):
                    text = b"start %d turn %d" % (start, turn)
                    queue.add([text], [64])
                    queue.kick()
                    assert [data for _, data in wait(queue)] == [text]
                frontend.reset()
            frontend.close()
        queue.close()
        loop.close()
        ram.close()
