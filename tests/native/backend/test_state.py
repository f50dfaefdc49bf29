"""Descriptors for a device's state that lead nowhere: nobody is waited for, and nothing is left."""

from __future__ import annotations

import fcntl
import gc
import os
import threading
import weakref

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.census import leaves_nothing
from native.backend.test_connection import Bench
from native.backend.test_serving import Counter, transfer

from pyvmm.backend import connection, state
from pyvmm.vhost_user.payloads import U64

SAVE, LOAD = 0, 1
MORE = 1 << 20  # bytes: more than a pipe takes


def pipe(direction):
    """The backend's end of a pipe, and ours, which does nothing."""
    reader, writer = os.pipe()
    return (writer, reader) if direction == SAVE else (reader, writer)


def made_blocking(fd):
    """As a frontend that kept a copy of the backend's end can have it, at any time."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)


def moving():
    """Threads that move state."""
    return [thread for thread in threading.enumerate() if thread.name == "state"]


@pytest.fixture
def bench(tmp_path):
    device = Counter()
    device.size = MORE
    with leaves_nothing():
        bench = Bench(device, str(tmp_path / "sock"))
        yield bench
        bench.close()


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_a_transfer_ends_with_its_connection(bench, direction, blocking):
    for _ in range(3):
        frontend = bench.ready()
        theirs, ours = pipe(direction)
        copy = os.dup(theirs)
        assert transfer(frontend, direction, theirs) == U64(0x100)
        if blocking:
            made_blocking(copy)
        frontend.close()
        bench.ready().close()  # served once the one before is gone
        assert moving() == []
        for fd in (ours, copy):
            os.close(fd)


@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_a_transfer_that_does_not_move_fails(bench, direction, monkeypatch):
    monkeypatch.setattr(state, "SECONDS", 0.2)
    frontend = bench.ready()
    for _ in range(3):
        theirs, ours = pipe(direction)
        assert transfer(frontend, direction, theirs) == U64(0x100)
        assert frontend.ask("CHECK_DEVICE_STATE") == U64(1)
        assert moving() == []
        os.close(ours)


def test_more_state_than_there_can_be(bench, monkeypatch):
    monkeypatch.setattr(state, "MOST", 1 << 20)
    frontend = bench.ready()
    assert transfer(frontend, LOAD, os.open("/dev/zero", os.O_RDONLY)) == U64(0x100)
    assert frontend.ask("CHECK_DEVICE_STATE") == U64(1)


@pytest.mark.parametrize("flags", [os.O_PATH, os.O_RDONLY | os.O_DIRECTORY])
@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_what_cannot_be_read_or_written(bench, direction, flags):
    frontend = bench.ready()
    assert transfer(frontend, direction, os.open("/tmp", flags)) == U64(0x100)
    assert frontend.ask("CHECK_DEVICE_STATE") == U64(1)


def test_the_bytes_go_with_the_connection_and_not_with_the_collector(bench, monkeypatch):
    made = []

    def make(*arguments):
        transfer = state.Transfer(*arguments)
        made.append(weakref.ref(transfer))
        return transfer

    monkeypatch.setattr(connection, "Transfer", make)
    gc.disable()
    try:
        frontend = bench.ready()
        assert transfer(frontend, LOAD, os.open("/dev/null", os.O_RDONLY)) == U64(0x100)
        frontend.close()
        bench.ready().close()
        assert [held() for held in made] == [None]
    finally:
        gc.enable()
