"""Bytes to messages and back: framing, sizes, flags and descriptor counts of vhost-user.

Pure: no socket and no `os`; whoever has the socket asks `needed`, reads that much and
feeds it, so that descriptors stay with their message.  It either returns or raises
`RemoteProtocolError` (what arrived is wrong) or `LocalProtocolError` (what we were about to
send is).  It must not know which message is due: that is the session's.
"""

from __future__ import annotations

import struct

from ..errors import LocalProtocolError, RemoteProtocolError
from .messages import FLAG_NEED_REPLY, FLAG_REPLY, HEADER, MAX_FDS, VERSION
from .payloads import U64

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

    from .messages import Request, RequestTable
    from .payloads import Payload

REQUEST_FLAGS = (VERSION, VERSION | FLAG_NEED_REPLY)
REPLY_FLAGS = (VERSION | FLAG_REPLY,)


class Message:
    """One received message.  It owns its descriptors until somebody takes them."""

    __slots__ = ("_close_fd", "fds", "need_reply", "payload", "request")

    def __init__(
        self,
        request: Request,
        payload: Payload,
        fds: list[int],
        need_reply: bool,
        close_fd: Callable[[int], None],
    ) -> None:
        self.request = request
        self.payload = payload
        self.fds = fds
        self.need_reply = need_reply
        self._close_fd = close_fd

    def take_fds(self) -> list[int]:
        """Hand the descriptors to the caller, who closes them from now on."""
        fds, self.fds = self.fds, []
        return fds

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        for fd in self.take_fds():
            self._close_fd(fd)

    def __repr__(self) -> str:
        ack = ", need_reply" if self.need_reply else ""
        return f"<{self.request.name} {self.payload!r} fds={self.fds}{ack}>"


def encode_request(request: Request, payload: Payload, fd_count: int = 0, need_reply: bool = False) -> bytes:
    """The bytes of one request; LocalProtocolError when they would break the row's rules."""
    _check_local(request, payload, (request.payload,), fd_count, request.fds)
    return _frame(request, REQUEST_FLAGS[need_reply], payload)


def encode_reply(request: Request, payload: Payload, fd_count: int = 0) -> bytes:
    """The bytes of the reply to (or the ack of) `request`."""
    _check_local(request, payload, request.replies, fd_count, request.reply_fds)
    return _frame(request, REPLY_FLAGS[0], payload)


def encode_ack(request: Request, status: int = 0) -> bytes:
    """The bytes of an ack: 0 is success."""
    return _frame(request, REPLY_FLAGS[0], U64(status))


def _check_local(
    request: Request,
    payload: Payload,
    allowed: Sequence[type[Payload]],
    fd_count: int,
    bounds: tuple[int, int],
) -> None:
    if type(payload) not in allowed:
        raise LocalProtocolError(f"{request.name} cannot carry {type(payload).__name__}")
    wrong = fd_problem(payload, fd_count, bounds)
    if wrong:
        raise LocalProtocolError(f"{request.name}: {wrong}")


def _frame(request: Request, flags: int, payload: Payload) -> bytes:
    try:
        body = payload.encode()
    except (struct.error, ValueError) as error:
        raise LocalProtocolError(f"{request.name}: {payload!r}: {error}") from None
    if not payload.fits(len(body)):
        raise LocalProtocolError(f"{request.name}: {len(body)} bytes of payload are too many")
    return HEADER.pack(request.id, flags, len(body)) + body


def fd_problem(payload: Payload, count: int, bounds: tuple[int, int]) -> str | None:
    """What is wrong with `count` descriptors beside `payload`, or None."""
    low, high = bounds
    announced = payload.fd_count()
    if announced is not None and low <= announced <= high:
        low = high = announced
    if low <= count <= high:
        return None
    return f"{count} descriptors where {low if low == high else f'{low} to {high}'} belong"


class Decoder:
    """Turns one direction of a connection into messages, one at a time.

    `table` holds the requests that are received, or those whose replies are received when
    `replies` is true.  Descriptors that cannot be handed out are closed with `close_fd`.
    After an error the connection is of no use: every later `feed` raises the same.
    """

    def __init__(
        self, table: RequestTable, close_fd: Callable[[int], None], *, replies: bool = False
    ) -> None:
        self._table = table
        self._close_fd = close_fd
        self._replies = replies
        self._flags = REPLY_FLAGS if replies else REQUEST_FLAGS
        self._broken: str | None = None
        self._fds: list[int] = []
        self._request: Request | None = None
        self._kinds: tuple[type[Payload], ...] = ()
        self._restart()

    def needed(self) -> int:
        """How many bytes to read next at most: the rest of the header or of the payload."""
        return self._end - len(self._data)

    @property
    def idle(self) -> bool:
        """True between messages, when a closed connection loses nothing."""
        return not self._data

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> Message | None:
        """Take up to `needed` bytes and what descriptors came with them; a message when whole."""
        self._fds += fds
        if self._broken is not None:
            self._fail(self._broken)
        if len(data) > self.needed():
            self._fail("more bytes were fed than needed", LocalProtocolError)
        if len(self._fds) > MAX_FDS:
            self._fail(f"{len(self._fds)} descriptors came with one message")
        self._data += data
        if self._request is None and not self.needed():
            self._read_header()
        if self._request is None or self.needed():
            return None
        return self._finish(self._request)

    def close(self) -> None:
        """Close the descriptors of a message that never became whole."""
        for fd in self._fds:
            self._close_fd(fd)
        self._fds = []

    def _restart(self) -> None:
        self._data = b""
        self._end = HEADER.size
        self._fds = []
        self._request = None
        self._kinds = ()
        self._need_reply = False

    def _read_header(self) -> None:
        number, flags, size = HEADER.unpack(self._data)
        request = self._table.get(number)
        if flags not in self._flags:
            self._fail(f"{request.name} with flags {flags:#x}, expected {self._flags[0]:#x}")
        if self._replies and not request.known:
            self._fail(f"reply to unknown {request.name}")
        kinds = request.replies if self._replies else (request.payload,)
        self._kinds = tuple(kind for kind in kinds if kind.fits(size))
        if not self._kinds:
            self._fail(f"{self._what(request)} with {size} bytes of payload")
        self._request = request
        self._need_reply = bool(flags & FLAG_NEED_REPLY)
        self._end = HEADER.size + size

    def _finish(self, request: Request) -> Message:
        try:
            payload = self._kinds[0].decode(self._data[HEADER.size :])
        except ValueError as error:
            self._fail(f"{self._what(request)}: {error}")
        wrong = fd_problem(payload, len(self._fds), request.reply_fds if self._replies else request.fds)
        if wrong:
            self._fail(f"{self._what(request)}: {wrong}")
        message = Message(request, payload, self._fds, self._need_reply, self._close_fd)
        self._restart()
        return message

    def _what(self, request: Request) -> str:
        return f"reply to {request.name}" if self._replies else request.name

    def _fail(self, reason: str, kind: type[Exception] = RemoteProtocolError) -> NoReturn:
        self.close()
        self._broken = reason
        raise kind(reason)
