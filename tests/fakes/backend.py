"""A scripted vhost-user backend in a thread: well-behaved but for what its script says.

`FakeBackend(script={"SET_VRING_NUM": silence})` answers everything by the tables except
SET_VRING_NUM.  A script entry is a function of the backend and the message that returns the
bytes to send; `None` ends the connection.  An entry under `(name, n)` holds for the n-th such
request only, counted from 0.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep

from pyvmm.errors import ProtocolError
from pyvmm.layout import RamRange
from pyvmm.loop import EventLoop
from pyvmm.record import Record
from pyvmm.vhost_user.channel import Channel
from pyvmm.vhost_user.codec import Decoder, Message, encode_request
from pyvmm.vhost_user.memory import GuestRam
from pyvmm.vhost_user.messages import BACKEND_REQUESTS, F_PROTOCOL_FEATURES, FRONTEND_REQUESTS, HEADER
from pyvmm.vhost_user.messages import ProtocolFeature as P
from pyvmm.vhost_user.payloads import (
    SHMEM_REGIONS,
    U64,
    Config,
    Empty,
    Inflight,
    Payload,
    ShmemConfig,
    VringState,
)
from pyvmm.vhost_user.session import Negotiation, Responder

Action = Callable[["FakeBackend", Message], "bytes | None"]
Script = dict[str | tuple[str, int], Action]

VERSION_1 = 1 << 32
VIRTIO = VERSION_1 | F_PROTOCOL_FEATURES | 1 << 26 | 1 << 29 | 0b101
PROTOCOL = P.MQ | P.REPLY_ACK | P.CONFIG | P.BACKEND_REQ | P.INFLIGHT_SHMFD | P.RARP


class FakeKind(Record):
    """A device kind in the shape of pyvmm.virtio.kinds."""

    device_id: int = 40
    name: str = "fake"
    min_queues: int = 1
    config_size: int = 16
    write_policy: str = "forward"

    def impossible_features(self, count: int) -> int:
        return 0

    def backend_limit(self, reported: int) -> int:
        """What GET_QUEUE_NUM means."""
        return reported


class FakeBackend:
    """See the module.  `seen` lists (name, payload, number of descriptors) in order."""

    def __init__(
        self,
        *,
        virtio: int = VIRTIO,
        protocol: int = PROTOCOL,
        config: bytes = bytes(range(16)),
        queues: int = 4,
        script: Script | None = None,
        sock: socket.socket | None = None,
        shared_memory: dict[int, int] | None = None,
        slots: int = 8,
    ) -> None:
        ours, self.frontend_end = (sock, socket.socket()) if sock else socket.socketpair()
        self.channel = Channel(ours)
        self.responder = Responder(FRONTEND_REQUESTS, Negotiation(virtio, protocol), os.close)
        self.virtio, self.protocol, self.queues = virtio, protocol, queues
        self.config = bytearray(config)
        self.shared_memory, self.slots, self.status = shared_memory or {}, slots, 0
        self.script = script or {}
        self.seen: list[tuple[str, Payload, int]] = []
        self.counts: Counter[str] = Counter()
        self.fds: list[int] = []  # whatever was received and is to be closed at the end
        self.extra_fds: list[int] = []  # sent along with the next answer
        self.requests: Channel | None = None  # the backend-request channel, once it came
        self.error: str | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def connect(self, timeout: float) -> socket.socket:
        """For Frontend(connect=...)."""
        return self.frontend_end

    @property
    def names(self) -> list[str]:
        """Names of the requests seen so far."""
        return [name for name, _, _ in self.seen]

    def close(self) -> None:
        """End the connection, wait for the thread, close what was received."""
        self.channel.shutdown()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self.channel.close()
        self.frontend_end.close()
        if self.requests is not None:
            self.requests.close()
        for fd in self.fds:
            os.close(fd)

    def ask(self, name: str, payload: Payload | None = None, fds: list[int] | None = None) -> None:
        """Send a request of the backend's own that wants an ack."""
        assert self.requests is not None
        row = BACKEND_REQUESTS.by_name[name]
        data = encode_request(row, payload or Empty(), len(fds or []), True)
        self.requests.send(data, fds or [], monotonic() + 5)

    def status_of(self, name: str, payload: Payload | None = None, fds: list[int] | None = None) -> int:
        """Send a request of the backend's own; the status that it is acked with."""
        self.ask(name, payload, fds)
        return self.status_told()

    def status_told(self) -> int:
        """The status that the request before was acked with."""
        assert self.requests is not None
        reply = self.requests.receive(
            Decoder(BACKEND_REQUESTS, os.close, replies=True), monotonic() + 30
        ).payload
        assert isinstance(reply, U64)
        return reply.value

    def _serve(self) -> None:
        try:
            while True:
                message = self.channel.receive(self.responder.decoder, monotonic() + 60)
                self.responder.received(message)
                answer = self._answer(message)
                if answer is None:
                    break
                if answer:
                    self.channel.send(answer, self.extra_fds, monotonic() + 5)
        except ProtocolError as error:
            self.error = str(error)
        finally:
            self.responder.decoder.close()
            self.channel.shutdown()

    def _answer(self, message: Message) -> bytes | None:
        name = message.request.name
        count = self.counts[name]
        self.counts[name] += 1
        self.seen.append((name, message.payload, len(message.fds)))
        self._keep(name, message)
        action = self.script.get((name, count)) or self.script.get(name)
        if action is None:
            return self.answer(message)
        return action(self, message)

    def _keep(self, name: str, message: Message) -> None:
        fds = message.take_fds()
        if name == "SET_BACKEND_REQ_FD":
            self.requests = Channel(socket.socket(fileno=fds.pop()))
        self.fds += fds

    def answer(self, message: Message) -> bytes:
        """What a good backend answers."""
        if message.request.name == "GET_INFLIGHT_FD":
            return self._inflight_buffer(message.payload)
        reply = self._reply(message.request.name, message.payload)
        if reply is not None:
            return self.responder.reply(reply)
        return self.responder.ack()

    def _inflight_buffer(self, asked: Payload) -> bytes:
        """Sends the reply itself, since a descriptor goes with it."""
        assert isinstance(asked, Inflight)
        self.fds.append(fd := os.memfd_create("inflight"))
        os.ftruncate(fd, 4096)
        data = self.responder.reply(Inflight(4096, 0, asked.num_queues, asked.queue_size), 1)
        self.channel.send(data, [fd], monotonic() + 5)
        return b""

    def _reply(self, name: str, payload: Payload) -> Payload | None:
        numbers = {
            "GET_FEATURES": self.virtio,
            "GET_PROTOCOL_FEATURES": self.protocol,
            "GET_QUEUE_NUM": self.queues,
            "GET_MAX_MEM_SLOTS": self.slots,
            "GET_STATUS": self.status,
        }
        if name in numbers:
            return U64(numbers[name])
        if name == "SET_STATUS" and isinstance(payload, U64):
            self.status = payload.value
        if name == "GET_SHMEM_CONFIG":
            sizes = [self.shared_memory.get(shmid, 0) for shmid in range(SHMEM_REGIONS)]
            return ShmemConfig(len(self.shared_memory), tuple(sizes))
        if name == "GET_VRING_BASE" and isinstance(payload, VringState):
            return VringState(payload.index, 7)
        if name == "GET_CONFIG" and isinstance(payload, Config):
            # like libvhost-user: the offset is ignored, too long a request is an error
            size = len(payload.data)
            return (
                Config(payload.offset, 0, bytes(self.config[:size])) if size <= len(self.config) else Empty()
            )
        if name == "SET_CONFIG" and isinstance(payload, Config):
            self.config[payload.offset : payload.offset + len(payload.data)] = payload.data
        return None


