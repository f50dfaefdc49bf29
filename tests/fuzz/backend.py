"""A backend's whole end of a connection, on a real socket, in the fuzzer's own thread.

A frontend's messages are made of the input: well-formed, with contents from right to wild, and with
descriptors of every kind.  Between them its driver writes into the rings and kicks.  The only outcome that
is allowed is the end of the connection.  After it nothing is left: no descriptor, no thread.
"""

from __future__ import annotations

import mmap
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from struct import pack_into, unpack_from
from typing import Any, NamedTuple

from fuzz.kinds import KINDS, file, stream
from fuzz.source import Input, encoded, payload

from pyvmm import eventfd
from pyvmm.backend import ConfigSpace, Device, state
from pyvmm.backend.connection import Connection
from pyvmm.backend.echo import Echo
from pyvmm.backend.loop import DeviceLoop
from pyvmm.vhost_user.messages import FLAG_NEED_REPLY, FRONTEND_REQUESTS, HEADER, VERSION
from pyvmm.vhost_user.payloads import (
    U64,
    Config,
    DeviceState,
    Empty,
    Inflight,
    MemRegion,
    MemTable,
    Payload,
    SingleRegion,
    VringAddr,
    VringFile,
    VringState,
)

state.GLANCE, state.SECONDS = 0.001, 0.01  # a fuzzer has no time for what waits

SIZE = 16  # entries of a queue
BYTES = 1 << 16
USER = 1 << 40
BUFFERS = 0x8000
RING, AVAIL, USED = 0x1000, 0x200, 0x400  # a queue's part of the memory, and where its rings are in there
DESC_NEXT, DESC_WRITE = 1, 2
ALL = (1 << 64) - 1
FEATURES = (1 << 32 | 1 << 30, ALL & ~(1 << 34), ALL, 1 << 32 | 1 << 30 | 1 << 34)


class Busy(Device):
    """Does something of everything; keeps the chains of its second queue until that stops."""

    device_id = 63
    features = 1
    queue_sizes = (SIZE, SIZE)
    shared_memory = {0: 4096}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.config = ConfigSpace([("word", 8)])
        self.kept: list[Any] = []

    def on_queue(self, queue: Any) -> None:
        for chain in queue:
            chain.write(chain.read(100).upper())
            if queue.index:
                queue.keep(chain)
                self.kept.append(chain)
            elif chain.readable:
                break
            elif chain.writable > 1:
                chain.writable_views()[0][:1] = b"x"
                chain.wrote(1)
        self.config_changed()

    def on_stop(self, queue: Any) -> None:
        if not queue.index and queue.pop() is not None:
            queue.rewind(1)
        while queue.index and self.kept:
            self.kept.pop().push()
            queue.notify()

    def save_state(self) -> bytes:
        return bytes(100_000)

    def load_state(self, data: bytes) -> None:
        if data[:1] != b"x":
            raise ValueError("no state of ours")


DEVICES: tuple[Callable[[], Device], ...] = (
    Busy,
    lambda: Echo(2, SIZE),
    Busy,
    lambda: Echo(2, SIZE, native=False),
)


# -- messages that are right, for a queue and a number ---------------------------------------------


class Said(NamedTuple):
    """A request, and which descriptors go with it: the memory, a doorbell, or what makes one."""

    name: str
    payload: Callable[[int, int], Payload]
    fds: tuple[Any, ...] = ()


def _u64(value: int) -> Callable[[int, int], Payload]:
    return lambda queue, number: U64(value)


def _empty(queue: int, number: int) -> Payload:
    return Empty()


def _addresses(queue: int, number: int) -> Payload:
    at = USER + RING * queue
    return VringAddr(queue, 0, at, at + USED, at + AVAIL, 0)


