"""A small virtio driver and a vhost-user frontend for testing backends, in plain Python.

`Ram` is guest memory in a memfd, `DriverQueue` the driver's side of one split virtqueue in it,
`RawFrontend` says any request to a backend, right or wrong.  It uses the codec of pyvmm and
nothing else of it; all numbers in rings come from virtio 1.3, section 2.7.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import time

from pyvmm.vhost_user.codec import Decoder, Message, encode_request
from pyvmm.vhost_user.messages import BACKEND_REQUESTS, FRONTEND_REQUESTS, MAX_FDS
from pyvmm.vhost_user.payloads import (
    U64,
    Empty,
    MemRegion,
    MemTable,
    Payload,
    VringAddr,
    VringFile,
    VringState,
)

NEXT, WRITE, INDIRECT = 1, 2, 4
USER_BASE = 0x7000_0000_0000  # where the frontend pretends to have mapped guest address 0
RING_PACKED = 1 << 34
REPLY_ACK, BACKEND_REQ, CONFIG = 1 << 3, 1 << 5, 1 << 9


class Ram:
    """Guest memory from guest address 0; `alloc` hands out pieces of it."""

    def __init__(self, size: int = 4 << 20) -> None:
        self.fd = os.memfd_create("ring-driver", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.size = size
        self.data = mmap.mmap(self.fd, size)
        self._next = 0

    def alloc(self, size: int, align: int = 16) -> int:
        at = -(-self._next // align) * align
        self._next = at + size
        assert self._next <= self.size
        return at

    def put(self, data: bytes) -> int:
        at = self.alloc(len(data))
        self.data[at : at + len(data)] = data
        return at

    def u16(self, at: int) -> int:
        return int(struct.unpack_from("<H", self.data, at)[0])

    def set_u16(self, at: int, value: int) -> None:
        struct.pack_into("<H", self.data, at, value & 0xFFFF)

    def close(self) -> None:
        self.data.close()
        os.close(self.fd)


class MachineRam(Ram):
    """The memory of a whole machine, from `start` on."""

    def __init__(self, region: object, start: int) -> None:
        self.data = memoryview(region)  # type: ignore[arg-type, assignment]
        self.size = len(self.data)
        self._next = start

    def close(self) -> None:
        self.data.release()  # type: ignore[attr-defined]


class DriverQueue:
    """One split virtqueue with its kick and call eventfds."""

    def __init__(self, ram: Ram, size: int = 16, *, event_idx: bool = False) -> None:
        self.ram, self.size, self.event_idx = ram, size, event_idx
        self.desc = ram.alloc(16 * size, 16)
        self.avail = ram.alloc(6 + 2 * size, 2)
        self.used = ram.alloc(6 + 8 * size, 4)
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.free = list(range(size))
        self.next_avail = self.last_used = 0
        self.chains: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}

    def reset(self) -> None:
        self.free = list(range(self.size))
        self.chains.clear()
        self.next_avail = self.last_used = 0
        for at, length in ((self.avail, 6 + 2 * self.size), (self.used, 6 + 8 * self.size)):
            self.ram.data[at : at + length] = bytes(length)

    def descriptor(self, index: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        struct.pack_into("<QIHH", self.ram.data, self.desc + 16 * index, address, length, flags, following)

    def add(self, out: list[bytes] = [], room: list[int] = [], *, indirect: bool = False) -> int:  # noqa: B006
        """Make one chain available: `out` to read, `room` sizes to write into."""
        rows = [(self.ram.put(data), len(data), 0) for data in out]
        rows += [(self.ram.alloc(size), size, WRITE) for size in room]
        return self.add_rows(rows, indirect=indirect)

    def add_rows(self, rows: list[tuple[int, int, int]], *, indirect: bool = False) -> int:
        writable = [(address, length) for address, length, flags in rows if flags & WRITE]
        if indirect:
            table = b"".join(
                struct.pack("<QIHH", a, n, f | (NEXT if i + 1 < len(rows) else 0), i + 1)
                for i, (a, n, f) in enumerate(rows)
            )
            rows = [(self.ram.put(table), len(table), INDIRECT)]
        heads = [self.free.pop(0) for _ in rows]
        for i, (address, length, flags) in enumerate(rows):
            last = i + 1 == len(rows)
            self.descriptor(
                heads[i], address, length, flags | (0 if last else NEXT), 0 if last else heads[i + 1]
            )
        self.chains[heads[0]] = (heads, writable)
        self.offer(heads[0])
        return heads[0]

    def offer(self, head: int) -> None:
        """Put `head` on the available ring."""
        self.ram.set_u16(self.avail + 4 + 2 * (self.next_avail % self.size), head)
        self.next_avail += 1
        self.ram.set_u16(self.avail + 2, self.next_avail)

    def kick(self) -> None:
        os.eventfd_write(self.kick_fd, 1)

    def collect(self) -> list[tuple[int, bytes]]:
        """Used chains since the last call: (head, what the device wrote)."""
        done = []
        while self.last_used & 0xFFFF != self.ram.u16(self.used + 2):
            at = self.used + 4 + 8 * (self.last_used % self.size)
            head, length = struct.unpack_from("<II", self.ram.data, at)
            self.last_used += 1
            heads, writable = self.chains.pop(head)
            self.free += heads
            whole = b"".join(self.ram.data[a : a + n] for a, n in writable)
            done.append((head, whole[:length]))
            if self.event_idx:  # ask for a call at the next one, before looking once more
                self.ram.set_u16(self.avail + 4 + 2 * self.size, self.last_used)
        return done

    def wait(self, timeout: float = 5.0) -> list[tuple[int, bytes]]:
        """Used chains, waiting for the device's call when there are none yet."""
        end = time.monotonic() + timeout
        while not (done := self.collect()):
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.call_fd], [], [], left)[0]:
                break
            os.eventfd_read(self.call_fd)  # may be about chains that were collected before
        return done

    def close(self) -> None:
        os.close(self.kick_fd)
        os.close(self.call_fd)


