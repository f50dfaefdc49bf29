"""Serving in a thread, state transfers, NumPy views."""

from __future__ import annotations

import os
import struct
import sys
import threading

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.ring_driver import DriverQueue, Ram, RawFrontend, receive_one

from pyvmm.backend import ConfigSpace, Device, DeviceThread
from pyvmm.vhost_user.payloads import U64, Config, DeviceState


class Driver:
    """A frontend with one running queue."""

    def __init__(self, sock, size=16):
        self.ram = Ram()
        self.queue = DriverQueue(self.ram, size, event_idx=True)
        self.frontend = RawFrontend(sock)
        self.protocol = self.frontend.negotiate()
        self.frontend.share(self.ram)
        assert self.frontend.start(0, self.queue) == 0

    def ask(self, out, room):
        self.queue.add(out, room)
        self.queue.kick()
        return self.queue.wait(20)[0][1]

    def close(self):
        self.frontend.close()
        self.queue.close()
        self.ram.close()


class Upper(Device):
    device_id = 63
    queue_sizes = (16,)

    def on_queue(self, queue):
        for chain in queue:
            chain.write(chain.read().upper())


class Broken(Upper):
    def on_queue(self, queue):
        for _ in queue:
            raise ZeroDivisionError("a bug")


def trip(driver):
    driver.queue.add([b"x"])
    driver.queue.kick()
    with pytest.raises((EOFError, ConnectionError)):
        driver.frontend.receive()


def test_thread():
    with DeviceThread(Upper()) as thread:
        driver = Driver(thread.take_socket())
        assert driver.ask([b"in process"], [10]) == b"IN PROCESS"
        seen = threading.Event()
        thread.call(seen.set)
        assert seen.wait(10)
        driver.close()


def test_bug_in_a_device_is_raised_by_the_thread():
    thread = DeviceThread(Broken())
    driver = Driver(thread.take_socket())
    trip(driver)
    driver.close()
    with pytest.raises(ZeroDivisionError):
        thread.close()
    thread.close()


class Misfit(Upper):
    """Gives as many bytes of its configuration space as it is told to."""

    def __init__(self, size):
        super().__init__()
        self.config = ConfigSpace([("word", 4)])
        self.size = size

    def on_config_read(self, offset, size):
        return bytes(self.size)


@pytest.mark.parametrize("size", [0, 2, 5])
def test_configuration_of_another_length_is_a_bug_in_the_device(size):
    thread = DeviceThread(Misfit(size))
    driver = Driver(thread.take_socket())
    with pytest.raises((EOFError, ConnectionError)):
        driver.frontend.ask("GET_CONFIG", Config(0, 0, bytes(4)))
    driver.close()
    with pytest.raises(ValueError, match=f"Misfit.on_config_read gave {size} bytes, not 4"):
        thread.close()


# -- state -------------------------------------------------------------------------------------


class Counter(Device):
    """Counts chains; that is its state."""

    device_id = 63
    queue_sizes = (16,)
    size = 0  # how much more to save

    def __init__(self):
        super().__init__()
        self.count = 0

    def on_queue(self, queue):
        for chain in queue:
            self.count += 1
            chain.write(struct.pack("<I", self.count))

    def save_state(self):
        return struct.pack("<I", self.count) + bytes(self.size)

    def load_state(self, data):
        if len(data) < 4:
            raise ValueError("too short")
        self.count = struct.unpack_from("<I", data)[0]


def transfer(frontend, direction, fd, phase=0):
    frontend.send("SET_DEVICE_STATE_FD", DeviceState(direction, phase), [fd])
    os.close(fd)
    message = receive_one(frontend.sock, frontend.replies)
    assert not message.fds
    return message.payload


def saved(frontend):
    reader, writer = os.pipe()
    assert transfer(frontend, 0, writer) == U64(0x100)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    assert frontend.ask("CHECK_DEVICE_STATE") == U64(0)
    return data


def loaded(frontend, data):
    reader, writer = os.pipe()
    assert transfer(frontend, 1, reader) == U64(0x100)
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(data)
    return frontend.ask("CHECK_DEVICE_STATE")


@pytest.mark.parametrize("size", [0, 300_000])
def test_state_goes_from_one_instance_to_another(size):
    device = Counter()
    device.size = size
    with DeviceThread(device) as first, DeviceThread(Counter()) as second:
        one, two = Driver(first.take_socket()), Driver(second.take_socket())
        for _ in range(5):
            one.ask([], [4])
        one.frontend.stop(0)
        two.frontend.stop(0)
        data = saved(one.frontend)
        assert len(data) == 4 + size
        assert loaded(two.frontend, data) == U64(0)
        two.queue.reset()
        two.frontend.start(0, two.queue)
        assert two.ask([], [4]) == struct.pack("<I", 6)
        one.close()
        two.close()


