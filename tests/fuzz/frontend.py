"""A whole frontend on a real socket, whose peer has said everything in advance.

What the peer says is made of the input; it never waits for a question, so that a run needs no second
thread and no time.  What the frontend sends is read in between, for the descriptor of the backend's
own requests, which are made of the input too.
"""

from __future__ import annotations

import array
import os
import socket

from fuzz.source import Input, answer, descriptors

from pyvmm.errors import ConfigError, ProtocolError
from pyvmm.layout import RamRange
from pyvmm.loop import EventLoop
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.vhost_user.memory import GuestRam
from pyvmm.vhost_user.messages import BACKEND_REQUESTS, FRONTEND_REQUESTS, HEADER
from pyvmm.virtio import kinds
from pyvmm.virtio.queue import QueueSetup

KINDS = ("rng", "fs", "input", "scsi", "blk")
RAM = GuestRam(os.memfd_create("ram"), (RamRange(0, 1 << 20, 0), RamRange(1 << 32, 1 << 20, 1 << 20)))
os.ftruncate(RAM.fd, 2 << 20)
KICK, CALL = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
OWN_REQUEST = 21  # SET_BACKEND_REQ_FD


class Backend:
    """The peer's end of the connection."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        for sock in (self.ours, self.theirs):
            sock.setblocking(False)
        self.requests: socket.socket | None = None
        self._given = False

    def connect(self, timeout: float) -> socket.socket:
        """For Frontend: once."""
        if self._given:
            raise ConfigError("the backend is gone")
        self._given = True
        return self.theirs

    def speak(self, source: Input) -> None:
        """Send what the input says, until it says nothing."""
        for _ in range(source.byte() % 64):
            _send(self.ours, *answer(source, FRONTEND_REQUESTS))

    def ask(self, source: Input) -> None:
        """Send requests of the backend's own, if there is a way."""
        count = source.byte() % 16
        if self.requests is not None:
            for _ in range(count):
                data, fds = answer(source, BACKEND_REQUESTS)
                if source.byte() & 1:  # as a request that wants an ack
                    data = data[:4] + b"\x09\0\0\0" + data[8:]
                _send(self.requests, data, fds)

    def hear(self) -> None:
        """Read what the frontend sent and keep the descriptor for requests."""
        while True:
            try:
                data, ancillary, _, _ = self.ours.recvmsg(4096, socket.CMSG_SPACE(4 * 32))
            except OSError:
                return
            fds = [fd for _, _, part in ancillary for fd in array.array("i", part)]
            if fds and self.requests is None and _sends_own(data):
                self.requests = socket.socket(fileno=fds.pop())
                self.requests.setblocking(False)
            for fd in fds:
                os.close(fd)
            if not data:
                return

    def close(self) -> None:
        """All three."""
        self.hear()
        self.ours.close()
        self.theirs.close()
        if self.requests is not None:
            self.requests.close()


class Mapper:
    """Where shared memory is shown: it knows that what it is told to map fits."""

    def __init__(self, sizes: dict[int, int]) -> None:
        self.sizes = sizes
        self.mapped: dict[tuple[int, int], int] = {}

    def map(self, shmid: int, offset: int, fd: int, fd_offset: int, length: int, writable: bool) -> None:
        """As a guest's memory would."""
        assert length > 0 and offset + length <= self.sizes[shmid] and not (offset | length) % 4096
        assert fd_offset + length <= os.fstat(fd).st_size
        for (other, start), extent in self.mapped.items():
            assert other != shmid or offset + length <= start or start + extent <= offset
        self.mapped[shmid, offset] = length

    def unmap(self, shmid: int, offset: int) -> None:
        """Something that is there."""
        del self.mapped[shmid, offset]

    def intact(self, shmid: int, offset: int) -> bool:
        """Nothing is ever cut short here."""
        return (shmid, offset) in self.mapped


def _sends_own(data: bytes) -> bool:
    """Whether SET_BACKEND_REQ_FD, which has no payload, comes last: the kernel ends a read there."""
    return len(data) >= HEADER.size and HEADER.unpack(data[-HEADER.size :])[0] == OWN_REQUEST


def _send(sock: socket.socket, data: bytes, count: int) -> None:
    fds = descriptors(count)
    try:
        if data:
            socket.send_fds(sock, [data], fds)
    except OSError:
        return
    finally:
        for fd in fds:
            os.close(fd)


def play(source: Input) -> None:
    """Open, start, read, write, stop: each step after more words of the peer."""
    what = source.byte()
    backend = Backend()
    kind = kinds.by_name(KINDS[what % len(KINDS)])
    assert kind is not None
    with EventLoop() as loop:
        try:
            backend.speak(source)
            frontend = Frontend(backend.connect, kind, (64,) * kind.min_queues, None, RAM, loop, 0.0, "dev")
            try:
                _drive(source, backend, frontend, loop)
            finally:
                frontend.close()
        finally:
            backend.close()


def _drive(source: Input, backend: Backend, frontend: Frontend, loop: EventLoop) -> None:
    lost: list[str] = []
    frontend.on_lost = lost.append
    mapper = Mapper(dict(frontend.shared_memory))
    frontend.mappings.attach(mapper)
    frontend.start_watching()
    backend.hear()
    while source:
        what = source.byte()
        backend.speak(source)
        backend.ask(source)
        _step(what, source, frontend)
        backend.hear()
    loop.call_later(0, loop.stop)
    loop.run()
    assert len(frontend.mappings) == len(mapper.mapped)
    frontend.mappings.attach(None)
    assert not mapper.mapped and len(lost) <= 1
    assert not any("\n" in reason for reason in lost)


def _step(what: int, source: Input, frontend: Frontend) -> None:
    if what % 5 == 0:
        offset = source.byte()
        assert len(frontend.read_config(offset, 4)) == 4
    elif what % 5 == 1:
        frontend.write_config(source.byte(), source.take(1 << (what >> 6)) or b"\0")
    elif what % 5 == 2:
        frontend.reset()
    else:
        try:
            if what % 5 == 3:
                frontend.activate(frontend.features, [_queue(i) for i in range(what >> 6)])
            else:
                frontend.set_call(what >> 6, CALL)
        except ProtocolError:
            return


def _queue(index: int) -> QueueSetup:
    base = 0x1000 + 0x4000 * index
    return QueueSetup(index, 64, base, base + 0x1000, base + 0x2000, KICK, CALL)
