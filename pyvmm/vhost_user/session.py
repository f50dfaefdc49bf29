"""Who may say what next: negotiation, gating, acks and matching replies, for both ends.

Pure state machines over `messages` and `codec`.  `Negotiation` is what one connection has
agreed upon and is shared by its two directions: a `Requester` sends requests and judges
the replies, a `Responder` judges requests and forms the replies.  The frontend is
Requester of FRONTEND_REQUESTS and Responder of BACKEND_REQUESTS; a backend is the other
way round.  Nothing here knows sockets, deadlines or what a request does.
"""

from __future__ import annotations

from ..errors import LocalProtocolError, RemoteProtocolError
from .codec import Decoder, encode_ack, encode_reply, encode_request
from .messages import ProtocolFeature, protocol_feature_names
from .payloads import U64, Empty

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .codec import Message
    from .messages import Request, RequestTable
    from .payloads import Payload

NOTHING = Empty()

# requests and replies that settle something: where the number in them is kept
SETTLED_BY_REQUEST = {"SET_FEATURES": "virtio_acked", "SET_PROTOCOL_FEATURES": "protocol_acked"}
SETTLED_BY_REPLY = {"GET_FEATURES": "virtio_offered", "GET_PROTOCOL_FEATURES": "protocol_offered"}
# what is acked must have been offered
OFFER_OF = {"SET_FEATURES": "virtio_offered", "SET_PROTOCOL_FEATURES": "protocol_offered"}


class Negotiation:
    """The four feature words of a connection.  A backend starts it with what it offers.

    While `lenient`, what needs an acked feature may come as soon as that is offered: QEMU enables the
    virtqueues of a network card before the guest's driver has accepted any.
    """

    lenient = False

    def __init__(self, virtio_offered: int | None = None, protocol_offered: int | None = None) -> None:
        self.virtio_offered = virtio_offered
        self.protocol_offered = protocol_offered
        self.virtio_acked = 0
        self.protocol_acked = 0

    def has(self, features: int) -> bool:
        """Whether all these protocol features are acked."""
        return not features & ~self.protocol_acked

    def problem(self, request: Request, payload: Payload) -> str | None:
        """Why `request` may not be sent now, or None."""
        missing = request.needs & ~self.protocol_acked
        if missing:
            return f"{request.name} without {protocol_feature_names(missing)}"
        if request.offered & ~(self.virtio_offered or 0):
            return f"{request.name} though GET_FEATURES did not offer {request.offered:#x}"
        if request.acked & ~(self.virtio_offered or 0 if self.lenient else self.virtio_acked):
            return f"{request.name} before SET_FEATURES acked {request.acked:#x}"
        return self._unoffered(request, payload)

    def _unoffered(self, request: Request, payload: Payload) -> str | None:
        offer = OFFER_OF.get(request.name)
        if offer is None or not isinstance(payload, U64):
            return None
        offered: int | None = getattr(self, offer)
        if offered is None:
            return f"{request.name} before anything was offered"
        extra = payload.value & ~offered
        return f"{request.name} acks {extra:#x}, which was not offered" if extra else None

    def requested(self, request: Request, payload: Payload) -> None:
        """Remember what `request` settles."""
        self._settle(SETTLED_BY_REQUEST.get(request.name), payload)

    def replied(self, request: Request, payload: Payload) -> None:
        """Remember what the reply to `request` settles."""
        self._settle(SETTLED_BY_REPLY.get(request.name), payload)

    def _settle(self, word: str | None, payload: Payload) -> None:
        if word is not None and isinstance(payload, U64):
            setattr(self, word, payload.value)


class Requester:
    """The end that asks: forms requests, one at a time, and judges what comes back."""

    def __init__(
        self, table: RequestTable, negotiation: Negotiation, close_fd: Callable[[int], None]
    ) -> None:
        self.table = table
        self.negotiation = negotiation
        self.decoder = Decoder(table, close_fd, replies=True)
        self.awaiting: Request | None = None

    def request(self, name: str, payload: Payload = NOTHING, fd_count: int = 0) -> bytes:
        """The bytes of a request; `awaiting` says afterwards whether a reply is due."""
        row = self.table.by_name.get(name)
        if row is None:
            raise LocalProtocolError(f"there is no {self.table.sender} request {name}")
        if self.awaiting is not None:
            raise LocalProtocolError(f"{name} while the reply to {self.awaiting.name} is due")
        problem = self.negotiation.problem(row, payload)
        if problem:
            raise LocalProtocolError(problem)
        # SET_PROTOCOL_FEATURES itself is not acked: the feature holds from the next request on
        need_ack = not row.reply and self.negotiation.has(ProtocolFeature.REPLY_ACK)
        data = encode_request(row, payload, fd_count, need_ack)
        self.negotiation.requested(row, payload)
        if row.reply or need_ack:
            self.awaiting = row
        return data

    def reply(self, message: Message) -> Payload:
        """Judge a reply; its payload.  The caller looks at an ack's status itself."""
        due = self.awaiting
        if due is None or message.request is not due:
            message.close()
            wanted = f"the reply to {due.name}" if due else "nothing"
            raise RemoteProtocolError(f"reply to {message.request.name} where {wanted} was due")
        self.awaiting = None
        self.negotiation.replied(due, message.payload)
        return message.payload


class Responder:
    """The end that is asked: judges requests, one at a time, and forms the replies."""

    def __init__(
        self, table: RequestTable, negotiation: Negotiation, close_fd: Callable[[int], None]
    ) -> None:
        self.table = table
        self.negotiation = negotiation
        self.decoder = Decoder(table, close_fd)
        self.answering: Message | None = None

    def received(self, message: Message) -> None:
        """Judge a request.  An unknown one passes: the caller decides what it costs."""
        if self.answering is not None:
            raise LocalProtocolError(f"{self.answering.request.name} has not been answered")
        problem = self.negotiation.problem(message.request, message.payload)
        if problem:
            message.close()
            raise RemoteProtocolError(problem)
        self.negotiation.requested(message.request, message.payload)
        self.answering = message

    def reply(self, payload: Payload, fd_count: int = 0) -> bytes:
        """The bytes of the own reply that the request's row lists."""
        row = self._answered().request
        if not row.reply:
            raise LocalProtocolError(f"{row.name} has no reply of its own")
        data = encode_reply(row, payload, fd_count)
        self.negotiation.replied(row, payload)
        return data

    def ack(self, status: int = 0) -> bytes:
        """The bytes of the ack, empty when none was asked for; 0 is success."""
        message = self._answered()
        if message.request.reply:
            raise LocalProtocolError(f"{message.request.name} wants a reply, not an ack")
        return encode_ack(message.request, status) if message.need_reply else b""

    def _answered(self) -> Message:
        if self.answering is None:
            raise LocalProtocolError("there is no request to answer")
        message, self.answering = self.answering, None
        return message
