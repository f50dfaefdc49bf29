"""A proxy between a frontend and a backend that are both made of the input.

The backend has answered before it is asked, rightly or not, so that nobody waits.  In the rings in between,
which it has, it writes what it likes.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from fuzz import backend
from fuzz.backend import SIZE, Stage, perform
from fuzz.kinds import FULL
from fuzz.source import Input, answer
from fuzz.source import descriptors as files

from pyvmm.backend.proxy import Behind, Proxy, ProxyConnection
from pyvmm.vhost_user.channel import Channel
from pyvmm.vhost_user.codec import encode_ack, encode_reply, encode_request
from pyvmm.vhost_user.messages import BACKEND_REQUESTS, FRONTEND_REQUESTS
from pyvmm.vhost_user.messages import ProtocolFeature as P
from pyvmm.vhost_user.payloads import (
    U64,
    Config,
    Empty,
    Inflight,
    Payload,
    ShmemConfig,
    VringFile,
    VringState,
)

VIRTIO = 1 << 32 | 1 << 30 | 1
PROTOCOL = P.MQ | P.REPLY_ACK | P.BACKEND_REQ | P.CONFIG | P.RESET_DEVICE | P.CONFIGURE_MEM_SLOTS | P.SHMEM
REPLIES: dict[str, Payload] = {
    "GET_FEATURES": U64(VIRTIO),
    "GET_PROTOCOL_FEATURES": U64(PROTOCOL),
    "GET_QUEUE_NUM": U64(2),
    "GET_MAX_MEM_SLOTS": U64(32),
    "GET_CONFIG": Config(0, 0, bytes(8)),
    "GET_VRING_BASE": VringState(0, 0),
    "GET_SHMEM_CONFIG": ShmemConfig(1, (4096,) + (0,) * 255),
    "GET_INFLIGHT_FD": Inflight(0, 0, 0, 0),
}
PAYLOADS = {"SET_PROTOCOL_FEATURES": U64(PROTOCOL)}
A_CALL = encode_request(FRONTEND_REQUESTS.by_name["SET_VRING_CALL"], VringFile(0, True), 1)
GIVEN_BACK = 4096  # where a used ring begins in the memory in between


class Between(ProxyConnection):
    """Its backend is an end of a socket pair, and late as soon as it has not answered yet."""

    def _connected(self, path: str) -> Behind:
        assert isinstance(self.device, Misled)
        self.device.behind, sock = socket.socketpair()
        self.device.behind.setblocking(False)
        behind = Behind(Channel(sock), 0.0)
        behind.negotiation.lenient = True
        self.loop.add_reader(behind.channel.fileno(), self._on_lost)
        return behind


class Misled(Proxy):
    """A proxy to `behind`."""

    connection_class = Between
    behind: socket.socket

    def __init__(self) -> None:
        super().__init__("nowhere")


class BothEnds(Stage):
    """The backend's end, too: what it is sent is kept by what it is good for."""

    def __init__(self) -> None:
        self.device: Misled
        self.connection: Between
        super().__init__(Misled())
        self.source = Input(b"")
        self.rings = self.calls = -1
        self.requests: socket.socket | None = None

    def close(self) -> None:
        """Everything of the backend's, too."""
        super().close()
        self.listen()
        self.device.behind.close()
        for fd in (self.rings, self.calls):
            if fd >= 0:
                os.close(fd)
        if self.requests is not None:
            self.requests.close()

    def send(self, name: str, said: bytes, fds: list[int], ack: bool) -> None:
        """What the frontend sends is answered already, and only then is that out of turn."""
        self.watch(False)
        self.reply(name)
        super().send(name, said, fds, ack)
        self.watch(True)
        self.turn()
        self.listen()

    def watch(self, wanted: bool) -> None:
        """Have the proxy notice, or not, that the backend says something."""
        behind = self.connection.behind
        if self.connection.closed or behind is None:
            return
        if wanted:
            self.loop.add_reader(behind.channel.fileno(), self.connection._on_lost)
        else:
            self.loop.remove_reader(behind.channel.fileno())

    def reply(self, name: str) -> None:
        """Right, where the input does not say otherwise."""
        row, how = FRONTEND_REQUESTS.by_name[name], self.source.byte()
        data, count = b"", 0
        if how >= 0xC0:
            data, count = answer(self.source, FRONTEND_REQUESTS, row.id)
        elif name in REPLIES:
            data = encode_reply(row, REPLIES[name])
        elif self.acks and not row.reply:
            data = encode_ack(row, int(how >= 0xA0))
        self._send(self.device.behind, data, count)

    @property
    def acks(self) -> bool:
        """Whether the backend is to ack what has no reply."""
        behind = self.connection.behind
        return behind is not None and behind.negotiation.has(P.REPLY_ACK)

    def listen(self) -> None:
        """Keep what the proxy has sent: the memory in between, its call and the socket for requests."""
        with suppress(OSError):
            data = b"more"
            while data:
                data, fds, _, _ = socket.recv_fds(self.device.behind, 4096, 32)
                # the kernel ends a read after what came with descriptors
                calls = len(data) >= len(A_CALL) and data[-len(A_CALL) :].startswith(A_CALL[:4])
                for fd in fds:
                    self.keep(fd, calls)

    def keep(self, fd: int, calls: bool) -> None:
        """For later, or not at all."""
        kind = os.readlink(f"/proc/self/fd/{fd}")
        if "pyvmm-shadow" in kind:
            self.rings, fd = fd, self.rings
        elif calls and "eventfd" in kind:
            self.calls, fd = fd, self.calls
        elif kind.startswith("socket") and self.requests is None:
            self.requests, fd = socket.socket(fileno=fd), -1
            self.requests.setblocking(False)
        if fd >= 0:
            os.close(fd)

    def give_back(self, at: int, data: bytes, how: int) -> None:
        """Write into the rings in between, and call; a call eventfd may be filled to the brim."""
        if self.rings >= 0:
            os.pwrite(self.rings, data, at)
        if self.calls >= 0:
            os.set_blocking(self.calls, False)
            with suppress(BlockingIOError):
                os.eventfd_write(self.calls, FULL if how & 1 else 1)
            os.set_blocking(self.calls, bool(how & 2))
        self.turn()

    def ask(self, source: Input, how: int) -> None:
        """A request of the backend's own."""
        if how & 1:
            data, count = answer(source, BACKEND_REQUESTS)
            data = data[:4] + b"\x09\0\0\0" + data[8:]
        else:
            data, count = encode_request(BACKEND_REQUESTS.by_name["CONFIG_CHANGE_MSG"], Empty(), 0, True), 0
        if self.requests is not None:
            self._send(self.requests, data, count)
        self.turn()

    def _send(self, sock: socket.socket, data: bytes, count: int) -> None:
        fds = files(count)
        with suppress(OSError):
            if data:
                socket.send_fds(sock, [data], fds)
        for fd in fds:
            os.close(fd)


def step(source: Input, stage: BothEnds) -> None:
    """Of three, two are the frontend's."""
    what = source.byte()
    if what % 3:
        backend.step(source, stage)
    elif what < 0x80:
        at = GIVEN_BACK + source.byte() % (4 + 8 * SIZE)
        stage.give_back(at, source.take(what % 32), source.byte())
    else:
        stage.ask(source, what)


def play(source: Input) -> None:
    """A proxy, a frontend that begins in order or not, a backend, and what they make of the rest."""
    stage = BothEnds()
    stage.source = source
    perform(source, stage, step, source.byte())
