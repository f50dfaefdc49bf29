"""Gating, acks and reply matching, with frontend and backend wired to each other in memory."""

from __future__ import annotations

import pytest
from fakes.messages import replies_of, requests_of

from pyvmm.errors import LocalProtocolError, RemoteProtocolError
from pyvmm.vhost_user.codec import Decoder, Message
from pyvmm.vhost_user.messages import (
    BACKEND_REQUESTS,
    F_IOMMU_PLATFORM,
    F_PROTOCOL_FEATURES,
    FRONTEND_REQUESTS,
    PROTOCOL_FEATURES,
    Request,
    RequestTable,
)
from pyvmm.vhost_user.messages import ProtocolFeature as P
from pyvmm.vhost_user.payloads import U64, Config, Empty, Payload, VringState
from pyvmm.vhost_user.session import Negotiation, Requester, Responder

ALL = sum(PROTOCOL_FEATURES.values())
VIRTIO = F_PROTOCOL_FEATURES | F_IOMMU_PLATFORM | 0xFF


def closed(fd: int) -> None:
    raise AssertionError(f"descriptor {fd} was closed")


class Pair:
    """A requester and a responder, joined by bytes."""

    def __init__(self, table: RequestTable, features: int = ALL, virtio: int = VIRTIO) -> None:
        self.near = Negotiation()
        self.far = Negotiation(virtio, features)
        self.requester = Requester(table, self.near, closed)
        self.responder = Responder(table, self.far, closed)

    def deliver(self, name: str, payload: Payload | None = None, fds: list[int] | None = None) -> Message:
        fds = fds or []
        data = self.requester.request(name, payload or Empty(), len(fds))
        message = feed(self.responder.decoder, data, fds)
        self.responder.received(message)
        return message

    def answer(self, data: bytes, fds: list[int] | None = None) -> Payload:
        return self.requester.reply(feed(self.requester.decoder, data, fds or []))

    def negotiate(self, features: int, virtio: int = VIRTIO) -> None:
        self.deliver("GET_FEATURES")
        self.answer(self.responder.reply(U64(virtio)))
        self.deliver("GET_PROTOCOL_FEATURES")
        self.answer(self.responder.reply(U64(ALL)))
        for name, value in (("SET_FEATURES", virtio), ("SET_PROTOCOL_FEATURES", features)):
            self.deliver(name, U64(value))
            assert self.responder.ack() == b""
            assert self.requester.awaiting is None


def feed(decoder: Decoder, data: bytes, fds: list[int]) -> Message:
    message = None
    while data:
        size = decoder.needed()
        message = decoder.feed(data[:size], fds)
        data, fds = data[size:], []
    assert isinstance(message, Message)
    return message


def agreed(table: RequestTable, features: int) -> Pair:
    """A pair in which both ends have already agreed upon everything."""
    pair = Pair(table)
    for side in (pair.near, pair.far):
        side.virtio_offered = side.virtio_acked = VIRTIO
        side.protocol_offered, side.protocol_acked = ALL, features
    return pair


ROWS = [(table, row) for table in (FRONTEND_REQUESTS, BACKEND_REQUESTS) for row in table]


def row_id(value: RequestTable | Request) -> str:
    return value.sender if isinstance(value, RequestTable) else value.name


@pytest.mark.parametrize(("table", "row"), ROWS, ids=row_id)
def test_every_request_is_delivered_and_answered(table: RequestTable, row: Request) -> None:
    acks_nothing = row.name in ("SET_FEATURES", "SET_PROTOCOL_FEATURES")
    for example, fds in requests_of(row):
        payload = U64(0) if acks_nothing else example
        pair = agreed(table, ALL)
        message = pair.deliver(row.name, payload, list(fds))
        assert (message.payload, message.take_fds()) == (payload, fds)
        assert pair.requester.awaiting is row
        if not row.reply:
            assert message.need_reply
            assert pair.answer(pair.responder.ack(5)) == U64(5)
        else:
            reply, reply_fds = replies_of(row)[0]
            assert not message.need_reply
            assert pair.answer(pair.responder.reply(reply, len(reply_fds)), list(reply_fds)) == reply
        assert pair.requester.awaiting is None


@pytest.mark.parametrize(("table", "row"), [c for c in ROWS if c[1].needs], ids=row_id)
def test_each_missing_feature_gates_both_ends(table: RequestTable, row: Request) -> None:
    payload, fds = requests_of(row)[0]
    dropped: list[int] = []
    for name, mask in PROTOCOL_FEATURES.items():
        if mask & row.needs:
            pair = agreed(table, ALL & ~mask)
            with pytest.raises(LocalProtocolError, match=name):
                pair.deliver(row.name, payload, list(fds))
            pair.near.protocol_acked = ALL
            pair.responder.decoder = Decoder(table, dropped.append)
            with pytest.raises(RemoteProtocolError, match=name):
                pair.deliver(row.name, payload, list(fds))
            assert dropped == fds
            dropped.clear()


def test_acks_begin_after_the_feature_is_acked() -> None:
    pair = Pair(FRONTEND_REQUESTS)
    pair.deliver("SET_OWNER")
    assert (pair.responder.ack(), pair.requester.awaiting) == (b"", None)
    pair.negotiate(P.REPLY_ACK)
    assert pair.deliver("SET_OWNER").need_reply
    assert pair.answer(pair.responder.ack()) == U64(0)


