"""A device in Python fills its shared memory regions; the frontend is pyvmm's, or a machine's."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.backend import FakeKind, Surroundings, no_new_fds

from pyvmm.backend import Device, DeviceThread, SharedMemory
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.vhost_user.messages import ProtocolFeature as P
from pyvmm.virtio.queue import QueueSetup

PAGE = 0x1000


class Window(Device):
    """A file in region 2, mapped on demand."""

    device_id = 63
    queue_sizes = (8,)
    shared_memory = {2: 4 * PAGE, 9: PAGE}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.memory = SharedMemory(self)
        self.fd = os.memfd_create("window")
        os.ftruncate(self.fd, 8 * PAGE)
        os.pwrite(self.fd, struct.pack("<I", 0xC0DE), PAGE)
        self.resets = 0

    def close(self):
        os.close(self.fd)

    def on_queue(self, queue):
        """Nothing comes."""

    def on_reset(self):
        self.resets += 1
        self.memory.forget()

    on_disconnect = on_reset


class Map:
    """Notes what is mapped."""

    def __init__(self):
        self.there = {}

    def map(self, shmid, offset, fd, fd_offset, length, writable):
        self.there[shmid, offset] = (os.pread(fd, 4, fd_offset), length, writable)

    def unmap(self, shmid, offset):
        del self.there[shmid, offset]

    def intact(self, shmid, offset):
        return True


class Pair:
    """`device` behind a frontend of ours."""

    def __init__(self, device):
        self.device, self.map = device, Map()
        self.around = Surroundings()
        self.thread = DeviceThread(device)
        socket = self.thread.take_socket()
        self.frontend = Frontend(
            lambda _: socket, FakeKind(device_id=63), (8,), None, self.around.ram, self.around.loop, 5.0
        )
        self.frontend.mappings.attach(self.map)
        self.frontend.start_watching()
        self.around.run()

    def do(self, action):
        """Run `action` where the device lives; its result, or its exception."""
        done, result = threading.Event(), []

        def there():
            try:
                result.append(action())
            except Exception as error:
                result.append(error)
            done.set()

        self.thread.call(there)
        assert done.wait(30)
        return result[0]

    def close(self):
        self.around.stop()
        self.frontend.close()
        self.thread.close()
        self.around.close()


@pytest.fixture
def pair():
    with no_new_fds():
        pair = Pair(Window())
        yield pair
        pair.close()


def test_regions_and_mappings(pair):
    memory, fd = pair.device.memory, pair.device.fd
    assert pair.frontend.shared_memory == ((2, 4 * PAGE), (9, PAGE))
    assert pair.do(lambda: memory.map(2, PAGE, fd, 2 * PAGE, fd_offset=PAGE, writable=False)) is None
    assert pair.map.there == {(2, PAGE): (struct.pack("<I", 0xC0DE), 2 * PAGE, False)}
    assert pair.do(lambda: memory.unmap(2, PAGE)) is None
    assert pair.map.there == {}


def test_a_refusal_is_an_error_that_says_why(pair):
    memory, fd = pair.device.memory, pair.device.fd
    for arguments, number in (
        ((0, 0, fd, PAGE), errno.EINVAL),
        ((2, 0, fd, 5 * PAGE), errno.EINVAL),
        ((2, 1, fd, PAGE), errno.EINVAL),
    ):
        error = pair.do(lambda arguments=arguments: memory.map(*arguments))
        assert isinstance(error, OSError) and error.errno == number
    assert pair.do(lambda: memory.map(9, 0, fd, PAGE)) is None
    error = pair.do(lambda: memory.map(9, 0, fd, PAGE))
    assert error.errno == errno.EEXIST
    assert isinstance(pair.do(lambda: memory.unmap(9, PAGE)), KeyError)


def test_a_reset_empties_both_books(pair):
    memory, fd = pair.device.memory, pair.device.fd
    kick, call = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
    for cycle in range(3):
        pair.frontend.activate(1 << 32, [QueueSetup(0, 8, 0x1000, 0x2000, 0x3000, kick, call)])
        assert pair.do(lambda: memory.map(9, 0, fd, PAGE)) is None
        pair.frontend.reset()
        assert pair.map.there == {}
        assert pair.device.resets == cycle + 1
    os.close(kick)
    os.close(call)


def test_without_a_frontend(pair):
    pair.frontend.close()
    end = time.monotonic() + 10
    while pair.device.connection is not None:
        assert time.monotonic() < end
    with pytest.raises(OSError, match="no frontend is connected"):
        pair.device.memory.map(9, 0, pair.device.fd, PAGE)


def test_a_device_without_regions_offers_none():
    class Plain(Window):
        shared_memory = {}  # noqa: RUF012

    with no_new_fds():
        pair = Pair(Plain())
        offered = pair.frontend._link.client.negotiation.protocol_offered
        assert not offered & (P.SHMEM | P.BACKEND_SEND_FD)
        assert pair.frontend.shared_memory == ()
        error = pair.do(lambda: pair.device.memory.map(9, 0, pair.device.fd, PAGE))
        assert isinstance(error, OSError) and "SHMEM" in str(error)
        pair.close()
