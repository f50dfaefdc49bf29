"""What is shown of messages: a whole dialogue word for word, and every message of the tables."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from time import monotonic, sleep
from typing import Any

import pytest
from fakes import backend as fake
from fakes.backend import FakeBackend, FakeKind, Surroundings, no_new_fds
from fakes.messages import replies_of, requests_of

from pyvmm.vhost_user.codec import Message
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.vhost_user.messages import BACKEND_REQUESTS, FRONTEND_REQUESTS, REQUESTS, Request
from pyvmm.vhost_user.payloads import U64, Config, MemRegion, MemTable, Payload, ShmemConfig, VringFile
from pyvmm.vhost_user.trace import ARROWS, Event, Trace, as_json, as_text
from pyvmm.virtio.queue import QueueSetup

MESSAGE = ("frontend", "frontend", "request", "NAME")


class Dialogue:
    """A frontend that is traced, its backend, and the lines.  The clock goes a millisecond a look."""

    def __init__(self, form: str, **options: Any) -> None:
        self.around = Surroundings()
        self.lines: list[str] = []
        ticks = count()
        trace = Trace(self.lines.append, form, lambda: next(ticks) / 1000)
        self.backend = FakeBackend(**options)
        self.frontend = Frontend(
            self.backend.connect, FakeKind(), (64,), None, self.around.ram, self.around.loop,
            name="dev", trace=trace.device("dev"),
        )  # fmt: skip

    def close(self) -> None:
        self.around.stop()
        self.frontend.close()
        self.backend.close()
        self.around.close()


@pytest.fixture
def dialogues() -> Iterator[list[Dialogue]]:
    with no_new_fds():
        made: list[Dialogue] = []
        yield made
        for dialogue in made:
            dialogue.close()


GOLDEN = """\
    0.001000 dev -> SET_OWNER
    0.002000 dev -> GET_FEATURES
    0.003000 dev <- GET_FEATURES bit 0|bit 5|LOG_ALL|PROTOCOL_FEATURES|VERSION_1, 1000 us
    0.004000 dev -> GET_PROTOCOL_FEATURES
    0.005000 dev <- GET_PROTOCOL_FEATURES {offered}, 1000 us
    0.006000 dev -> SET_PROTOCOL_FEATURES {acked}
    0.007000 dev -> SET_BACKEND_REQ_FD +1 fd
    0.008000 dev <- SET_BACKEND_REQ_FD ack 0, 1000 us
    0.009000 dev -> GET_QUEUE_NUM
    0.010000 dev <- GET_QUEUE_NUM value=4, 1000 us
    0.011000 dev -> GET_CONFIG offset=0 flags=0 data=00000000000000000000000000000000
    0.012000 dev <- GET_CONFIG offset=0 flags=0 data=000102030405060708090a0b0c0d0e0f, 1000 us
    0.013000 dev <= CONFIG_CHANGE_MSG need_reply
    0.014000 dev => CONFIG_CHANGE_MSG ack 0, 1000 us
    0.015000 dev -> SET_CONFIG offset=4 flags=0 data=61
    0.016000 dev <- SET_CONFIG failed: the backend refused SET_CONFIG (status 22), 1000 us
    0.017000 dev -> GET_CONFIG offset=0 flags=0 data=00000000000000000000000000000000
    0.018000 dev <- GET_CONFIG failed: GET_CONFIG: the connection was closed, 1000 us