# -- what a script can do ----------------------------------------------------------


def silence(backend: FakeBackend, message: Message) -> bytes:
    """Never answer."""
    backend.responder.answering = None
    return b""


def hang_up(backend: FakeBackend, message: Message) -> None:
    """Close the connection instead of answering."""


def status(number: int) -> Action:
    """Ack with `number`."""
    return lambda backend, message: backend.responder.ack(number)


def reply(payload: Payload) -> Action:
    """Answer with this payload."""
    return lambda backend, message: backend.responder.reply(payload)


def flags(value: int) -> Action:
    """A good answer with other header flags."""
    return _patch(1, value)


def request_id(value: int) -> Action:
    """A good answer, but to another request."""
    return _patch(0, value)


def size(value: int) -> Action:
    """A good answer that announces another size."""
    return _patch(2, value)


def _patch(word: int, value: int) -> Action:
    def action(backend: FakeBackend, message: Message) -> bytes:
        data = bytearray(backend.answer(message))
        struct.pack_into("=I", data, 4 * word, value)
        return bytes(data)

    return action


def cut(count: int) -> Action:
    """The first `count` bytes of a good answer, then silence."""
    return lambda backend, message: backend.answer(message)[:count]


def cut_and_hang_up(count: int) -> Action:
    """The first `count` bytes of a good answer, then the end."""

    def action(backend: FakeBackend, message: Message) -> None:
        backend.channel.send(backend.answer(message)[:count], deadline=monotonic() + 5)

    return action


def drip(backend: FakeBackend, message: Message) -> bytes:
    """A good answer, one byte at a time."""
    for byte in backend.answer(message):
        backend.channel.send(bytes([byte]), deadline=monotonic() + 5)
        sleep(0.001)
    return b""


def twice(backend: FakeBackend, message: Message) -> bytes:
    """A good answer, two times."""
    return backend.answer(message) * 2


def with_fds(count: int) -> Action:
    """A good answer with descriptors that do not belong there."""

    def action(backend: FakeBackend, message: Message) -> bytes:
        backend.fds += (extra := [os.memfd_create("extra") for _ in range(count)])
        backend.channel.send(backend.answer(message), extra, monotonic() + 5)
        return b""

    return action


def noise(backend: FakeBackend, message: Message) -> bytes:
    """Bytes that mean nothing."""
    return HEADER.pack(0x50545448, 0x312E312F, 0x30303220) * 4


# -- the frontend's surroundings ---------------------------------------------------


class Surroundings:
    """RAM of two ranges and a loop that runs in a thread."""

    def __init__(self) -> None:
        self.loop = EventLoop()
        self.ram = GuestRam(
            os.memfd_create("ram"), (RamRange(0, 1 << 20, 0), RamRange(1 << 32, 1 << 20, 1 << 20))
        )
        os.ftruncate(self.ram.fd, 2 << 20)
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Let the loop run until `close`."""
        self._thread = threading.Thread(target=self.loop.run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the loop, if it runs."""
        if self._thread is not None:
            self.loop.stop()
            self._thread.join(10)
            self._thread = None

    def close(self) -> None:
        """Stop and close everything."""
        self.stop()
        self.loop.close()
        os.close(self.ram.fd)


@contextmanager
def no_new_fds() -> Iterator[None]:
    """Fails when the block leaves descriptors open."""
    before = _open_fds()
    yield
    after = _open_fds()
    leaked = {fd: after[fd] for fd in after.keys() - before.keys()}
    assert not leaked, f"left open: {leaked}"


def _open_fds() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
    return found
