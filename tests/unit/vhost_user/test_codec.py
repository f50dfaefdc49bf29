"""Every row of the request tables through encoder and decoder, and the decoder under abuse."""

from __future__ import annotations

import pytest
from fakes.messages import EXAMPLES, replies_of, requests_of
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import LocalProtocolError, ProtocolError, RemoteProtocolError
from pyvmm.vhost_user import payloads
from pyvmm.vhost_user.codec import Decoder, Message, encode_ack, encode_reply, encode_request
from pyvmm.vhost_user.messages import (
    BACKEND_REQUESTS,
    FRONTEND_REQUESTS,
    HEADER,
    MAX_FDS,
    PROTOCOL_FEATURES,
    REQUESTS,
    ProtocolFeature,
    Request,
    RequestTable,
    protocol_feature_names,
)
from pyvmm.vhost_user.payloads import U64, Config, Empty, MemTable, Payload, VringFile, VringState

ROW = FRONTEND_REQUESTS.by_name
TABLES = (FRONTEND_REQUESTS, BACKEND_REQUESTS)
CASES = [
    (table, row, payload, fds, replies)
    for table in TABLES
    for row in table
    for replies, choices in ((False, requests_of(row)), (True, replies_of(row)))
    for payload, fds in choices
]


def case_id(value: object) -> str | None:
    names = {RequestTable: "sender", Request: "name"}
    if isinstance(value, Payload):
        return type(value).__name__
    name = names.get(type(value))
    return getattr(value, name) if name else None


def takes_no_more(row: Request, payload: Payload, fds: list[int], replies: bool) -> bool:
    """Whether one descriptor more than the example's is against the row."""
    return payload.fd_count() is not None or len(fds) == (row.reply_fds if replies else row.fds)[1]


class Wire:
    """Feeds bytes to a decoder the way a socket would and records closed descriptors."""

    def __init__(self, table: RequestTable, *, replies: bool = False) -> None:
        self.closed: list[int] = []
        self.decoder = Decoder(table, self.closed.append, replies=replies)

    def feed(self, data: bytes, fds: list[int], step: int = 1 << 20) -> tuple[Message | None, bytes]:
        """Feed until a message is whole; it and the bytes left over."""
        while data:
            size = min(self.decoder.needed(), step, len(data))
            message = self.decoder.feed(data[:size], fds)
            data, fds = data[size:], []
            if message is not None:
                return message, data
        return None, b""


def encode(row: Request, payload: Payload, fds: list[int], replies: bool) -> bytes:
    if replies:
        return encode_reply(row, payload, len(fds))
    return encode_request(row, payload, len(fds))


@pytest.mark.parametrize(("payload", "expected"), EXAMPLES)
def test_payload_layout(payload: Payload, expected: str) -> None:
    data = bytes.fromhex(expected)
    assert payload.encode() == data
    assert type(payload).decode(data) == payload
    assert payload.fits(len(data))


def test_every_payload_class_has_an_example() -> None:
    classes = {c for c in vars(payloads).values() if isinstance(c, type) and issubclass(c, Payload)}
    assert classes - {Payload, payloads.MemRegion} == {type(payload) for payload, _ in EXAMPLES}


@pytest.mark.parametrize(("table", "row", "payload", "fds", "replies"), CASES, ids=case_id)
@pytest.mark.parametrize("step", [1 << 20, 1, 7])
def test_round_trip(
    table: RequestTable, row: Request, payload: Payload, fds: list[int], replies: bool, step: int
) -> None:
    wire = Wire(table, replies=replies)
    message, rest = wire.feed(encode(row, payload, fds, replies) + b"trailing", list(fds), step)
    assert message is not None
    assert (message.request, message.payload, message.fds) == (row, payload, fds)
    assert (rest, wire.closed, wire.decoder.idle) == (b"trailing", [], True)
    message.close()
    assert wire.closed == fds


