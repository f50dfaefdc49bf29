"""What a backend behind a proxy should not do costs the frontend's connection, never the proxy."""

from __future__ import annotations

import os
import socket

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.census import leaves_nothing
from fakes.ring_driver import receive_backend_request
from native.backend.test_connection import Bench, Upper, check_works
from native.backend.test_ends import Windowed

from pyvmm.backend import connection, relay
from pyvmm.backend.local import DeviceThread
from pyvmm.backend.proxy import Proxy

ENDS = (EOFError, ConnectionError)


class Lying(Upper):
    """Gives back chains that it does not have, as many and as often as `lie` wants."""

    def __init__(self, at_the_end, count):
        super().__init__()
        self.at_the_end, self.count = at_the_end, count
        self.honest = False

    def on_queue(self, queue):
        if self.honest:
            super().on_queue(queue)
        elif not self.at_the_end:
            self.lie(queue)

    def on_stop(self, queue):
        if not self.honest:
            self.lie(queue)

    def lie(self, queue):
        for chain in queue:
            queue.keep(chain)
        for number in range(self.count):
            queue.ring.use(queue.size + number, 1)
        queue.notify()


@pytest.fixture
def benches(tmp_path):
    """A device behind a proxy, both at sockets."""
    running = []

    def benches(device):
        behind = Bench(device, str(tmp_path / "behind"))
        running.append(behind)
        running.append(Bench(Proxy(behind.path), str(tmp_path / "sock")))
        return running

    with leaves_nothing():
        yield benches
        for bench in reversed(running):
            bench.close()


@pytest.mark.parametrize("count", [1, 3, 17])
@pytest.mark.parametrize("at_the_end", [False, True])
def test_chains_that_the_backend_does_not_have(benches, at_the_end, count):
    """17 are more than the ring has room for."""
    behind, proxy = benches(Lying(at_the_end, count))
    for how in ("ask", "close"):
        frontend, queue = proxy.ready(), proxy.queue()
        frontend.start(0, queue)
        for _ in range(3):
            queue.add([], [1])
        queue.kick()
        if how == "ask":
            with pytest.raises(ENDS):
                frontend.stop(0) if at_the_end else frontend.receive()
        else:
            frontend.close()
    behind.device.honest = True
    check_works(proxy.ready(), proxy.queue(event_idx=True))


class Cut(Upper):
    """Begins a request of its own, with a descriptor, and says no more."""

    def on_queue(self, queue):
        for _ in queue:
            fd = os.memfd_create("half a request")
            self.connection._backend_channel.send(b"\1", [fd])
            os.close(fd)


def test_half_a_request_of_the_backend_is_forgotten_whole(benches):
    """`benches` counts descriptors."""
    _, proxy = benches(Cut())
    for _ in range(3):
        frontend, queue = proxy.ready(), proxy.queue(event_idx=True)
        with frontend.backend_channel():
            frontend.start(0, queue)
            queue.add([b"abc"], [3])
            queue.kick()
            assert queue.wait()
            frontend.close()


@pytest.mark.parametrize("how", ["closes", "has another channel"])
def test_a_frontend_that_does_not_answer_the_backend_is_not_waited_for(benches, how, monkeypatch):
    """Neither when it goes, nor when it has its requests sent elsewhere."""
    for module in (connection, relay):
        monkeypatch.setattr(module, "SECONDS", 100.0)
    _, proxy = benches(Windowed())
    for _ in range(2):
        frontend, queue = proxy.ready(), proxy.queue(event_idx=True)
        with frontend.backend_channel() as channel:
            frontend.start(0, queue)
            queue.add([b"abc"], [3])
            queue.kick()
            request = receive_backend_request(channel)
            assert request.request.name == "SHMEM_MAP"
            request.close()
            if how != "closes":
                frontend.send("SET_BACKEND_REQ_FD", None, [channel.fileno()])
                with pytest.raises(ENDS):  # as the backend hears that there is no answer
                    frontend.receive()
            frontend.close()


def test_a_backend_with_too_many_clients_is_not_waited_for(tmp_path):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "full"))
    listener.listen(0)
    waiting = []
    while True:
        waiting.append(socket.socket(socket.AF_UNIX))
        waiting[-1].setblocking(False)
        if waiting[-1].connect_ex(str(tmp_path / "full")):
            break
    with DeviceThread(Proxy(str(tmp_path / "full"))) as thread:
        thread.socket.settimeout(10)
        assert thread.socket.recv(1) == b""
    for sock in (listener, *waiting):
        sock.close()
