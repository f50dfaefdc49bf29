"""The corpus is replayed, the fuzzer runs a while, and both notice a broken protocol stack."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.program import environment
from fuzz import parts, seeds
from fuzz.proxy import Between
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm import eventfd
from pyvmm.backend import connection
from pyvmm.vhost_user import codec, config_space, session
from pyvmm.vhost_user.payloads import U64

FOLDER = Path(__file__).parent
CORPUS = sorted((FOLDER / "corpus").iterdir())
INPUTS = [path.read_bytes() for path in CORPUS] + seeds.seeds()
RUNS = 20_000  # about 30 seconds
SEED = 1
FILES, SIZE = 200, 100_000  # the corpus at most; scripts/fuzz --minimize keeps it so


@pytest.mark.parametrize("name", parts.NAMES)
def test_corpus(name: str) -> None:
    played = [data for data in INPUTS if parts.NAMES[data[0] % len(parts.NAMES)] == name]
    assert len(played) > 5
    for data in played:
        parts.run(data)


def test_the_corpus_is_small() -> None:
    assert len(CORPUS) < FILES and sum(path.stat().st_size for path in CORPUS) < SIZE


@pytest.mark.parametrize("data", seeds.seeds(), ids=lambda data: f"{parts.NAMES[data[0]]}-{len(data)}")
def test_seeds_go_the_whole_way(data: bytes) -> None:
    """Ends that are errors would mean that a part is not reached; some are made for that."""
    end = parts.run(data)
    assert end == "done" or parts.NAMES[data[0]] == "option" or "not offered" in end or "answered with" in end


def test_seeds_start_and_stop_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    request = session.Requester.request

    def note(requester: session.Requester, name: str, *rest: Any) -> bytes:
        asked.append(name)
        return request(requester, name, *rest)

    monkeypatch.setattr(session.Requester, "request", note)
    for data in seeds.frontends():
        parts.run(data)
    assert {"SET_INFLIGHT_FD", "SET_VRING_ENABLE", "GET_VRING_BASE", "GET_CONFIG"} <= set(asked)


def test_seeds_have_everything_that_a_backend_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = set()
    handle = connection.Connection._handle

    def note(end: connection.Connection, message: codec.Message) -> None:
        handle(end, message)
        answered.add((message.request.id, type(end)))

    monkeypatch.setattr(connection.Connection, "_handle", note)
    for data in [*seeds.backends(), *seeds.proxies()]:
        parts.run(data)
    assert {number for number, kind in answered if kind is connection.Connection} == set(connection.HANDLERS)
    assert len({number for number, kind in answered if kind is Between}) > 12


def _forgets(decoder: codec.Decoder) -> None:
    decoder._fds = []


def _agrees(*_: object) -> None:
    """Finds nothing wrong."""


def _trusts(space: config_space.BackendConfig, client: object) -> bool:
    reply = client.call("GET_CONFIG", config_space.Config(0, 0, bytes(space.size)))  # type: ignore[attr-defined]
    space._bytes[:] = getattr(reply, "data", b"")
    space.size = len(space._bytes)
    return True


def _trusts_the_end(end: connection.Connection) -> None:
    end._running.stop_all()
    end.device.on_disconnect()


BROKEN = {
    "descriptors are forgotten": (codec.Decoder, "close", _forgets),
    "numbers of descriptors are not counted": (codec, "fd_problem", _agrees),
    "nothing is gated": (session.Negotiation, "problem", _agrees),
    "any size fits": (U64, "fits", classmethod(lambda cls, size: True)),
    "any range is taken": (config_space.BackendConfig, "_fetch", _trusts),
    "any descriptor kicks": (eventfd, "is_eventfd", lambda fd: True),
    "messages keep their descriptors": (codec.Message, "close", _agrees),
    "the end has no exceptions": (connection.Connection, "_end_device", _trusts_the_end),
}


@pytest.mark.parametrize("how", BROKEN)
def test_the_corpus_notices(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN[how])
    with pytest.raises(Exception):  # noqa: B017  (a broken stack may fail in any way)
        for data in INPUTS:
            parts.run(data)


EDITS = st.lists(st.tuples(st.integers(0, 500), st.binary(max_size=12)), max_size=4)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(seeds.seeds()),
    st.lists(st.tuples(st.integers(0, 500), st.binary(max_size=12)), max_size=4),
)
def test_edited_seeds(data: bytes, edits: list[tuple[int, bytes]]) -> None:
    """Without a fuzzer: bytes put over, and into, what goes well."""
    for at, new in edits:
        data = data[:at] + new + data[at + len(new) * (at % 2) :]
    parts.run(data or b"\0")


def test_fuzzing(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed; pip install atheris")
    new = tmp_path / "new"
    command = [
        sys.executable,
        "-P",
        str(FOLDER / "run.py"),
        f"-seed={SEED}",
        f"-runs={RUNS}",
        "-max_len=1024",
    ]
    command += ["-timeout=20", f"-artifact_prefix={tmp_path}/", str(new), str(FOLDER / "corpus")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert f"Done {RUNS} runs" in done.stderr
