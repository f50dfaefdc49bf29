"""What is known of a backend's end, and when: programs that end in one way or another."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.backend import no_new_fds

from pyvmm.host import handover
from pyvmm.host.handover import BackendProcess
from pyvmm.loop import EventLoop

Start = Callable[[str], BackendProcess]


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    with EventLoop() as loop:
        yield loop


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a shell that does something, with a connection that nobody takes."""
    started = []

    def make(script: str) -> BackendProcess:
        started.append(BackendProcess("shell", lambda fd: ["/bin/sh", "-c", script]))
        return started[-1]

    with no_new_fds():
        yield make
        for process in started:
            process.close()


class Explained:
    """Waits in the loop for the words, and counts what else the loop does meanwhile."""

    def __init__(self, process: BackendProcess, loop: EventLoop) -> None:
        self.words: list[str] = []
        self.turns = 0
        self._loop = loop
        loop.call_later(0, self._turn)
        process.endpoint.explain_later(loop, self._said)
        if not self.words:
            loop.run()

    def _turn(self) -> None:
        self.turns += 1
        self._loop.call_later(0.001, self._turn)

    def _said(self, words: str) -> None:
        self.words.append(words)
        self._loop.stop()


def test_one_that_has_ended(start: Start, loop: EventLoop) -> None:
    process = start("echo what; echo why >&2; exit 3")
    assert process.child.wait(10) == 3
    explained = Explained(process, loop)
    assert explained.words == [" (it ended with status 3: why)"] and not explained.turns


def test_one_that_is_about_to_end(start: Start, loop: EventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "DEATH", 30.0)
    explained = Explained(start("sleep 0.1; echo why; exit 3"), loop)
    assert explained.words == [" (it ended with status 3: why)"]
    assert explained.turns > 1, "the loop goes on meanwhile"


def test_one_that_runs_on(start: Start, loop: EventLoop) -> None:
    process = start("exec sleep 60")
    explained = Explained(process, loop)
    assert explained.words == [" (it still runs)"] and explained.turns > 1
    os.kill(process.pid, signal.SIGKILL)
    assert process.child.wait(10) == 128 + signal.SIGKILL
    loop._turn(0)
    assert len(explained.words) == 1, "the end of it is not told as well"


def test_one_that_is_killed_in_the_meantime(start: Start, loop: EventLoop) -> None:
    process = start("exec sleep 60")
    begin = time.monotonic()
    loop.call_later(0.01, lambda: process.child.destroy(5))
    assert Explained(process, loop).words == [" (it ended with status 137)"]
    assert time.monotonic() - begin < 5


def test_before_there_is_a_loop(start: Start) -> None:
    assert start("sleep 0.05; echo why; exit 3").endpoint.explain() == " (it ended with status 3: why)"
    assert start("exec sleep 60").endpoint.explain() == " (it still runs)"