@pytest.mark.parametrize(
    ("table", "row", "payload", "fds", "replies"),
    [case for case in CASES if takes_no_more(*case[1:])],
    ids=case_id,
)
def test_one_descriptor_too_many(
    table: RequestTable, row: Request, payload: Payload, fds: list[int], replies: bool
) -> None:
    wire = Wire(table, replies=replies)
    with pytest.raises(RemoteProtocolError, match="descriptors"):
        wire.feed(encode(row, payload, fds, replies), [*fds, 999])
    assert sorted(wire.closed) == [*fds, 999]


@pytest.mark.parametrize("row", REQUESTS, ids=lambda row: row.name)
def test_missing_descriptor(row: Request) -> None:
    table = FRONTEND_REQUESTS if row in FRONTEND_REQUESTS.rows else BACKEND_REQUESTS
    for payload, fds in requests_of(row):
        if fds:
            data = encode_request(row, payload, len(fds))
            with pytest.raises(RemoteProtocolError, match="descriptors"):
                Wire(table).feed(data, fds[:-1])


@pytest.mark.parametrize("flags", [0, 2, 3, 1 | 1 << 2, 1 | 1 << 4, 1 | 1 << 31, 0xD])
def test_wrong_request_flags(flags: int) -> None:
    with pytest.raises(RemoteProtocolError, match="flags"):
        Wire(FRONTEND_REQUESTS).feed(HEADER.pack(1, flags, 0), [])


@pytest.mark.parametrize("flags", [0, 1, 4, 6, 9, 0xD, 0x15, 0xFFFFFFFF])
def test_wrong_reply_flags(flags: int) -> None:
    with pytest.raises(RemoteProtocolError, match="flags"):
        Wire(FRONTEND_REQUESTS, replies=True).feed(HEADER.pack(1, flags, 8), [])


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("GET_FEATURES", 1),
        ("SET_FEATURES", 7),
        ("SET_MEM_TABLE", 9),
        ("SET_MEM_TABLE", 4),
        ("SET_MEM_TABLE", 8 + 33 * 32),
        ("GET_CONFIG", 11),
        ("GET_CONFIG", 12 + 4097),
        ("SET_VRING_ADDR", 0xFFFFFFFF),
    ],
)
def test_wrong_size_is_refused_before_the_payload(name: str, size: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"{name} with {size} bytes"):
        Wire(FRONTEND_REQUESTS).feed(HEADER.pack(ROW[name].id, 1, size), [])


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("SET_MEM_TABLE", bytes.fromhex("0100000000000000")),
        ("SET_CONFIG", bytes.fromhex("00000000 05000000 00000000 aabb")),
        ("SET_VRING_KICK", bytes.fromhex("0002000000000000")),
    ],
)
def test_contradicting_fields(name: str, body: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match=name):
        Wire(FRONTEND_REQUESTS).feed(HEADER.pack(ROW[name].id, 1, len(body)) + body, [])


def test_unknown_request_is_handed_on_and_unknown_reply_is_not() -> None:
    message, _ = Wire(BACKEND_REQUESTS).feed(HEADER.pack(1006, 9, 3) + b"abc", [5])
    assert message is not None and not message.request.known
    assert (message.need_reply, message.payload.encode(), message.fds) == (True, b"abc", [5])
    with pytest.raises(RemoteProtocolError, match="unknown request 1006"):
        Wire(FRONTEND_REQUESTS, replies=True).feed(HEADER.pack(1006, 5, 0), [])


def test_descriptors_are_bounded_before_the_header_is_whole() -> None:
    wire = Wire(FRONTEND_REQUESTS)
    with pytest.raises(RemoteProtocolError, match="33 descriptors"):
        wire.feed(b"\0", list(range(MAX_FDS + 1)))
    assert len(wire.closed) == MAX_FDS + 1


def test_a_broken_decoder_stays_broken_and_closes_what_comes_later() -> None:
    wire = Wire(FRONTEND_REQUESTS)
    for fds in ([], [7]):
        with pytest.raises(RemoteProtocolError, match="flags"):
            wire.decoder.feed(HEADER.pack(1, 0, 0), fds)
    assert wire.closed == [7]


def test_close_in_the_middle_of_a_message() -> None:
    wire = Wire(FRONTEND_REQUESTS)
    wire.feed(encode_request(ROW["SET_BACKEND_REQ_FD"], Empty(), 1)[:5], [42])
    assert not wire.decoder.idle
    wire.decoder.close()
    assert wire.closed == [42]


