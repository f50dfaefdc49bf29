"""The host's end of the command channel against a scripted guest."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes.init import FakeInit, stage

from pyvmm.guest import protocol as p
from pyvmm.guest.channel import CommandChannel, Outcome
from pyvmm.loop import EventLoop

DEADLINE = 20.0


class Session:
    """One channel in a loop, and the pipes of its command's streams."""

    def __init__(self, script: Callable[[FakeInit], None], stdin: int | None = None) -> None:
        self.guest = FakeInit(script)
        self.loop = EventLoop()
        self.out, self.out_writer = os.pipe()
        self.err, self.err_writer = os.pipe()
        self.stages: list[tuple[str, float]] = []
        self.warnings: list[str] = []
        self.outcome: Outcome | None = None
        self.channel = CommandChannel(
            self.loop,
            self.guest.host_end,
            p.Spec(argv=("true",)),
            self._ended,
            stdin=stdin,
            stdout=self.out_writer,
            stderr=self.err_writer,
            on_stage=lambda name, seconds: self.stages.append((name, seconds)),
            on_warning=self.warnings.append,
        )

    def _ended(self, outcome: Outcome) -> None:
        assert self.outcome is None
        self.outcome = outcome
        self.loop.stop()

    def run(self) -> Outcome:
        self.loop.call_later(DEADLINE, self.loop.stop)
        self.loop.run()
        self.channel.close()
        self.guest.join()
        assert self.outcome is not None, "the channel did not end in time"
        return self.outcome

    def output(self) -> tuple[bytes, bytes]:
        """What was written to both pipes."""
        os.close(self.out_writer)
        os.close(self.err_writer)
        self.out_writer = self.err_writer = -1
        with open(self.out, "rb", closefd=False) as out, open(self.err, "rb", closefd=False) as err:
            return out.read(), err.read()

    def close(self) -> None:
        self.channel.close()
        self.loop.close()
        for fd in (self.out, self.err, self.out_writer, self.err_writer):
            if fd >= 0:
                os.close(fd)


Start = Callable[..., Session]


@pytest.fixture
def start() -> Iterator[Start]:
    sessions: list[Session] = []

    def make(script: Callable[[FakeInit], None], stdin: int | None = None) -> Session:
        sessions.append(Session(script, stdin))
        return sessions[-1]

    yield make
    for session in sessions:
        session.close()


@pytest.mark.parametrize(
    ("signalled", "number", "status", "signal"), [(0, 0, 0, None), (0, 255, 255, None), (1, 9, 137, 9)]
)
def test_exit_status(start: Start, signalled: int, number: int, status: int, signal: int | None) -> None:
    def guest(init: FakeInit) -> None:
        init.start()
        assert init.expect(p.STDIN) == b""
        init.exit(signalled, number)

    assert start(guest).run() == Outcome(status=status, signal=signal)


def test_a_guest_that_sends_more_than_it_may_is_cut_off(start: Start) -> None:
    """Nobody reads the command's output for a while: what waits must not be more than the window."""

    def guest(init: FakeInit) -> None:
        init.start()
        with contextlib.suppress(OSError):
            for _ in range(64):
                init.send(p.STDOUT, bytes(p.DATA_MAX))
            init.exit()

    session = start(guest)

    def read() -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(session.out, 1 << 20)
        session.loop.call_later(0.01, read)

    os.set_blocking(session.out, False)
    session.loop.call_later(0.3, read)
    outcome = session.run()
    assert outcome.lost and "more output than it was allowed to" in (outcome.error or "")


def test_streams_stay_apart_and_binary(start: Start) -> None:
    data = bytes(range(256)) * 20

    def guest(init: FakeInit) -> None:
        init.start()
        for _ in range(5):
            init.send(p.STDOUT, data)
            init.send(p.STDERR, data[::-1])
        init.exit()

    session = start(guest)
    assert session.run().status == 0
    assert session.output() == (data * 5, data[::-1] * 5)


def test_stages_and_warnings(start: Start) -> None:
    def guest(init: FakeInit) -> None:
        init.send(p.STAGE, stage("init", 1_500_000_000))
        init.start()
        init.send(p.WARNING, b"no overlay")
        init.exit()

    session = start(guest)
    session.run()
    assert session.stages == [("init", 1.5)]
    assert session.warnings == ["no overlay"]


def test_the_spec_arrives(start: Start) -> None:
    got: dict[str, list[str]] = {}

    def guest(init: FakeInit) -> None:
        got.update(init.start())
        init.exit()

    start(guest).run()
    assert got["arg"] == ["true"]


def read_input(init: FakeInit) -> bytes:
    """All of the host's input, giving credit for each frame."""
    data = b""
    while piece := init.expect(p.STDIN):
        data += piece
        init.send(p.CREDIT, p.PAIR.pack(0, len(piece)))
    return data


@pytest.mark.parametrize("kind", ["pipe", "file", "null"])
def test_input_of_any_kind(start: Start, tmp_path: Path, kind: str) -> None:
    wanted = b"" if kind == "null" else os.urandom(300_000)
    got: list[bytes] = []

    def guest(init: FakeInit) -> None:
        init.start()
        got.append(read_input(init))
        init.exit()

    (tmp_path / "input").write_bytes(wanted)
    path = "/dev/null" if kind == "null" else f"{tmp_path}/input"
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as cat, open(path) as file:
        assert cat.stdout is not None
        start(guest, cat.stdout.fileno() if kind == "pipe" else file.fileno()).run()
    assert got == [wanted]