class RawFrontend:
    """The other end of a backend's socket, with no opinion about what may be said when."""

    def __init__(self, sock: socket.socket, timeout: float = 10.0) -> None:
        self.sock = sock
        sock.settimeout(timeout)
        self.replies = Decoder(FRONTEND_REQUESTS, os.close, replies=True)
        self.acks = False

    def send(self, name: str, payload: Payload | None = None, fds: list[int] = [], ack: bool = False) -> None:  # noqa: B006
        row = FRONTEND_REQUESTS.by_name[name]
        data = encode_request(row, payload or Empty(), len(fds), need_reply=ack)
        socket.send_fds(self.sock, [data], fds)

    def receive(self) -> Message:
        return receive_one(self.sock, self.replies)

    def ask(self, name: str, payload: Payload | None = None) -> Payload:
        """Say a request that has a reply of its own, and return that."""
        self.send(name, payload)
        return self.receive().payload

    def tell(self, name: str, payload: Payload | None = None, fds: list[int] = []) -> int:  # noqa: B006
        """Say a request and return the status of its ack (0 when acks are not negotiated)."""
        self.send(name, payload, fds, ack=self.acks)
        if not self.acks:
            return 0
        status = self.receive().payload
        assert isinstance(status, U64)
        return status.value

    def negotiate(self, features: int | None = None, protocol: int | None = None) -> int:
        """From SET_OWNER to SET_FEATURES; all that is offered is taken by default, but packed rings."""
        self.tell("SET_OWNER")
        offered = self.number("GET_FEATURES")
        protocol_offered = self.number("GET_PROTOCOL_FEATURES")
        taken = protocol_offered if protocol is None else protocol
        self.tell("SET_PROTOCOL_FEATURES", U64(taken))
        self.acks = bool(taken & REPLY_ACK)
        assert self.tell("SET_FEATURES", U64(offered & ~RING_PACKED if features is None else features)) == 0
        return offered

    def number(self, name: str) -> int:
        reply = self.ask(name)
        assert isinstance(reply, U64)
        return reply.value

    def share(self, ram: Ram, parts: int = 1) -> int:
        """SET_MEM_TABLE with all of `ram`, as `parts` adjacent regions."""
        step = ram.size // parts
        regions = tuple(MemRegion(i * step, step, USER_BASE + i * step, i * step) for i in range(parts))
        return self.tell("SET_MEM_TABLE", MemTable(regions), [ram.fd] * parts)

    def start(self, index: int, queue: DriverQueue, base: int = 0) -> int:
        """Everything that makes one queue run; the last status."""
        self.tell("SET_VRING_NUM", VringState(index, queue.size))
        self.tell("SET_VRING_BASE", VringState(index, base))
        status = self.tell("SET_VRING_ADDR", addresses(index, queue))
        self.tell("SET_VRING_CALL", VringFile(index, True), [queue.call_fd])
        self.tell("SET_VRING_KICK", VringFile(index, True), [queue.kick_fd])
        return self.tell("SET_VRING_ENABLE", VringState(index, 1)) or status

    def stop(self, index: int) -> int:
        """Stop one queue; its available index."""
        self.tell("SET_VRING_ENABLE", VringState(index, 0))
        reply = self.ask("GET_VRING_BASE", VringState(index, 0))
        assert isinstance(reply, VringState)
        return reply.num

    def backend_channel(self) -> socket.socket:
        """Hand over a socket for the backend's own requests and keep the other end."""
        ours, theirs = socket.socketpair()
        with theirs:
            assert self.tell("SET_BACKEND_REQ_FD", None, [theirs.fileno()]) == 0
        ours.settimeout(5.0)
        return ours

    def close(self) -> None:
        self.sock.close()


def addresses(index: int, queue: DriverQueue) -> VringAddr:
    """Where the queue's parts are, as the frontend says it."""
    return VringAddr(index, 0, USER_BASE + queue.desc, USER_BASE + queue.used, USER_BASE + queue.avail, 0)


def receive_one(sock: socket.socket, decoder: Decoder) -> Message:
    """Exactly one message from the socket; EOFError when the peer has closed it."""
    while True:
        data, fds, _, _ = socket.recv_fds(sock, decoder.needed(), MAX_FDS)
        if not data:
            raise EOFError("the backend closed the connection")
        message = decoder.feed(data, fds)
        if message is not None:
            return message


def receive_backend_request(sock: socket.socket) -> Message:
    """One request of the backend's on its own channel."""
    return receive_one(sock, Decoder(BACKEND_REQUESTS, os.close))
