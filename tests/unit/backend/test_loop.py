"""The backends' event loop: writers beside readers."""

from __future__ import annotations

import os
import socket

import pytest

from pyvmm.backend.loop import DeviceLoop, Watch, can_poll


@pytest.fixture
def loop():
    with DeviceLoop() as loop:
        loop.call_later(10, loop.stop)
        yield loop


@pytest.fixture
def ends():
    first, second = socket.socketpair()
    for end in (first, second):
        end.setblocking(False)
    with first, second:
        yield first, second


def fill(sock):
    try:
        while True:
            sock.send(b"x" * 65536)
    except BlockingIOError:
        return


def test_writer_waits_for_room(loop, ends):
    ours, theirs = ends
    fill(ours)
    seen = []
    loop.add_writer(ours.fileno(), lambda: (seen.append("room"), loop.stop()))
    loop.call_later(0.05, lambda: (seen.append("read"), theirs.recv(1 << 20)))
    loop.run()
    assert seen == ["read", "room"]


def test_reader_and_writer_of_one_descriptor(loop, ends):
    ours, theirs = ends
    seen = set()

    def note(what):
        seen.add(what)
        if len(seen) == 2:
            loop.stop()

    loop.add_reader(ours.fileno(), lambda: note("read"))
    loop.add_writer(ours.fileno(), lambda: note("write"))
    theirs.send(b"x")
    loop.run()
    assert seen == {"read", "write"}
    loop.remove_reader(ours.fileno())


def test_removed_writer_is_silent_and_closed(loop, ends):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        loop.add_writer(ends[0].fileno(), lambda: pytest.fail("it was removed"))
    loop.remove_writer(ends[0].fileno())
    loop.remove_writer(ends[0].fileno())
    assert len(os.listdir("/proc/self/fd")) == before
    loop.call_later(0.02, loop.stop)
    loop.run()


def test_watch_for_a_hang_up_only(loop, ends):
    ours, theirs = ends
    seen = []
    watch = Watch(loop, ours.fileno(), 0, lambda: (seen.append("gone"), loop.stop()))
    theirs.send(b"data alone is no reason")
    loop.call_later(0.05, lambda: (seen.append("closing"), theirs.close()))
    loop.run()
    assert seen == ["closing", "gone"]
    watch.close()
    watch.close()


def test_what_epoll_refuses(tmp_path, ends):
    with open(tmp_path / "file", "wb") as file, open(os.devnull, "rb") as null:
        assert not can_poll(file.fileno())
        assert not can_poll(null.fileno())
    assert can_poll(ends[0].fileno())