def test_without_reply_ack_only_own_replies_are_due() -> None:
    pair = Pair(FRONTEND_REQUESTS)
    pair.negotiate(P.CONFIG)
    pair.deliver("SET_CONFIG", Config(0, 0, b"x"))
    assert (pair.responder.ack(), pair.requester.awaiting) == (b"", None)
    pair.deliver("GET_CONFIG", Config(0, 0, b"\0"))
    assert pair.answer(pair.responder.reply(Empty())) == Empty()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("SET_FEATURES", 1 << 40, "0x10000000000, which was not offered"),
        ("SET_PROTOCOL_FEATURES", 1 << 63, "not offered"),
    ],
)
def test_only_what_was_offered_can_be_acked(name: str, value: int, reason: str) -> None:
    pair = Pair(FRONTEND_REQUESTS)
    pair.negotiate(0)
    with pytest.raises(LocalProtocolError, match=reason):
        pair.deliver(name, U64(value))
    pair.near.virtio_offered = pair.near.protocol_offered = (1 << 64) - 1
    with pytest.raises(RemoteProtocolError, match=reason):
        pair.deliver(name, U64(value))


def test_get_comes_before_set() -> None:
    pair = Pair(FRONTEND_REQUESTS)
    with pytest.raises(LocalProtocolError, match="before anything was offered"):
        pair.deliver("SET_FEATURES", U64(0))
    with pytest.raises(LocalProtocolError, match="did not offer"):
        pair.deliver("GET_PROTOCOL_FEATURES")
    pair.deliver("GET_FEATURES")
    pair.answer(pair.responder.reply(U64(VIRTIO)))
    with pytest.raises(LocalProtocolError, match="before anything was offered"):
        pair.deliver("SET_PROTOCOL_FEATURES", U64(0))


def test_enabling_needs_the_protocol_bit_acked() -> None:
    pair = Pair(FRONTEND_REQUESTS)
    pair.negotiate(0, virtio=VIRTIO)
    pair.deliver("SET_VRING_ENABLE", VringState(0, 1))
    pair = Pair(FRONTEND_REQUESTS)
    pair.deliver("GET_FEATURES")
    pair.answer(pair.responder.reply(U64(VIRTIO)))
    with pytest.raises(LocalProtocolError, match="before SET_FEATURES acked 0x40000000"):
        pair.deliver("SET_VRING_ENABLE", VringState(0, 1))


def test_a_lenient_end_lets_enabling_come_once_it_was_offered() -> None:
    """QEMU's network cards do that."""
    pair = Pair(FRONTEND_REQUESTS)
    pair.near.lenient = pair.far.lenient = True
    pair.deliver("GET_FEATURES")
    pair.answer(pair.responder.reply(U64(VIRTIO)))
    pair.deliver("SET_VRING_ENABLE", VringState(0, 1))
    pair.responder.ack()
    pair.far.virtio_offered = VIRTIO & ~(1 << 30)
    with pytest.raises(RemoteProtocolError, match="before SET_FEATURES acked 0x40000000"):
        pair.deliver("SET_VRING_ENABLE", VringState(0, 1))


def test_a_backend_may_know_its_offer_before_it_is_asked() -> None:
    """A frontend that reconnects does not ask again."""
    backend = Responder(FRONTEND_REQUESTS, Negotiation(VIRTIO, ALL), closed)
    frontend = agreed(FRONTEND_REQUESTS, 0).requester
    data = frontend.request("SET_PROTOCOL_FEATURES", U64(P.REPLY_ACK))
    backend.received(feed(backend.decoder, data, []))
    assert backend.negotiation.has(P.REPLY_ACK)


def test_one_request_at_a_time() -> None:
    pair = Pair(FRONTEND_REQUESTS)
    pair.deliver("GET_FEATURES")
    with pytest.raises(LocalProtocolError, match="while the reply to GET_FEATURES is due"):
        pair.requester.request("SET_OWNER")


def test_reply_to_something_else() -> None:
    pair = agreed(FRONTEND_REQUESTS, ALL)
    pair.deliver("GET_QUEUE_NUM")
    data = pair.responder.reply(U64(2))
    data = FRONTEND_REQUESTS.by_name["GET_FEATURES"].id.to_bytes(4, "little") + data[4:]
    with pytest.raises(RemoteProtocolError, match="GET_FEATURES where the reply to GET_QUEUE_NUM"):
        pair.answer(data)


def test_reply_that_nobody_asked_for() -> None:
    pair = agreed(FRONTEND_REQUESTS, ALL)
    pair.deliver("GET_FEATURES")
    data = pair.responder.reply(U64(2))
    pair.answer(data)
    with pytest.raises(RemoteProtocolError, match="nothing was due"):
        pair.answer(data)


def test_unknown_requests() -> None:
    pair = agreed(BACKEND_REQUESTS, ALL)
    with pytest.raises(LocalProtocolError, match="no backend request DANCE"):
        pair.requester.request("DANCE")
    message = feed(pair.responder.decoder, b"\xee\3\0\0\x09\0\0\0\0\0\0\0", [])
    pair.responder.received(message)
    assert not message.request.known
    assert pair.responder.ack(1)[:4] == b"\xee\3\0\0"


def test_responder_refuses_the_wrong_kind_of_answer() -> None:
    pair = agreed(FRONTEND_REQUESTS, ALL)
    pair.deliver("GET_FEATURES")
    with pytest.raises(LocalProtocolError, match="wants a reply"):
        pair.responder.ack()
    with pytest.raises(LocalProtocolError, match="no request to answer"):
        pair.responder.reply(U64(0))
    pair = agreed(FRONTEND_REQUESTS, ALL)
    pair.deliver("SET_OWNER")
    with pytest.raises(LocalProtocolError, match="no reply of its own"):
        pair.responder.reply(U64(0))


def test_responder_wants_an_answer_before_the_next_request() -> None:
    pair = Pair(FRONTEND_REQUESTS)
    first = pair.deliver("SET_OWNER")
    with pytest.raises(LocalProtocolError, match="SET_OWNER has not been answered"):
        pair.responder.received(first)
