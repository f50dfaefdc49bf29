"""What is fuzzed: codec, session, configuration space, a whole frontend, backend and proxy, option texts.

Each part turns an `Input` into calls and checks what must hold whatever comes.  `run` takes an
input's first byte as the choice of a part: errors of the documented classes are an end like any other,
everything else, and every descriptor left open, is a finding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from fuzz import backend, frontend, proxy
from fuzz.source import Input, Ledger, answer, descriptors, encoded, open_descriptors, payload

from pyvmm import config as cfg
from pyvmm import devices
from pyvmm.config_text import config_bytes
from pyvmm.errors import BackendLost, ConfigError, LocalProtocolError, ProtocolError, RemoteProtocolError
from pyvmm.vhost_user.client import Client
from pyvmm.vhost_user.codec import Decoder, Message, encode_reply, encode_request
from pyvmm.vhost_user.config_space import BackendConfig, LocalConfig
from pyvmm.vhost_user.messages import BACKEND_REQUESTS, FRONTEND_REQUESTS, HEADER
from pyvmm.vhost_user.messages import ProtocolFeature as P
from pyvmm.vhost_user.payloads import MAX_CONFIG, Raw
from pyvmm.vhost_user.session import Negotiation, Requester, Responder
from pyvmm.virtio import kinds

TABLES = (FRONTEND_REQUESTS, BACKEND_REQUESTS)
STEPS = 64  # calls in one run


# -- codec -------------------------------------------------------------------------------


def codec(source: Input) -> None:
    """Any stream in any pieces: the same messages, descriptors owned by one, each message can be sent."""
    what, count = source.byte(), source.byte() % 16
    pieces = [(source.byte(), source.byte() % 40) for _ in range(count)]
    stream = source.rest()
    table, replies = TABLES[what & 1], bool(what & 2)
    whole = _decode(table, replies, stream, pieces, 1 << 20)
    assert whole == _decode(table, replies, stream, pieces, 1 + (what >> 2)), "pieces changed the meaning"


def _decode(
    table: Any, replies: bool, stream: bytes, pieces: Sequence[tuple[int, int]], step: int
) -> list[tuple[Any, ...]]:
    """Messages and the error, in order; pieces are cut into `step` bytes."""
    ledger = Ledger()
    decoder = Decoder(table, ledger.close, replies=replies)
    seen: list[tuple[Any, ...]] = []
    try:
        for data, fds in _cut(stream, pieces, ledger):
            at = 0
            while at < len(data):
                size = min(decoder.needed(), step)
                message = decoder.feed(data[at : at + size], [] if at else fds)
                at += size
                if message is not None:
                    seen.append(_read(message, replies))
    except ProtocolError as error:
        seen.append((type(error), str(error)))
    decoder.close()
    assert not ledger.open, "descriptors were left open"
    return seen


def _cut(
    stream: bytes, pieces: Sequence[tuple[int, int]], ledger: Ledger
) -> Iterator[tuple[bytes, list[int]]]:
    """The stream as it arrives: descriptors come with the first byte of a piece."""
    for size, count in pieces:
        if stream[:size]:
            yield stream[:size], ledger.make(count)
        stream = stream[size:]
    yield stream, []


def _read(message: Message, replies: bool) -> tuple[Any, ...]:
    """What a message says; encoded again it says the same."""
    row, said, count = message.request, message.payload, len(message.fds)
    low, high = row.reply_fds if replies else row.fds
    assert low <= count <= high, f"{row.name} with {count} descriptors"
    if row.known or not isinstance(said, Raw):
        encode = encode_reply if replies else encode_request
        data = encode(row, said, count)
        assert type(said).decode(data[HEADER.size :]) == said
    message.close()
    return (row.id, said, count, message.need_reply)


# -- session -----------------------------------------------------------------------------


def session(source: Input) -> None:
    """A requester before a hostile peer, a responder before one, and both before each other."""
    what = source.byte()
    play = (_hostile_replies, _hostile_requests, _honest_pair)[what % 3]
    table = TABLES[what >> 7]
    ledger = Ledger()
    if table is BACKEND_REQUESTS:  # there the features have been agreed on elsewhere
        agreed = Negotiation(source.number(), source.number())
        agreed.virtio_acked, agreed.protocol_acked = source.number(), source.number()
        requester, responder = Requester(table, agreed, ledger.close), Responder(table, agreed, ledger.close)
    else:
        requester = Requester(table, Negotiation(), ledger.close)
        responder = Responder(table, Negotiation(source.number(), source.number()), ledger.close)
    try:
        play(source, requester, responder, ledger)
    finally:
        if responder.answering is not None:
            responder.answering.close()
        requester.decoder.close()
        responder.decoder.close()
        assert not ledger.open, "descriptors were left open"


def _hostile_replies(source: Input, requester: Requester, _: Responder, ledger: Ledger) -> None:
    for _ in range(STEPS):
        asked = _ask(source, requester)
        if asked is None or requester.awaiting is None:
            if not source:
                return
            continue
        data, count = answer(source, requester.table, requester.awaiting.id)
        for message in _feed(requester.decoder, data, ledger.make(count), ledger):
            requester.reply(message)
            message.close()


def _hostile_requests(source: Input, _: Requester, responder: Responder, ledger: Ledger) -> None:
    negotiation = responder.negotiation
    agreed = responder.table is FRONTEND_REQUESTS
    for _ in range(STEPS):
        row = responder.table.get(source.byte())
        said = payload(row.payload, source)
        count = source.byte() % 36
        data = HEADER.pack(row.id, 1 | (source.byte() & 8), len(encoded(said))) + encoded(said)
        data += source.take(source.byte() >> 4)
        for message in _feed(responder.decoder, data, ledger.make(count), ledger):
            responder.received(message)
            message.close()
            _reply(source, responder)
            if agreed:
                assert not negotiation.virtio_acked & ~(negotiation.virtio_offered or 0)
                assert not negotiation.protocol_acked & ~(negotiation.protocol_offered or 0)
        if not source:
            return


def _honest_pair(source: Input, requester: Requester, responder: Responder, ledger: Ledger) -> None:
    """What one end lets out the other end takes, in both directions."""
    while source:
        asked = _ask(source, requester)
        if asked is None:
            continue
        due = requester.awaiting
        data, count = asked
        try:
            (message,) = _feed(responder.decoder, data, ledger.make(count), ledger)
            responder.received(message)
            message.close()
            reply, count = _reply(source, responder)
            assert bool(reply) == (due is not None)
            for message in _feed(requester.decoder, reply, ledger.make(count), ledger):
                requester.reply(message)
                message.close()
        except RemoteProtocolError as error:
            raise AssertionError(f"honest ends disagree: {error}") from error


def _ask(source: Input, requester: Requester) -> tuple[bytes, int] | None:
    """Some request and its number of descriptors, or None where it must not be sent now."""
    row = requester.table.get(source.byte())
    said, count = payload(row.payload, source), source.byte() % 36
    before = (requester.awaiting, vars(requester.negotiation).copy())
    try:
        return requester.request(row.name, said, count), count
    except LocalProtocolError:
        assert before == (requester.awaiting, vars(requester.negotiation)), "a refusal changed something"
        return None


def _reply(source: Input, responder: Responder) -> tuple[bytes, int]:
    message = responder.answering
    assert message is not None
    row = message.request
    if not row.reply:
        return responder.ack(source.number()), 0
    said = payload(row.reply[source.byte() % len(row.reply)], source)
    count = source.byte() % 3
    return responder.reply(said, count), count


def _feed(decoder: Decoder, data: bytes, fds: list[int], ledger: Ledger) -> list[Message]:
    """Feed everything; the messages that became whole."""
    found: list[Message] = []
    try:
        while data:
            size = decoder.needed()
            message = decoder.feed(data[:size], fds)
            data, fds = data[size:], []
            if message is not None:
                found.append(message)
    except ProtocolError:
        for message in found:
            message.close()
        raise
    for fd in fds:  # of a peer that sent nothing with them
        ledger.close(fd)
    for message in found[1:]:  # one at a time is all that either end takes
        message.close()
    return found[:1]


# -- configuration space -----------------------------------------------------------------


class Peer:
    """A Channel without a socket: what it receives is made of the input."""

    def __init__(self, source: Input) -> None:
        self._source = source
        self._asked = 0
        self._waiting = b""
        self._fds: list[int] = []

    def send(self, data: bytes, fds: Sequence[int] = (), deadline: float = 0.0) -> None:
        """Look which request this is."""
        self._asked = HEADER.unpack_from(data)[0]

    def receive(self, decoder: Decoder, deadline: float, aside: None = None) -> Message:
        """The next answer, or none."""
        while True:
            if not self._waiting:
                self._fill()
            size = decoder.needed()
            data, self._waiting = self._waiting[:size], self._waiting[size:]
            fds, self._fds = self._fds, []
            message = decoder.feed(data, fds)
            if message is not None:
                return message

    def _fill(self) -> None:
        if not self._source:
            raise BackendLost("it did not answer in time")
        self._waiting, count = answer(self._source, FRONTEND_REQUESTS, self._asked)
        if not self._waiting:
            raise BackendLost("the connection was closed")
        self._fds = descriptors(count)

    def shutdown(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """Descriptors that nobody received."""
        for fd in self._fds:
            os.close(fd)


def config(source: Input) -> None:
    """A driver's accesses before a backend that answers anything."""
    what, size = source.byte(), min(source.number(), MAX_CONFIG)
    peer = Peer(source)
    client = Client(peer, 0.0)  # type: ignore[arg-type]
    client.negotiation.protocol_acked = P.CONFIG | (P.REPLY_ACK if what & 1 else 0)
    try:
        if what & 2:
            space = LocalConfig(source.take(size % 64))
        else:
            space = BackendConfig(client, size, ("forward", "whole", "absorb")[what % 3])
        assert space.size <= size
        while source:
            _access(source, client, space)
    finally:
        client.close()


