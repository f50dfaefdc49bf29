"""A recorded dialogue, had again with another backend: what it answers differently.

It says the frontend's requests on one connection of a recording in their order, with descriptors of its
own making, and compares the answers.  Rings stay empty, so that where a queue stops (GET_VRING_BASE) is not
compared.  It must not know the file (`recording`).
"""

from __future__ import annotations

import os
from _socket import socket, socketpair
from time import monotonic, sleep

from ..errors import LocalProtocolError, RemoteProtocolError
from ..record import Record
from .channel import Channel, close_all
from .client import Client
from .payloads import Inflight, Log, MemTable, SingleRegion
from .recording import Line
from .trace import ACK, ERROR, FRONTEND, REPLY, REQUEST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .payloads import Payload

SECONDS = 10.0
UNCOMPARED = {"GET_VRING_BASE"}


def at_once(at: float) -> None:
    """The pace of whoever does not wait."""


class Paced:
    """The pace of the recording: waits for the time of each line, counted from the first one."""

    def __init__(self) -> None:
        self._offset: float | None = None

    def __call__(self, at: float) -> None:
        if self._offset is None:
            self._offset = monotonic() - at
        sleep(max(0.0, at + self._offset - monotonic()))


class Difference(Record):
    """The first answer that is another: the recorded line, and what came instead."""

    recorded: Line
    seen: str

    def __str__(self) -> str:
        return f"recorded: {self.recorded.as_text().strip()}\nnow:      {self.seen}"


def replay(lines: Iterable[Line], sock: socket, pace: Callable[[float], None] = at_once) -> Difference | None:
    """Have the dialogue of `lines` with the backend behind `sock`, which is closed in the end.

    `pace` is called with the time of each line.  None when every answer is as recorded.
    """
    player = Player(sock)
    try:
        for line in lines:
            pace(line.at)
            difference = player.play(line) if line.channel == FRONTEND else None
            if difference is not None:
                return difference
    finally:
        player.close()
    return None


class Player:
    """Says requests as they were said, and looks at the answers when their lines come."""

    def __init__(self, sock: socket) -> None:
        self._client = Client(Channel(sock), SECONDS)
        self._kept: list[int] = []  # a frontend keeps its descriptors while the backend has them
        self._seen = ""
        self._answer: Payload | None = None

    def close(self) -> None:
        """End the dialogue."""
        self._client.close()
        close_all(self._kept)

    def play(self, line: Line) -> Difference | None:
        """Say a request, or compare an answer; the difference if there is one."""
        if line.kind == REQUEST:
            self._say(line)
            return None
        if line.kind == ERROR:
            return None if self._answer is None else self._difference(line)
        same = self._answer == line.payload
        if line.kind in (REPLY, ACK) and not same and line.message not in UNCOMPARED:
            return self._difference(line)
        return None

    def _say(self, line: Line) -> None:
        payload = line.payload
        fds = [self._made(kind, payload, position) for position, kind in enumerate(line.fds)]
        try:
            self._answer, self._seen = self._client.call(line.message, payload, fds), ""
        except (RemoteProtocolError, LocalProtocolError) as error:
            self._answer, self._seen = None, str(error)

    def _difference(self, line: Line) -> Difference:
        if self._answer is None:
            return Difference(line, self._seen)
        return Difference(line, repr(self._answer))

    def _made(self, kind: str, payload: Payload, position: int) -> int:
        """A descriptor like the recorded one."""
        if kind == "socket":
            ours, theirs = socketpair()
            self._kept.append(ours.detach())
            fd = theirs.detach()
        elif kind == "pipe":
            ours_fd, fd = os.pipe()
            self._kept.append(ours_fd)
        elif kind == "eventfd":
            fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        else:
            fd = os.memfd_create("pyvmm-replay", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, _size(payload, position))
        self._kept.append(fd)
        return fd


def _size(payload: Payload, position: int) -> int:
    """How long the file must be that `payload` speaks of."""
    if isinstance(payload, MemTable):
        region = payload.regions[position]
        return region.mmap_offset + region.size
    for kind, start, size in SIZES:
        if isinstance(payload, kind):
            return int(getattr(payload, start)) + int(getattr(payload, size))
    return 0


SIZES = (
    (SingleRegion, "mmap_offset", "size"),
    (Inflight, "mmap_offset", "mmap_size"),
    (Log, "offset", "size"),
)
