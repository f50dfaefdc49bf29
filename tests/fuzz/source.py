"""What a fuzzer's bytes mean: numbers, payloads, answers of a peer, read one after the other.

It owns the format of the corpus, so that an input does the same with and without the fuzzer, and
the account of descriptors.  It must not know what the parts under test do with what they get.
"""

from __future__ import annotations

import os
import struct

from pyvmm.vhost_user.messages import HEADER, RequestTable
from pyvmm.vhost_user.payloads import Config, Empty, MemRegion, MemTable, Payload, Raw

ESCAPE = 0xF0  # numbers below are one byte, others follow in eight
REPLY = 5  # flags of a reply
RAW, ACK, OWN, HEAD = range(4)  # kinds of answer
MANY = 3  # says that the number of descriptors has a byte of its own
FILE = os.memfd_create("anything")
os.ftruncate(FILE, 1 << 20)


class Input:
    """The bytes of one run; past their end everything is zero."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        """Up to `count` bytes."""
        data = self._data[self._at : self._at + count]
        self._at += len(data)
        return data

    def byte(self) -> int:
        data = self.take(1)
        return data[0] if data else 0

    def number(self) -> int:
        """A small number in one byte, or any of 64 bits."""
        small = self.byte()
        return small if small < ESCAPE else int.from_bytes(self.take(8), "little")

    def rest(self) -> bytes:
        return self.take(len(self._data))


class Writer:
    """The other way round, for seeds."""

    def __init__(self) -> None:
        self.data = b""

    def byte(self, *values: int) -> Writer:
        self.data += bytes(values)
        return self

    def number(self, value: int) -> Writer:
        wide = value.to_bytes(8, "little")
        self.data += bytes((value,)) if value < ESCAPE else bytes((ESCAPE,)) + wide
        return self

    def block(self, data: bytes) -> Writer:
        """Bytes with their number in front, at most 255."""
        self.data += bytes((len(data),)) + data
        return self


def payload(kind: type[Payload], source: Input) -> Payload:
    """Some payload of this kind; Empty, which is another kind, where the bytes contradict themselves."""
    if kind is Config:
        offset, flags = source.number(), source.byte()
        return Config(offset, flags, source.take(source.byte()))
    if kind is MemTable:
        regions = [source.take(32).ljust(32, b"\0") for _ in range(source.byte() % 34)]
        return MemTable(tuple(MemRegion.decode(region) for region in regions))
    if kind is Raw:
        return Raw(source.take(source.byte()))
    size = kind._wire.size
    try:
        return kind.decode(source.take(min(size, 64)).ljust(size, b"\0"))
    except ValueError:
        return Empty()


def encoded(value: Payload) -> bytes:
    """Its bytes, or none where it has none."""
    try:
        return value.encode()
    except (ValueError, struct.error):
        return b""


def answer(source: Input, table: RequestTable, asked: int = 0) -> tuple[bytes, int]:
    """What a peer sends, from nearly right to noise, and with how many descriptors.

    `asked` is the number of the request that is due an answer, where that is known.
    """
    what = source.byte()
    count = what >> 2 & 3
    if count == MANY:
        count = source.byte() % 36
    row = table.get(source.byte() or asked) if what & 3 in (ACK, OWN) else None
    if row is None:
        data = HEADER.pack(*(source.number() & 0xFFFF_FFFF for _ in range(3))) if what & 3 == HEAD else b""
        return data + source.take(source.byte()), count
    if what & 3 == ACK or not row.reply:
        body = struct.pack("=Q", source.number())
    else:
        body = encoded(payload(row.reply[source.byte() % len(row.reply)], source))
    return HEADER.pack(row.id, REPLY, len(body)) + body, count


class Ledger:
    """Stand-ins for descriptors: each is opened once and closed once."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        self._next = 1000

    def make(self, count: int) -> list[int]:
        made = list(range(self._next, self._next + count))
        self._next += count
        self.open.update(made)
        return made

    def close(self, fd: int) -> None:
        assert fd in self.open, f"descriptor {fd} was closed twice"
        self.open.remove(fd)


def descriptors(count: int) -> list[int]:
    """Real ones, of a file of 1 MiB."""
    return [os.dup(FILE) for _ in range(count)]


def open_descriptors() -> int:
    """How many this process has."""
    return len(os.listdir("/proc/self/fd"))
