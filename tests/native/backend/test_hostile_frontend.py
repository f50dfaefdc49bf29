"""Descriptors that no frontend should send: each costs its connection, never the process, never a hang."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import time
from itertools import pairwise

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from native.backend.test_connection import Bench, Upper

from pyvmm.backend import memory
from pyvmm.backend.echo import Echo
from pyvmm.errors import RemoteProtocolError
from pyvmm.vhost_user.payloads import Inflight, MemRegion, MemTable, VringFile

FULL = (1 << 64) - 2


@pytest.fixture(params=[Upper, lambda: Echo(2, 16)], ids=["python", "native"])
def bench(tmp_path, request):
    """A device that gives back capitals as they are."""
    bench = Bench(request.param(), str(tmp_path / "sock"))
    yield bench
    bench.close()


def check_works(bench):
    """The next frontend is served."""
    frontend, queue = bench.ready(), bench.queue()
    assert frontend.start(0, queue) == 0
    queue.add([b"HELLO"], [8])
    queue.kick()
    assert queue.wait()[0][1] == b"HELLO"


def until(condition, seconds=10.0):
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never comes"
        time.sleep(0.0001)


def only_a_path():
    return os.open("/etc/passwd", os.O_PATH)


def file():
    return os.open("/etc/passwd", os.O_RDONLY)


def zeros():
    return os.open("/dev/zero", os.O_RDWR)


def nothing():
    return os.open("/dev/null", os.O_RDWR)


def pipe():
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def peer():
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


def nested_epolls():
    """So many that one more does not go (ELOOP)."""
    chain = [select.epoll() for _ in range(5)]
    for inner, outer in pairwise(chain):
        outer.register(inner.fileno(), select.EPOLLIN)
    return os.dup(chain[-1].fileno())


NO_FILES = [only_a_path, zeros, nothing, pipe, peer, nested_epolls]


def costs_the_connection(bench, fd, name, payload):
    frontend = bench.ready()
    with pytest.raises((EOFError, ConnectionError)):
        frontend.tell(name, payload, [fd])
        frontend.number("GET_FEATURES")
    os.close(fd)
    check_works(bench)


@pytest.mark.parametrize("name", ["SET_VRING_KICK", "SET_VRING_CALL", "SET_VRING_ERR"])
@pytest.mark.parametrize("make", [*NO_FILES, file])
def test_what_is_no_eventfd(bench, name, make):
    costs_the_connection(bench, make(), name, VringFile(0, True))


def virtual_cpu():
    """Its mapping has a few pages, whatever is asked for."""
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"/dev/kvm: {error.strerror}")
    machine = fcntl.ioctl(kvm, 0xAE01, 0)  # KVM_CREATE_VM
    cpu = fcntl.ioctl(machine, 0xAE41, 0)  # KVM_CREATE_VCPU
    os.close(machine)
    os.close(kvm)
    return cpu


@pytest.mark.parametrize("offset", [0, 1 << 40])
@pytest.mark.parametrize("make", [*NO_FILES, virtual_cpu, lambda: os.memfd_create("empty")])
def test_memory_in_what_is_no_file(bench, make, offset):
    region = MemRegion(0, 1 << 20, 0, offset)
    costs_the_connection(bench, make(), "SET_MEM_TABLE", MemTable((region,)))


@pytest.mark.parametrize("make", [*NO_FILES, virtual_cpu, lambda: os.memfd_create("empty")])
def test_in_flight_area_in_what_is_no_file(bench, make):
    costs_the_connection(bench, make(), "SET_INFLIGHT_FD", Inflight(1 << 20, 0, 2, 16))


def test_memory_on_a_dax_device_is_as_long_as_sysfs_says(tmp_path, monkeypatch):
    """With /dev/zero, which can be mapped like one, in its place."""
    monkeypatch.setattr(memory, "CHARACTER_DEVICES", str(tmp_path))
    (tmp_path / "1:5").mkdir()
    (tmp_path / "1:5" / "subsystem").symlink_to("../../bus/dax")
    (tmp_path / "1:5" / "size").write_text("8192\n")
    with open("/dev/zero", "r+b") as zero:
        assert len(memory.map_file(zero.fileno(), 0, 8192, "it")) == 8192
        with pytest.raises(RemoteProtocolError, match="0x2000 bytes"):
            memory.map_file(zero.fileno(), 4096, 8192, "it")


def test_two_queues_with_one_kick_descriptor_that_blocks(tmp_path):
    """In one thread the second finds nothing more, and is served all the same."""
    bench = Bench(Upper(), str(tmp_path / "sock"))
    frontend, first, second = bench.ready(), bench.queue(), bench.queue()
    for queue in (first, second):
        os.close(queue.kick_fd)
        queue.kick_fd = os.eventfd(0)
    os.dup2(first.kick_fd, second.kick_fd)
    frontend.start(0, first)
    frontend.start(1, second)
    first.add([b"A"], [1])
    second.add([b"B"], [1])
    first.kick()
    assert first.wait()[0][1] == b"A"
    assert second.wait()[0][1] == b"B"
    bench.close()


def test_threads_with_one_kick_descriptor_that_blocks(tmp_path):
    """Both see a kick and one gets it: the other must not wait for the next where nothing stops it."""
    bench = Bench(Echo(2, 16), str(tmp_path / "sock"))
    frontend, first, second = bench.ready(), bench.queue(), bench.queue()
    for queue in (first, second):
        os.close(queue.kick_fd)
        queue.kick_fd = os.eventfd(0)
    os.dup2(first.kick_fd, second.kick_fd)
    for _ in range(300):
        frontend.start(0, first)
        frontend.start(1, second)
        for _ in range(20):
            first.kick()
        frontend.stop(0)
        frontend.stop(1)
    bench.close()


@pytest.mark.parametrize(("name", "breaks"), [("SET_VRING_CALL", False), ("SET_VRING_ERR", True)])
def test_a_full_counter_that_blocks_is_not_waited_for(bench, name, breaks):
    frontend, queue = bench.ready(), bench.queue()
    full = os.eventfd(0)
    os.eventfd_write(full, FULL)
    assert frontend.start(0, queue) == 0
    assert frontend.tell(name, VringFile(0, True), [full]) == 0
    queue.add([b"a"], [1])
    if breaks:
        queue.offer(queue.size)
    queue.kick()
    until(queue.collect)
    frontend.close()
    check_works(bench)
    assert os.eventfd_read(full) in (FULL, 1)  # 1: it was emptied for a thread that waited
    os.close(full)
