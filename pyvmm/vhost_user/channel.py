"""The vhost-user socket: exact reads with their descriptors, and deadlines.

The only module of the package that reads or writes a socket.  It owns the descriptor and the rules
of SCM_RIGHTS: close-on-exec at birth, a truncated ancillary message is fatal, at most
MAX_FDS at once.  It does not know what the messages mean.  `_socket` is what `socket`
wraps; the wrapper costs several milliseconds to import and nothing of it is needed here.
"""

from __future__ import annotations

import errno
import os
import select
from _socket import (
    AF_UNIX,
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    MSG_CTRUNC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SCM_RIGHTS,
    SHUT_RDWR,
    SOCK_STREAM,
    SOL_SOCKET,
    socket,
)
from _socket import socketpair as _socketpair
from struct import pack, unpack_from
from time import monotonic

from ..ending import waiting
from ..errors import BackendLost, LocalProtocolError, RemoteProtocolError
from ..loop import LONGEST_WAIT
from .messages import MAX_FDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Protocol

    from .codec import Decoder, Message

    class Aside(Protocol):
        """Another channel, on which the peer may want something before it answers."""

        @property
        def ended(self) -> bool: ...
        def fileno(self) -> int: ...
        def serve(self) -> None: ...


RECEIVE_FLAGS = MSG_CMSG_CLOEXEC | MSG_DONTWAIT
SEND_FLAGS = MSG_NOSIGNAL | MSG_DONTWAIT


class Channel:
    """One end of a connected AF_UNIX stream socket, which it owns and closes."""

    def __init__(self, sock: socket) -> None:
        self._socket = sock
        sock.setblocking(False)

    def fileno(self) -> int:
        """The descriptor, -1 once closed."""
        return self._socket.fileno()

    def send(self, data: bytes, fds: Sequence[int] = (), deadline: float = 0.0) -> None:
        """Send everything by `deadline` (monotonic seconds); descriptors stay the caller's."""
        ancillary = [(SOL_SOCKET, SCM_RIGHTS, pack(f"={len(fds)}i", *fds))] if fds else []
        while data:
            sent = self._send_some(data, ancillary)
            if sent:
                data, ancillary = data[sent:], []
            else:
                self._wait(select.POLLOUT, deadline, "did not take a message")

    def receive(self, decoder: Decoder, deadline: float, aside: Aside | None = None) -> Message:
        """The next whole message, by `deadline`; BackendLost when it does not come.

        What arrives on `aside` is served meanwhile.
        """
        while True:
            message, more = self._read_some(decoder)
            if message is not None:
                return message
            if not more:
                self._wait(select.POLLIN, deadline, "did not answer", aside)

    def receive_now(self, decoder: Decoder) -> Message | None:
        """A message if one is complete already; what there is of a partial one stays in `decoder`."""
        more = True
        while more:
            message, more = self._read_some(decoder)
            if message is not None:
                return message
        return None

    def shutdown(self) -> None:
        """End the dialogue; a thread that waits in `send` or `receive` notices at once."""
        try:
            self._socket.shutdown(SHUT_RDWR)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.EBADF):
                raise

    def close(self) -> None:
        """Close the descriptor."""
        self._socket.close()

    def _send_some(self, data: bytes, ancillary: list[tuple[int, int, bytes]]) -> int:
        try:
            return self._socket.sendmsg([data], ancillary, SEND_FLAGS)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno == errno.EBADF:
                raise LocalProtocolError("a descriptor to be sent is closed") from None
            raise BackendLost(f"the connection broke: {os.strerror(error.errno or 0)}") from None

    def _read_some(self, decoder: Decoder) -> tuple[Message | None, bool]:
        """Read once: a message if that made one whole, and whether there may be more to read."""
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                decoder.needed(), CMSG_SPACE(MAX_FDS * 4), RECEIVE_FLAGS
            )
        except BlockingIOError:
            return None, False
        except OSError as error:
            raise BackendLost(f"the connection broke: {os.strerror(error.errno or 0)}") from None
        fds = _descriptors(ancillary)
        if flags & MSG_CTRUNC:
            close_all(fds)
            raise RemoteProtocolError(f"more than {MAX_FDS} descriptors came with one message")
        if not data:
            close_all(fds)
            where = "" if decoder.idle else " in the middle of a message"
            raise BackendLost(f"the connection was closed{where}")
        return decoder.feed(data, fds), True

    def _wait(self, events: int, deadline: float, failure: str, aside: Aside | None = None) -> None:
        poller = select.poll()
        poller.register(self._socket.fileno(), events)
        if aside is not None and not aside.ended:
            poller.register(aside.fileno(), select.POLLIN)
        left = deadline - monotonic()
        with waiting():
            ready = poller.poll(min(left, LONGEST_WAIT) * 1000) if left > 0 else []
        if not ready and left <= LONGEST_WAIT:
            raise BackendLost(f"it {failure} in time")
        if aside is not None and any(fd == aside.fileno() for fd, _ in ready):
            aside.serve()


def _descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == SOL_SOCKET and kind == SCM_RIGHTS:
            fds += unpack_from(f"={len(data) // 4}i", data)
    return fds


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)


def pair() -> tuple[Channel, socket]:
    """A connected pair: our end, and the end to hand over."""
    ours, theirs = _socketpair(AF_UNIX, SOCK_STREAM)
    return Channel(ours), theirs