MEMORY, KICK, CALL = "memory", "kick", "call"
FILE = lambda queue, number: VringFile(queue, True)  # noqa: E731
NO_FILE = lambda queue, number: VringFile(queue, False)  # noqa: E731
REGION = (0, BYTES, USER, 0)
RIGHT: tuple[Said, ...] = (
    Said("SET_OWNER", _empty),
    Said("GET_FEATURES", _empty),
    Said("GET_PROTOCOL_FEATURES", _empty),
    Said("SET_PROTOCOL_FEATURES", _u64(ALL)),
    Said("SET_FEATURES", lambda queue, number: U64(FEATURES[number % len(FEATURES)])),
    Said("SET_MEM_TABLE", lambda queue, number: MemTable((MemRegion(*REGION),)), (MEMORY,)),
    Said("SET_VRING_NUM", lambda queue, number: VringState(queue, SIZE)),
    Said("SET_VRING_BASE", VringState),
    Said("SET_VRING_ADDR", _addresses),
    Said("SET_VRING_CALL", FILE, (CALL,)),
    Said("SET_VRING_KICK", FILE, (KICK,)),
    Said("SET_VRING_ENABLE", lambda queue, number: VringState(queue, 1)),
    # up to here: what makes a queue run
    Said("SET_VRING_ENABLE", lambda queue, number: VringState(queue, 0)),
    Said("GET_VRING_BASE", lambda queue, number: VringState(queue, 0)),
    Said("SET_VRING_KICK", NO_FILE),
    Said("SET_VRING_CALL", NO_FILE),
    Said("SET_VRING_ERR", FILE, (CALL,)),
    Said("ADD_MEM_REG", lambda queue, number: SingleRegion(*REGION), (MEMORY,)),
    Said("REM_MEM_REG", lambda queue, number: SingleRegion(*REGION)),
    Said("GET_QUEUE_NUM", _empty),
    Said("GET_MAX_MEM_SLOTS", _empty),
    Said("GET_SHMEM_CONFIG", _empty),
    Said("GET_CONFIG", lambda queue, number: Config(0, 0, bytes(1 + number % 32))),
    Said("SET_CONFIG", lambda queue, number: Config(number % 32, 0, b"abcd")),
    Said("SET_BACKEND_REQ_FD", _empty, (stream,)),
    Said("GET_INFLIGHT_FD", lambda queue, number: Inflight(0, 0, 2, SIZE)),
    Said("SET_INFLIGHT_FD", lambda queue, number: Inflight(BYTES, 0, 2, SIZE), (lambda: file(BYTES),)),
    Said("SET_DEVICE_STATE_FD", lambda queue, number: DeviceState(number & 1, 0), (lambda: file(64),)),
    Said("CHECK_DEVICE_STATE", _empty),
    Said("RESET_DEVICE", _empty),
    Said("RESET_OWNER", _empty),
)
RUNS = 12


# -- the frontend ----------------------------------------------------------------------------------


