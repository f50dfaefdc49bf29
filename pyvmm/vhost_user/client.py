"""One live dialogue with a backend: a request goes out, its answer comes back, in time.

It joins the session's rules to the channel's bytes and opens the dialogue (owner, features,
protocol features, number of queues).  It keeps nothing that outlives the connection, and
must not know what the device is: that is the frontend's.
"""

from __future__ import annotations

import os
from time import monotonic

from ..errors import BackendLost, RemoteProtocolError
from .channel import Channel, close_all
from .messages import F_PROTOCOL_FEATURES, FRONTEND_REQUESTS, ProtocolFeature
from .payloads import U64
from .session import NOTHING, Negotiation, Requester

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    from ..virtio.queue import QueueSetup
    from .channel import Aside
    from .codec import Message
    from .payloads import MemRegion, Payload

    Kind = TypeVar("Kind", bound=Payload)
    Running = tuple[tuple[QueueSetup, int], ...]  # and where each ring began
    Exchange = tuple[Payload, Message | None]
    Converse = Callable[[str, Payload, Sequence[int]], Exchange]
    Observe = Callable[[Converse, str, Payload, Sequence[int]], Exchange]


class Refusal(BackendLost):
    """The backend acked a request with a status other than 0."""


class Client:
    """The frontend's end of a connection; not thread-safe, its owner serialises calls."""

    def __init__(self, channel: Channel, deadline: float) -> None:
        self.channel = channel
        self.deadline = deadline
        self.aside: Aside | None = None  # served while a reply is awaited
        self.observe: Observe | None = None  # does what `_converse` does, and looks on
        self.negotiation = Negotiation()
        self.started = False  # the device runs, or may do so
        self.running: Running = ()  # the rings that do
        self.regions: tuple[MemRegion, ...] = ()  # what the backend has in its memory slots
        self._requester = Requester(FRONTEND_REQUESTS, self.negotiation, os.close)

    def call(self, name: str, payload: Payload = NOTHING, fds: Sequence[int] = ()) -> Payload:
        """Send a request and wait for its reply or ack, if one is due.

        Returns the reply, or Empty when none is due.  Raises BackendLost at the deadline or when
        the connection ends, Refusal when the ack is not 0, RemoteProtocolError for nonsense.
        """
        reply, message = self._exchange(name, payload, fds)
        if message is not None:
            message.close()
        return reply

    def _exchange(self, name: str, payload: Payload, fds: Sequence[int] = ()) -> Exchange:
        if self.observe is None:
            return self._converse(name, payload, fds)
        return self.observe(self._converse, name, payload, fds)

    def _converse(self, name: str, payload: Payload, fds: Sequence[int]) -> Exchange:
        requester = self._requester
        data = requester.request(name, payload, len(fds))
        due = monotonic() + self.deadline
        try:
            self.channel.send(data, fds, due)
            row = requester.awaiting
            if row is None:
                return NOTHING, None
            message = self.channel.receive(requester.decoder, due, self.aside)
        except RemoteProtocolError as error:
            raise type(error)(f"{name}: {error}") from None
        reply = requester.reply(message)
        if not row.reply and isinstance(reply, U64) and reply.value:
            raise Refusal(f"the backend refused {name} (status {reply.value})")
        return reply, message

    def ask(self, name: str, payload: Payload, kind: type[Kind]) -> Kind:
        """Like `call`, for a request whose reply must be a `kind`."""
        reply = self.call(name, payload)
        if not isinstance(reply, kind):
            raise RemoteProtocolError(f"{name}: the backend reports an error")
        return reply

    def ask_with_fds(self, name: str, payload: Payload, kind: type[Kind]) -> tuple[Kind, list[int]]:
        """Like `ask`, for a reply that brings descriptors: the caller closes them."""
        reply, message = self._exchange(name, payload)
        fds = message.take_fds() if message is not None else []
        if not isinstance(reply, kind):
            close_all(fds)
            raise RemoteProtocolError(f"{name}: the backend reports an error")
        return reply, fds

    def open(self, choose: Callable[[int], int]) -> None:
        """Become the owner and agree on features; `choose` picks from the protocol features offered."""
        self.call("SET_OWNER")
        offered = self.ask("GET_FEATURES", NOTHING, U64).value
        if offered & F_PROTOCOL_FEATURES:
            # SET without GET makes some backends expect acks that others do not send
            protocol = self.ask("GET_PROTOCOL_FEATURES", NOTHING, U64).value
            self.call("SET_PROTOCOL_FEATURES", U64(choose(protocol)))

    def queue_limit(self) -> int | None:
        """How many queues the backend has; None when it does not say."""
        if not self.negotiation.has(ProtocolFeature.MQ):
            return None
        return self.ask("GET_QUEUE_NUM", NOTHING, U64).value

    def slot_limit(self) -> int | None:
        """How many pieces of memory the backend takes; None when it does not say."""
        if not self.negotiation.has(ProtocolFeature.CONFIGURE_MEM_SLOTS):
            return None
        return self.ask("GET_MAX_MEM_SLOTS", NOTHING, U64).value

    def barrier(self) -> None:
        """Return once the backend has carried out everything sent before.

        With acks it has.  Without, a request with an own reply is answered only after what came before
        it, and rings must be enabled before the driver may ring.
        """
        if not self.negotiation.has(ProtocolFeature.REPLY_ACK):
            self.call("GET_FEATURES")

    def close(self) -> None:
        """Close the connection."""
        self._requester.decoder.close()
        self.channel.close()
