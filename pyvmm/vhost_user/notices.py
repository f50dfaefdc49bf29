"""The backend's own requests: served in the event loop's thread, bounded per wake-up.

It owns the frontend's end of the socket pair of SET_BACKEND_REQ_FD.  A backend may wait
here for an ack while a virtual CPU waits for the backend on the main connection, so
nothing here takes the frontend's lock or blocks.  Others serve where the loop does not: who opens
a connection, and a reset, which ends what was asked for before it.  It must not know what a
notice means to the device: a handler does, found by the request's name.
"""

from __future__ import annotations

import os
from time import monotonic

from ..errors import BackendLost, RemoteProtocolError
from ..lean import Lock
from .channel import pair
from .messages import BACKEND_REQUESTS
from .session import Responder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .codec import Message
    from .session import Negotiation

    Handler = Callable[[Message], int]
    Observe = Callable[[Callable[[Message], int | None], Message], None]

BUDGET = 64  # messages in one wake-up; the loop has other things to do
ALL = 4096  # more than the socket holds of requests with a descriptor, which are what counts at a reset
NOT_SUPPORTED = 95  # EOPNOTSUPP, the status of a request that nobody handles


class Notices:
    """Reads, dispatches and acks.  A handler returns the ack's status, 0 is success."""

    def __init__(self, negotiation: Negotiation, handlers: Mapping[str, Handler]) -> None:
        self._channel, self._theirs = pair()
        self._responder = Responder(BACKEND_REQUESTS, negotiation, os.close)
        self._handlers = handlers
        self.observe: Observe | None = None  # does what `_handle` does, and looks on
        self.ended = False
        self._lock = Lock()  # taken for as long as requests are served; a reset may want to, and to end it
        self._muted = False

    def fileno(self) -> int:
        """The descriptor to watch."""
        return self._channel.fileno()

    def hand_over(self, send: Callable[[int], None]) -> None:
        """Give the other end's descriptor to `send`, then close it here."""
        try:
            send(self._theirs.fileno())
        finally:
            self._theirs.close()

    def serve(self, most: int = BUDGET) -> None:
        """Handle what has arrived, in any thread.  `ended` tells that the backend closed its end.

        Raises RemoteProtocolError; the connection is of no use afterwards.
        """
        try:
            with self._lock:
                for _ in range(0 if self._muted else most):
                    if not self._serve_one():
                        break
        except RemoteProtocolError as error:
            raise type(error)(f"the backend's own request: {error}") from None

    def _serve_one(self) -> bool:
        """Whether there may be more."""
        try:
            message = self._channel.receive_now(self._responder.decoder)
        except BackendLost:
            self.ended = True
            return False
        if message is None:
            return False
        if self.observe is None:
            self._handle(message)
        else:
            self.observe(self._handle, message)
        return True

    def mute(self) -> None:
        """Once this has returned, nothing is done that the backend asks for."""
        with self._lock:
            self._muted = True

    def _handle(self, message: Message) -> int | None:
        """The status, if an ack was asked for."""
        self._responder.received(message)
        handler = self._handlers.get(message.request.name)
        try:
            status = handler(message) if handler else NOT_SUPPORTED
        finally:
            message.close()
        answer = self._responder.ack(status)
        if answer:
            # a peer that asks for acks and does not read them has filled the socket's buffer
            self._channel.send(answer, deadline=monotonic())
        return status if answer else None

    def close(self) -> None:
        """Close both ends."""
        self.mute()
        self._responder.decoder.close()
        self._channel.close()
        self._theirs.close()