def test_state_through_a_file_and_a_non_blocking_pipe():
    with DeviceThread(Counter()) as thread:
        driver = Driver(thread.take_socket())
        driver.frontend.stop(0)
        file = os.memfd_create("state")
        assert transfer(driver.frontend, 0, os.dup(file)) == U64(0x100)
        assert driver.frontend.ask("CHECK_DEVICE_STATE") == U64(0)
        assert os.pread(file, 10, 0) == bytes(4)
        os.close(file)
        reader, writer = os.pipe2(os.O_NONBLOCK)
        assert transfer(driver.frontend, 1, reader) == U64(0x100)
        os.write(writer, bytes(4))
        os.close(writer)
        assert driver.frontend.ask("CHECK_DEVICE_STATE") == U64(0)
        driver.close()


def test_state_that_cannot_be():
    with DeviceThread(Counter()) as thread:
        driver = Driver(thread.take_socket())
        frontend = driver.frontend
        assert transfer(frontend, 0, os.memfd_create("state")) == U64(0x101)  # the queue runs
        frontend.stop(0)
        assert frontend.ask("CHECK_DEVICE_STATE") == U64(1)  # nothing to check
        assert loaded(frontend, b"abc") == U64(1)
        reader, writer = os.pipe()
        assert transfer(frontend, 0, reader) == U64(0x100)  # cannot be written
        assert frontend.ask("CHECK_DEVICE_STATE") == U64(1)
        os.close(writer)
        with pytest.raises((EOFError, ConnectionError)):
            transfer(frontend, 0, os.memfd_create("state"), phase=7)
        driver.close()


def test_device_without_state_does_not_offer_it():
    with DeviceThread(Upper()) as thread:
        frontend = RawFrontend(thread.take_socket())
        frontend.number("GET_FEATURES")
        assert not frontend.number("GET_PROTOCOL_FEATURES") >> 19 & 1


# -- NumPy -------------------------------------------------------------------------------------


class Doubler(Device):
    device_id = 63
    queue_sizes = (16,)

    def on_queue(self, queue):
        import numpy

        for chain in queue:
            source, target = chain.readable_array("<f4"), chain.writable_array("<f4")
            assert not source.flags.owndata and not source.flags.writeable
            numpy.multiply(source, 2, out=target)
            chain.wrote(target.nbytes)


def test_arrays_are_the_guest_memory():
    numpy = pytest.importorskip("numpy")
    with DeviceThread(Doubler()) as thread:
        driver = Driver(thread.take_socket())
        values = numpy.arange(1000, dtype="<f4")
        answer = driver.ask([values.tobytes()], [4000])
        assert (numpy.frombuffer(answer, "<f4") == values * 2).all()
        driver.close()


def test_arrays_of_several_places(tmp_path):
    numpy = pytest.importorskip("numpy")
    vring = sys.modules["pyvmm._native.vring"]
    ram = Ram()
    queue = DriverQueue(ram)
    at = ram.alloc(256)
    ram.data[at : at + 64] = bytes(range(64))
    queue.add_rows([(at, 8, 0), (at + 8, 8, 0), (at + 32, 4, 0), (at + 64, 8, 2), (at + 72, 8, 2)])
    memory = vring.GuestMemory([(0, 1 << 40, ram.data)])
    ring = vring.VRing(memory, 16, *((1 << 40) + place for place in (queue.desc, queue.avail, queue.used)))
    chain = ring.pop()
    assert [list(part) for part in chain.readable_arrays()] == [list(range(16)), list(range(32, 36))]
    assert chain.writable_array("<u4").shape == (4,)  # neighbours are one
    with pytest.raises(ValueError, match="2 places"):
        chain.readable_array()
    chain.writable_array("<u4")[:] = 7
    assert ram.data[at + 64 : at + 80] == numpy.full(4, 7, "<u4").tobytes()
    chain.skip(16)
    assert list(chain.readable_array()) == list(range(32, 36))
    chain.skip(4)
    assert chain.readable_array("<u2").shape == (0,)
    chain.wrote(1)
    with pytest.raises(ValueError, match="multiple"):
        chain.writable_array("<u4")
    queue.close()