def test_feeding_more_than_needed_is_our_own_fault() -> None:
    with pytest.raises(LocalProtocolError):
        Decoder(FRONTEND_REQUESTS, lambda fd: None).feed(b"\0" * 13)


def test_taken_descriptors_are_not_closed() -> None:
    wire = Wire(FRONTEND_REQUESTS)
    message, _ = wire.feed(encode_request(ROW["SET_LOG_FD"], Empty(), 1), [42])
    assert message is not None and message.take_fds() == [42]
    message.close()
    assert wire.closed == []


def test_ack_is_a_reply_of_any_request() -> None:
    for row in FRONTEND_REQUESTS:
        if not row.reply:
            message, _ = Wire(FRONTEND_REQUESTS, replies=True).feed(encode_ack(row, 3), [])
            assert message is not None and message.payload == U64(3)


@pytest.mark.parametrize(
    ("name", "payload", "fds"),
    [
        ("SET_FEATURES", U64(1 << 64), 0),
        ("SET_FEATURES", U64(-1), 0),
        ("SET_FEATURES", VringState(0, 0), 0),
        ("SET_VRING_KICK", VringFile(256, True), 1),
        ("SET_VRING_KICK", VringFile(0, True), 0),
        ("SET_VRING_KICK", VringFile(0, False), 1),
        ("SET_MEM_TABLE", MemTable(()), 1),
        ("GET_CONFIG", Config(0, 0, bytes(4097)), 0),
        ("SET_LOG_FD", Empty(), 0),
    ],
)
def test_encoder_refuses(name: str, payload: Payload, fds: int) -> None:
    with pytest.raises(LocalProtocolError, match=name):
        encode_request(ROW[name], payload, fds)


def test_reply_must_be_one_that_the_row_lists() -> None:
    assert encode_reply(ROW["GET_CONFIG"], Empty())
    with pytest.raises(LocalProtocolError):
        encode_reply(ROW["GET_CONFIG"], U64(0))


def test_rows_have_unique_numbers_and_names() -> None:
    for table in TABLES:
        assert len(table.by_id) == len(table.by_name) == len(table.rows)
        assert all(low <= high <= MAX_FDS for row in table for low, high in (row.fds, row.reply_fds))


def test_protocol_feature_names() -> None:
    assert PROTOCOL_FEATURES["SHMEM"] == 1 << 22
    assert protocol_feature_names(ProtocolFeature.MQ | ProtocolFeature.CONFIG | 1 << 40) == "MQ|CONFIG|bit 40"
    assert protocol_feature_names(0) == "none"


@given(
    table=st.sampled_from(TABLES),
    replies=st.booleans(),
    number=st.integers(0, 50) | st.integers(0, 0xFFFFFFFF),
    flags=st.sampled_from([1, 5, 9]) | st.integers(0, 0xFFFFFFFF),
    size=st.sampled_from([0, 8, 12, 16, 24, 32, 40, 72, 2056]) | st.integers(0, 0xFFFFFFFF),
    body=st.binary(max_size=200),
    fds=st.integers(0, 40),
    step=st.integers(1, 64),
)
def test_decoder_returns_or_raises_protocol_error(
    table: RequestTable, replies: bool, number: int, flags: int, size: int, body: bytes, fds: int, step: int
) -> None:
    wire = Wire(table, replies=replies)
    given_fds = list(range(fds))
    owned: list[int] = []
    try:
        message, _ = wire.feed(HEADER.pack(number, flags, size) + body, given_fds, step)
        if message is not None:
            owned = message.take_fds()
    except ProtocolError:
        pass
    wire.decoder.close()
    assert sorted(wire.closed + owned) == given_fds, "every descriptor has one owner"


@given(st.binary(max_size=400), st.booleans())
def test_decoder_survives_any_bytes(data: bytes, replies: bool) -> None:
    wire = Wire(FRONTEND_REQUESTS, replies=replies)
    try:
        while data:
            _, data = wire.feed(data, [])
    except ProtocolError:
        pass