"""


def test_a_dialogue_word_for_word(dialogues: list[Dialogue]) -> None:
    virtio = 1 << 0 | 1 << 5 | 1 << 26 | 1 << 30 | 1 << 32
    script = {"SET_CONFIG": fake.status(22), ("GET_CONFIG", 1): fake.hang_up}
    dialogue = Dialogue("text", virtio=virtio, script=script)
    dialogues.append(dialogue)
    dialogue.frontend.start_watching()
    dialogue.around.run()
    dialogue.backend.ask("CONFIG_CHANGE_MSG")
    await_lines(dialogue, 14)
    dialogue.frontend.write_config(4, b"a")
    dialogue.frontend.read_config(0, 1)
    found = "".join(dialogue.lines)
    offered, acked = (
        next(line.split()[-1 - back] for line in dialogue.lines if name in line and arrow in line).rstrip(",")
        for name, arrow, back in (("GET_PROTO", "<-", 2), ("SET_PROTO", "->", 0))
    )
    assert {"MQ", "REPLY_ACK", "CONFIG"} <= set(acked.split("|")) < set(offered.split("|"))
    assert found == GOLDEN.format(offered=offered, acked=acked)


def await_lines(dialogue: Dialogue, number: int) -> None:
    due = monotonic() + 10
    while len(dialogue.lines) < number:
        assert monotonic() < due, dialogue.lines
        sleep(0.002)


def test_the_same_as_json(dialogues: list[Dialogue]) -> None:
    dialogue = Dialogue("json")
    dialogues.append(dialogue)
    events = [json.loads(line) for line in dialogue.lines]
    assert [event["message"] for event in events if event["sender"] == "frontend"] == dialogue.backend.names
    assert events[0] == {
        **{"at": 0.001, "device": "dev", "channel": "frontend", "sender": "frontend", "kind": "request"},
        **{"message": "SET_OWNER", "payload": {}, "fds": 0, "need_reply": False, "took": None},
        **{"features": None, "error": ""},
    }
    offered = next(event for event in events if event["kind"] == "reply")
    assert offered["payload"] == {"value": fake.VIRTIO} and "VERSION_1" in offered["features"]
    assert offered["took"] == 0.001
    assert events[-1]["payload"] == {"offset": 0, "flags": 0, "data": bytes(range(16)).hex()}


def test_starting_is_shown_with_its_descriptors(dialogues: list[Dialogue]) -> None:
    dialogue = Dialogue("text")
    dialogues.append(dialogue)
    del dialogue.lines[:]
    fd = dialogue.around.ram.fd
    dialogue.frontend.activate(1 << 32, [QueueSetup(0, 64, 0x1000, 0x2000, 0x3000, fd, None)])
    lines = [line.partition(" -> ")[2].strip() for line in dialogue.lines if "->" in line]
    assert "SET_VRING_CALL index=0 has_fd=no" in lines
    assert "SET_VRING_KICK index=0 has_fd=yes +1 fd" in lines
    assert "SET_VRING_NUM index=0 num=64" in lines
    table = next(line for line in lines if line.startswith("SET_MEM_TABLE"))
    assert table.endswith("+2 fds") and "(guest_address=0x100000000 size=0x100000 user_address=0x" in table


def test_without_a_trace_nothing_looks_on() -> None:
    with no_new_fds():
        around, backend = Surroundings(), FakeBackend()
        frontend = Frontend(backend.connect, FakeKind(), (64,), None, around.ram, around.loop)
        link = frontend._link
        assert link is not None and link.notices is not None
        assert link.client.observe is None and link.notices.observe is None
        frontend.close()
        backend.close()
        around.close()


# -- every message -------------------------------------------------------------------


def exchanged(form: str, request: Request, payload: Payload, reply: Payload, fds: list[int]) -> list[str]:
    lines: list[str] = []
    device = Trace(lines.append, form, lambda: 0.0).device("d")
    if request in FRONTEND_REQUESTS.rows:
        message = Message(request, reply, [], False, lambda _: None)
        assert device.exchange(lambda *_: (reply, message), request.name, payload, fds) == (reply, message)
    else:
        device.notice(lambda _: 0, Message(request, payload, fds, True, lambda _: None))
    return lines


@pytest.mark.parametrize("request_row", REQUESTS, ids=lambda row: row.name)
@pytest.mark.parametrize("form", ["text", "json"])
def test_every_message_has_a_line(form: str, request_row: Request) -> None:
    """Its name, every field of its payload by name, and how many descriptors come along."""
    for payload, fds in requests_of(request_row):
        for reply, _ in replies_of(request_row):
            lines = exchanged(form, request_row, payload, reply, fds)
            assert len(lines) == 2 and all(line.endswith("\n") and line.count("\n") == 1 for line in lines)
            assert all(request_row.name in line for line in lines)
            if form == "json":
                told = json.loads(lines[0])
                assert list(told["payload"]) == list(payload._fields) and told["fds"] == len(fds)
            elif not request_row.name.endswith("_FEATURES"):
                assert all(f"{name}=" in lines[0] for name in payload._fields)
                assert (f"+{len(fds)} fd" in lines[0]) == bool(fds)
    assert requests_of(request_row) and replies_of(request_row)


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (U64(0xFFFF), "value=65535"),
        (U64(0x10000), "value=0x10000"),
        (Config(0, 0, bytes(33)), f"data={'00' * 32}...(33 bytes)"),
        (ShmemConfig(1, (0x1000, 0, 0x2000, *[0] * 253)), "count=1 sizes=[4096, 0, 8192]"),
        (ShmemConfig(0, (0,) * 256), "sizes=[]"),
        (VringFile(3, True), "index=3 has_fd=yes"),
        (MemTable((MemRegion(1, 2, 3, 4),)), "[(guest_address=1 size=2 user_address=3 mmap_offset=4)]"),
    ],
)
def test_values(payload: Payload, text: str) -> None:
    assert text in as_text(Event(0.0, "d", *MESSAGE, payload=payload))


def test_names_that_could_break_a_line() -> None:
    event = Event(0.0, "a\nb\udcff", *MESSAGE)
    assert as_text(event).count("\n") == 1
    assert json.loads(as_json(event))["device"] == "a\nb\udcff"


def test_each_way_has_an_arrow_of_its_own() -> None:
    assert len(set(ARROWS.values())) == 4
    assert BACKEND_REQUESTS.sender == "backend" and FRONTEND_REQUESTS.sender == "frontend"