def test_input_stops_at_the_window_and_signals_pass_it(start: Start, tmp_path: Path) -> None:
    (tmp_path / "input").write_bytes(bytes(4 * p.INPUT_WINDOW))
    session: Session

    def guest(init: FakeInit) -> None:
        init.start()
        got = 0
        while got < p.INPUT_WINDOW:
            got += len(init.expect(p.STDIN))
        assert got == p.INPUT_WINDOW
        assert init.silence(0.3)
        session.loop.call_soon_threadsafe(lambda: session.channel.signal(2))
        assert init.expect(p.SIGNAL) == p.U32.pack(2)
        session.loop.call_soon_threadsafe(lambda: session.channel.resize(30, 100))
        assert init.expect(p.WINDOW) == p.WINDOW_SIZE.pack(30, 100)
        init.exit()

    with open(tmp_path / "input") as stream:
        session = start(guest, stream.fileno())
        assert session.run().status == 0


def test_a_slow_reader_gets_all_and_gives_credit_as_it_reads(start: Start) -> None:
    total = 2 * p.OUTPUT_WINDOW
    credit: list[int] = []

    def guest(init: FakeInit) -> None:
        init.start()
        init.expect(p.STDIN)
        for _ in range(p.OUTPUT_WINDOW // 16384):
            init.send(p.STDOUT, bytes(16384))
        assert init.silence(0.3), "credit although nobody read"
        session.loop.call_soon_threadsafe(session.drain)
        while sum(credit) < total - p.OUTPUT_WINDOW:
            stream, size = p.PAIR.unpack(init.expect(p.CREDIT))
            assert stream == 1
            credit.append(size)
        for _ in range(p.OUTPUT_WINDOW // 16384):
            init.send(p.STDOUT, bytes(16384))
        assert sum(credit) + init.exit() <= total

    session = Draining(guest)
    try:
        assert session.run().status == 0
        session.take()
        assert session.taken == total
    finally:
        session.close()


class Draining(Session):
    """A session whose standard output is read only when the test says so."""

    taken = 0

    def __init__(self, script: Callable[[FakeInit], None]) -> None:
        super().__init__(script)
        fcntl.fcntl(self.out_writer, fcntl.F_SETPIPE_SZ, 4096)

    def drain(self) -> None:
        os.set_blocking(self.out, False)
        self.loop.add_reader(self.out, self.take)

    def take(self) -> None:
        try:
            self.taken += len(os.read(self.out, 1 << 20))
        except BlockingIOError:
            return


def test_a_full_stdout_does_not_hold_up_stderr(start: Start) -> None:
    def guest(init: FakeInit) -> None:
        init.start()
        for _ in range(p.OUTPUT_WINDOW // 16384):
            init.send(p.STDOUT, bytes(16384))
        init.send(p.STDERR, b"still here")
        assert os.read(session.err, 100) == b"still here"
        session.loop.call_soon_threadsafe(session.drain)
        init.exit()

    session = Draining(guest)
    try:
        assert session.run().status == 0
    finally:
        session.close()


def test_a_reader_that_left_closes_the_stream_in_the_guest(start: Start) -> None:
    def guest(init: FakeInit) -> None:
        init.start()
        init.expect(p.STDIN)
        init.send(p.STDOUT, b"x")
        assert init.expect(p.CLOSE) == p.U32.pack(1)
        for _ in range(p.OUTPUT_WINDOW // 16384):
            init.send(p.STDOUT, bytes(16384))  # what was on its way is dropped, and credited
        init.expect(p.CREDIT)
        init.exit(1, 13)

    session = start(guest)
    os.close(session.out)
    session.out = -1
    assert session.run() == Outcome(status=141, signal=13)


def test_guest_errors_are_told(start: Start) -> None:
    def guest(init: FakeInit) -> None:
        init.start()
        init.send(p.ERROR, b"cannot mount virtiofs 'root'")
        while init.receive()[0] != p.BYE:
            pass

    assert start(guest).run() == Outcome(error="cannot mount virtiofs 'root'")


def test_a_guest_that_vanishes_is_lost_after_its_output(start: Start) -> None:
    def guest(init: FakeInit) -> None:
        init.start()
        init.expect(p.STDIN)
        init.send(p.STDOUT, b"last words")

    session = start(guest)
    assert session.run() == Outcome(lost=True)
    assert session.output() == (b"last words", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"SeaBIOS (version 1.16)", "frame type"),
        (p.frame(p.HELLO, p.U32.pack(77)), "version 77"),
    ],
)
def test_a_stranger_is_lost_with_the_reason(start: Start, data: bytes, reason: str) -> None:
    def guest(init: FakeInit) -> None:
        init.sock.sendall(data)
        while init.sock.recv(100):
            pass

    session = start(guest)
    session.loop.call_later(DEADLINE, session.loop.stop)
    session.loop.run()
    outcome = session.outcome
    session.channel.close()
    session.guest.join()
    assert outcome is not None and outcome.lost
    assert reason in (outcome.error or "")


def test_close_releases_everything(start: Start) -> None:
    before = set(os.listdir("/proc/self/fd"))

    def guest(init: FakeInit) -> None:
        init.start()
        try:
            while True:
                init.receive()
        except EOFError:
            return

    session = Session(guest)
    session.loop.call_later(0.1, session.loop.stop)
    session.loop.run()
    session.close()
    session.guest.join()
    assert session.outcome is None
    assert set(os.listdir("/proc/self/fd")) == before