def _access(source: Input, client: Client, space: LocalConfig) -> None:
    size, where = space.size, source.byte()
    offset, width = source.number() % (MAX_CONFIG + 64), 1 << (where & 3)
    try:
        if where & 4:
            space.write(client, offset, source.take(width).ljust(width, b"\0"))
        else:
            assert len(space.read(client, offset, width)) == width
    finally:
        assert space.size == size and len(space.last(offset, width)) == width


# -- option texts ------------------------------------------------------------------------

OPTIONS: tuple[Callable[[str], object], ...] = (
    cfg.cpus,
    cfg.memory,
    cfg.generic,
    cfg.disk,
    cfg.fs,
    cfg.rng,
    cfg.protocol,
    lambda text: cfg.stream("--serial", text),
    lambda text: cfg.seconds("--deadline", text),
    lambda text: devices.find_kind("--generic-vhost-user", text),
    lambda text: config_bytes("--generic-vhost-user", text.replace("@", "["), kinds.of(26)),
)


def option(source: Input) -> None:
    """Any text after any option."""
    read = OPTIONS[source.byte() % len(OPTIONS)]
    read(source.rest().decode(errors="surrogateescape"))


# -- everything --------------------------------------------------------------------------


class Part(NamedTuple):
    """A function and what it may raise."""

    play: Callable[[Input], None]
    ends: tuple[type[Exception], ...] = (ProtocolError,)


PARTS = {
    "codec": Part(codec),
    "session": Part(session),
    "config": Part(config),
    "frontend": Part(frontend.play, (ProtocolError, ConfigError)),
    "option": Part(option, (ConfigError,)),
    "backend": Part(backend.play, ()),
    "proxy": Part(proxy.play, ()),
}
NAMES = tuple(PARTS)


def run(data: bytes, only: str = "") -> str:
    """Play one input (of the part `only`, whatever its first byte says); how it ended, in words."""
    source = Input(data)
    chosen = NAMES[source.byte() % len(NAMES)]
    part = PARTS[only or chosen]
    before = open_descriptors()
    end = "done"
    try:
        part.play(source)
    except part.ends as error:
        end = f"{type(error).__name__}: {error}"
        assert "\n" not in end or part.play is option, end  # whose words are the user's own
    left = open_descriptors() - before
    assert not left, f"{left} descriptors were left open"
    return end
