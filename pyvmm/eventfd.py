"""Eventfds that a peer holds too: counting, emptying and signalling without ever waiting.

A backend shares the open file of every doorbell and interrupt that it was sent.  It can take
O_NONBLOCK off it, empty it and fill it, so that mode must not be relied on.  What an eventfd
stands for is its user's business.
"""

from __future__ import annotations

import os
import select

COUNTER = 8  # bytes
LINK = "anon_inode:[eventfd]"  # what /proc calls one: no file can have a name without a slash


def create() -> int:
    """A new one, empty."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def is_eventfd(fd: int) -> bool:
    """Whether `fd` is one: only then do `drain` and `signal` keep their promises.  Needs /proc.

    No operation of the file is called for it: on some that a peer may send, even fstat would wait.
    """
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == LINK
    except OSError:
        return False


def drain(fd: int) -> bool:
    """Empty it; whether there was anything in it."""
    try:
        return os.preadv(fd, (bytearray(COUNTER),), -1, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False


def signal(fd: int) -> None:
    """Add one event; a counter that is full says the same as one that is not.

    A write cannot be told not to wait, so the counter is looked at first.  A peer that fills it just
    then holds up the calling thread until it reads, or until the thread is interrupted as the machine ends.
    """
    if not _has_room(fd):
        return
    try:
        os.eventfd_write(fd, 1)
    except BlockingIOError:
        return


def make_room(fd: int) -> None:
    """Empty it if it is full: a thread that waits to add to it goes on, and then it is not empty."""
    if not _has_room(fd):
        drain(fd)


def _has_room(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))
