"""Descriptors of every kind that a peer can send, each made for one message.

It must not know where they go.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable
from itertools import pairwise

SIZE = 1 << 16  # bytes of a file
FULL = (1 << 64) - 2  # the most that an eventfd counts


def file(size: int, name: str = "file") -> int:
    """A file in memory, empty but for its length in bytes."""
    fd = os.memfd_create(name)
    os.ftruncate(fd, size)
    return fd


def _noise() -> int:
    fd = file(SIZE)
    os.pwrite(fd, bytes(range(256)) * 4, 0)
    return fd


def _full() -> int:
    fd = os.eventfd(0)
    os.eventfd_write(fd, FULL)
    return fd


def _reader() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def _writer() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def _socket(kind: int) -> int:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    theirs.close()
    return ours.detach()


def stream() -> int:
    """A socket that has lost its other end."""
    return _socket(socket.SOCK_STREAM)


def _epolls() -> int:
    """As many inside of each other as there can be."""
    chain = [select.epoll() for _ in range(5)]
    for inner, outer in pairwise(chain):
        outer.register(inner.fileno(), select.EPOLLIN)
    return os.dup(chain[-1].fileno())


KINDS: tuple[Callable[[], int], ...] = (
    lambda: os.eventfd(0, os.EFD_NONBLOCK),
    lambda: os.eventfd(1),
    lambda: os.eventfd(5, os.EFD_SEMAPHORE),
    _full,
    lambda: file(SIZE),
    lambda: file(0),
    _noise,
    _reader,
    _writer,
    stream,
    lambda: _socket(socket.SOCK_DGRAM),
    _epolls,
    lambda: os.open("/dev/zero", os.O_RDWR),
    lambda: os.open("/dev/null", os.O_WRONLY),
    lambda: os.open("/proc/self/status", os.O_RDONLY),
    lambda: os.open("/", os.O_PATH),
    lambda: os.open("/", os.O_RDONLY),
)
