"""The configuration space: where it comes from, what is asked for, and what a refusal costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import backend as fake
from fakes.backend import FakeBackend, FakeKind, Script, Surroundings, no_new_fds

from pyvmm import log
from pyvmm.config_text import config_bytes
from pyvmm.errors import ConfigError
from pyvmm.vhost_user.codec import Message
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.vhost_user.messages import ProtocolFeature as P
from pyvmm.vhost_user.payloads import Config, Empty, Payload
from pyvmm.virtio import kinds
from pyvmm.virtio.kinds import Kind

Capture = pytest.CaptureFixture[str]
FS, VSOCK, NET, INPUT = (kinds.of(number) for number in (26, 19, 1, 18))


class Bench:
    """One frontend at a time on a scripted backend, and what it announced."""

    def __init__(self) -> None:
        self.around = Surroundings()
        self.refusals = 0
        self.lost: list[str] = []
        self._open: list[FakeBackend | Frontend] = []

    def connect(
        self,
        kind: Kind | FakeKind,
        *,
        config: bytes | None = None,
        data: bytes = bytes(range(16)),
        protocol: int = fake.PROTOCOL,
        queues: int = 4,
        script: Script | None = None,
    ) -> tuple[Frontend, FakeBackend]:
        backend = FakeBackend(config=data, protocol=protocol, queues=queues, script=script)
        self._open.append(backend)
        sizes = (64,) * max(2, kind.min_queues)
        frontend = Frontend(
            backend.connect, kind, sizes, config, self.around.ram, self.around.loop, 5.0, "dev"
        )
        frontend.on_config_refused = self._refused
        frontend.on_lost = self.lost.append
        self._open.append(frontend)
        return frontend, backend

    def _refused(self) -> None:
        self.refusals += 1

    def close(self) -> None:
        for thing in reversed(self._open):
            thing.close()
        self.around.close()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(log, "_said", set())
    with no_new_fds():
        bench = Bench()
        yield bench
        bench.close()


def asked(backend: FakeBackend, name: str = "GET_CONFIG") -> list[Payload]:
    return [payload for seen, payload, _ in backend.seen if seen == name]


# -- where it comes from -----------------------------------------------------------


@pytest.mark.parametrize("protocol", [fake.PROTOCOL, fake.PROTOCOL & ~P.CONFIG, 0], ids=hex)
@pytest.mark.parametrize("form", ["hex", "file", "fields"])
def test_each_form_of_override_with_and_without_config(
    bench: Bench, tmp_path: Path, form: str, protocol: int
) -> None:
    expected = b"root".ljust(36, b"\0") + b"\2\0\0\0" + bytes(4)
    (tmp_path / "config").write_bytes(expected)
    text = {
        "hex": expected.hex(),
        "file": f"@{tmp_path}/config",
        "fields": "[tag=root,num_request_queues=2]",
    }[form]
    frontend, backend = bench.connect(FS, config=config_bytes("--x", text, FS), protocol=protocol)
    assert frontend.read_config(0, 44) == expected
    assert frontend.read_config(36, 4) == b"\2\0\0\0"
    frontend.write_config(36, b"\3")
    assert frontend.read_config(36, 4) == b"\3\0\0\0"
    assert not asked(backend) and not asked(backend, "SET_CONFIG")
    if not backend.responder.negotiation.virtio_acked:  # the driver has not; protocol features are settled
        assert not backend.responder.negotiation.protocol_acked & (P.CONFIG | P.BACKEND_REQ)


def test_no_more_is_asked_for_than_the_kind_has(bench: Bench) -> None:
    """Some backends hand out what lies behind their structure."""
    frontend, backend = bench.connect(VSOCK, data=bytes(range(1, 101)))
    assert frontend.config_size == 8
    assert frontend.read_config(4, 8) == bytes([5, 6, 7, 8, 0, 0, 0, 0])
    assert frontend.read_config(4096, 4) == bytes(4)
    assert set(asked(backend)) == {Config(0, 0, bytes(8))}


def test_a_backend_that_offers_a_space_and_refuses_it(bench: Bench, capfd: Capture) -> None:
    frontend, _ = bench.connect(VSOCK, script={"GET_CONFIG": fake.reply(Empty())})
    assert frontend.config_size == 0
    assert frontend.read_config(0, 8) == bytes(8)
    assert capfd.readouterr().err.count("refuses to read its configuration space; see config=") == 1


def test_a_backend_without_a_space_is_warned_of_unless_the_kind_has_none(
    bench: Bench, capfd: Capture
) -> None:
    bench.connect(kinds.of(4), protocol=0)
    assert capfd.readouterr().err == ""
    bench.connect(VSOCK, protocol=0)
    assert "no configuration space, the guest reads zeros; see config=" in capfd.readouterr().err


# -- how many queues: what the backend says, by the kind -----------------------------


@pytest.mark.parametrize(("kind", "reported", "fits"), [(NET, 1, True), (NET, 0, False), (FS, 1, False)])
def test_network_backends_report_pairs(bench: Bench, kind: Kind, reported: int, fits: bool) -> None:
    if fits:
        assert len(bench.connect(kind, queues=reported)[0].queue_sizes) == 2
    else:
        limit = kind.backend_limit(reported)
        with pytest.raises(ConfigError, match=f"2 queues, but the backend has {limit}; give at most {limit}"):
            bench.connect(kind, queues=reported)


# -- refusals ----------------------------------------------------------------------


@pytest.mark.parametrize("refusal", [Empty(), Config(0, 0, b"")], ids=["libvhost-user", "rust-vmm"])
def test_a_refused_read_gives_the_last_bytes_and_keeps_the_backend(
    bench: Bench, capfd: Capture, refusal: Payload
) -> None:
    no = fake.reply(refusal)
    frontend, backend = bench.connect(FakeKind(), script={("GET_CONFIG", 1): no, ("GET_CONFIG", 2): no})
    assert frontend.read_config(3, 2) == b"\3\4"
    backend.config[3] = 99
    assert frontend.read_config(3, 2) == b"\3\4"
    assert bench.refusals == 2
    assert frontend.read_config(3, 2) == b"\x63\4", "the dialogue goes on"
    assert bench.refusals == 2 and not bench.lost
    said = capfd.readouterr().err
    assert said.count("dev: configuration read of 2 bytes at 3: the backend refused GET_CONFIG") == 1
    assert said.count("\n") == 1


def test_a_refused_write_asks_for_a_reset_and_keeps_the_backend(bench: Bench, capfd: Capture) -> None:
    frontend, backend = bench.connect(FakeKind(), script={"SET_CONFIG": fake.status(22)})
    frontend.write_config(0, b"xy")
    frontend.write_config(0, b"xy")
    assert bench.refusals == 2 and not bench.lost
    assert frontend.read_config(0, 2) == b"\0\1", "the backend's bytes, not the driver's"
    assert len(asked(backend, "SET_CONFIG")) == 2
    said = capfd.readouterr().err
    assert said.count("write of 2 bytes at 0: the backend refused SET_CONFIG (status 22)") == 1
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "answer", [Config(4, 0, bytes(16)), Config(0, 0, bytes(15)), Config(0, 0, bytes(17))], ids=repr
)
def test_an_answer_to_another_question_costs_the_backend(bench: Bench, answer: Config) -> None:
    frontend, _ = bench.connect(FakeKind(), script={("GET_CONFIG", 1): fake.reply(answer)})
    assert frontend.read_config(0, 4) == bytes(range(4))
    assert frontend.read_config(4, 4) == bytes(range(4, 8)), "and the last bytes stay"
    assert not bench.refusals
    frontend.start_watching()
    bench.around.loop.call_soon_threadsafe(bench.around.loop.stop)
    bench.around.loop.run()
    assert len(bench.lost) == 1 and "GET_CONFIG" in bench.lost[0]


# -- backends' habits --------------------------------------------------------------


def test_the_released_input_backend_survives_writes_of_one_byte(bench: Bench) -> None:
    """vhost-device-input 0.1.0 reads two bytes from whatever it gets, and panics at fewer."""
    selected = []

    def set_config(backend: FakeBackend, message: Message) -> bytes | None:
        assert isinstance(message.payload, Config)
        if len(message.payload.data) < 2:
            return None  # it is gone
        selected.append((message.payload.offset, *message.payload.data[:2]))
        return backend.answer(message)

    frontend, _ = bench.connect(INPUT, data=bytes(136), script={"SET_CONFIG": set_config})
    frontend.write_config(0, b"\x11")
    frontend.write_config(1, b"\x01")
    assert selected == [(0, 0x11, 0), (0, 0x11, 1)]
    assert frontend.read_config(0, 2) == b"\x11\x01" and not bench.lost


def test_scsi_keeps_what_its_backend_would_die_of(bench: Bench) -> None:
    frontend, backend = bench.connect(kinds.of(8), data=bytes(36), script={"SET_CONFIG": fake.hang_up})
    frontend.write_config(20, b"\x60\0\0\0")
    frontend.write_config(21, b"\1")
    frontend.write_config(34, b"end and beyond")
    assert not asked(backend, "SET_CONFIG") and not bench.lost
    backend.config[24] = 32
    assert frontend.read_config(20, 8) == b"\x60\1\0\0\x20\0\0\0", "the rest is the backend's"
    assert frontend.read_config(32, 4) == b"\0\0en"
    frontend.reset()
    assert frontend.read_config(20, 8) == bytes(4) + b"\x20\0\0\0"


def test_what_was_absorbed_outlives_the_backend(bench: Bench) -> None:
    before, _ = bench.connect(kinds.of(8), data=bytes(36))
    before.write_config(20, b"\x60\0\0\0")
    after, backend = bench.connect(kinds.of(8), data=bytes(36))
    assert after._link is not None
    assert not after._config.succeed(after._link.client, before._config)
    assert after.read_config(20, 4) == b"\x60\0\0\0" and not asked(backend, "SET_CONFIG")


# -- after a loss ------------------------------------------------------------------


def test_writes_that_overlap_are_repeated_as_they_were_made(bench: Bench) -> None:
    """Of two to the same bytes the later one; how often a driver writes takes no memory."""
    before, _ = bench.connect(FakeKind())
    writes = [(0, b"AAAA"), (2, b"bb"), (8, b"wide"), (8, b"n"), (0, b"CCCC"), (2, b"dd"), (0, b"EEEE")]
    for offset, data in writes:
        before.write_config(offset, data)
    after, backend = bench.connect(FakeKind())
    assert after._link is not None
    assert not after._config.succeed(after._link.client, before._config)
    replayed = [(8, b"wide"), (8, b"n"), (2, b"dd"), (0, b"EEEE")]
    assert asked(backend, "SET_CONFIG") == [Config(offset, 0, data) for offset, data in replayed]
    assert after.read_config(0, 12) == before.read_config(0, 12) == b"EEEE\4\5\6\7nide"