class Stage:
    """The connection of a device, the frontend's socket and its driver's memory and eventfds."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.ends: list[str] = []
        self.loop = DeviceLoop()
        self.fd = file(BYTES, "ram")
        self.ram = mmap.mmap(self.fd, BYTES)
        self.kick, self.call = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        self.ours, theirs = socket.socketpair()
        self.ours.setblocking(False)
        device.open(self.loop)
        make = device.connection_class or Connection
        self.connection = make(device, theirs, self.loop, self.ends.append)

    def close(self) -> None:
        """Both ends; nothing of the connection is left."""
        self.ours.close()
        self.turn()
        self.connection.close()
        assert self.connection.closed and self.device.connection is None and len(self.ends) <= 1
        assert not any("\n" in reason for reason in self.ends)
        self.device.close()
        self.loop.close()
        self.ram.close()
        for fd in (self.fd, self.kick, self.call):
            os.close(fd)

    def turn(self) -> None:
        """The backend does what it has to do now."""
        for _ in range(3):
            self.loop.turn()

    def send(self, name: str, said: bytes, fds: list[int], ack: bool) -> None:
        """Send a request and have it carried out; the descriptors are closed."""
        row = FRONTEND_REQUESTS.by_name[name]
        try:
            if not self.connection.closed:
                flags = VERSION | (FLAG_NEED_REPLY if ack else 0)
                with suppress(OSError):
                    socket.send_fds(self.ours, [HEADER.pack(row.id, flags, len(said)) + said], fds)
        finally:
            for fd in fds:
                os.close(fd)
        self.turn()
        self.hear()

    def hear(self) -> None:
        """Read what was answered, and close what came with it."""
        with suppress(OSError):
            data = b"more"
            while data:
                data, fds, _, _ = socket.recv_fds(self.ours, 4096, 32)
                for fd in fds:
                    os.close(fd)

    def say(self, said: Said, queue: int, number: int, ack: bool) -> None:
        """Say something right."""
        given = said.payload(queue, number)
        agreed = self.connection.agreed
        if said.name == "SET_PROTOCOL_FEATURES":
            given = U64(agreed.protocol_offered or 0)
        elif isinstance(given, U64):
            given = U64(given.value & (agreed.virtio_offered or 0))
        own = {MEMORY: self.fd, KICK: self.kick, CALL: self.call}
        fds = [os.dup(own[what]) if what in own else what() for what in said.fds]
        self.send(said.name, encoded(given), fds, ack)

    def start(self, queue: int, number: int) -> None:
        """Everything up to a running queue."""
        for said in RIGHT[:RUNS]:
            self.say(said, queue, number if said.name == "SET_FEATURES" else 0, True)

    # -- the driver

    def offer(self, queue: int, out: int, room: int) -> None:
        """One more chain in a split ring, of `out` bytes to read and then `room` to write, and a kick."""
        at = RING * queue
        (index,) = unpack_from("<H", self.ram, at + AVAIL + 2)
        rows = [(out, 0)] * bool(out) + [(room, DESC_WRITE)] * bool(room)
        head = 2 * index % SIZE
        for i, (length, flags) in enumerate(rows):
            more = DESC_NEXT if i + 1 < len(rows) else 0
            pack_into("<QIHH", self.ram, at + 16 * (head + i), BUFFERS, length, flags | more, head + i + 1)
        pack_into("<H", self.ram, at + AVAIL + 4 + 2 * (index % SIZE), head)
        pack_into("<H", self.ram, at + AVAIL + 2, index + 1 & 0xFFFF)
        self.ring_doorbell()

    def scribble(self, at: int, data: bytes) -> None:
        """Anything anywhere in the first two rings."""
        at %= 2 * RING
        self.ram[at : at + len(data)] = data

    def ring_doorbell(self) -> None:
        """As a driver does, and the calls are taken."""
        eventfd.signal(self.kick)
        self.turn()
        eventfd.drain(self.call)


def descriptors(source: Input, count: int) -> list[int]:
    """So many, of kinds that the input chooses."""
    return [KINDS[source.byte() % len(KINDS)]() for _ in range(count)]


def step(source: Input, stage: Stage) -> None:
    """One thing that a frontend or its driver does."""
    what, queue = source.byte(), source.byte()
    if what < 0x40:
        stage.say(RIGHT[what % len(RIGHT)], queue & 1, source.number(), bool(queue & 2))
    elif what < 0x60:  # something right, with other descriptors
        said = RIGHT[what % len(RIGHT)]
        given = said.payload(queue & 1, source.number())
        stage.send(said.name, encoded(given), descriptors(source, len(said.fds)), bool(queue & 2))
    elif what < 0xA0:  # anything
        row = FRONTEND_REQUESTS.rows[what % len(FRONTEND_REQUESTS.rows)]
        said_ = encoded(payload(row.payload, source))
        stage.send(row.name, said_, descriptors(source, queue >> 2 & 3), bool(queue & 2))
    elif what < 0xC0:
        stage.offer(queue & 1, source.number() & 0xFFFF, source.number() & 0xFFFF)
    elif what < 0xE0:
        stage.scribble(source.number() & 0xFFFF, source.take(queue % 64))
        stage.ring_doorbell()
    else:
        stage.ring_doorbell()


def perform(source: Input, stage: Stage, steps: Callable[[Input, Any], None], how: int) -> None:
    """The whole play, with a beginning that `how` chooses; every thread ends with it."""
    before = threading.active_count()
    try:
        if how & 1:
            stage.start(0, how >> 1)
        while source:
            steps(source, stage)
    finally:
        stage.close()
    assert threading.active_count() <= before


def play(source: Input) -> None:
    """A device, a frontend that begins in order or not, and what both make of the rest."""
    what = source.byte()
    perform(source, Stage(DEVICES[what & 3]()), step, what >> 2)
