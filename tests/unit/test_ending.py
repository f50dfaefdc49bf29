"""Signals are noted everywhere and raised where the program waits, in the main thread, once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from pyvmm.ending import Signals, give_way, held, release, waiting


def interrupt(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def seen() -> Iterator[list[int]]:
    found: list[int] = []
    with Signals(found.append):
        yield found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_outside_a_wait_ends_the_next_one(seen: list[int], number: int) -> None:
    interrupt(number)
    assert seen == [number]
    with pytest.raises(SystemExit) as ended, waiting():
        pytest.fail("waited")
    assert ended.value.code == 128 + number


def test_a_signal_during_a_wait_ends_it_once(seen: list[int]) -> None:
    with pytest.raises(SystemExit), waiting():
        interrupt()
        pytest.fail("waited on")
    interrupt()  # cleaning up is not interrupted
    assert seen == [signal.SIGTERM] * 2


def test_a_wait_that_is_over_is_not_interrupted(seen: list[int]) -> None:
    with waiting():
        pass
    interrupt()
    assert seen == [signal.SIGTERM]


def test_other_threads_wait_undisturbed(seen: list[int]) -> None:
    done = threading.Event()

    def wait() -> None:
        with waiting():
            done.wait(5)

    interrupt()
    thread = threading.Thread(target=wait)
    thread.start()
    done.set()
    thread.join()
    assert not thread.is_alive()


def test_other_threads_give_way(seen: list[int]) -> None:
    give_way()
    interrupt()
    with pytest.raises(SystemExit):
        give_way()


def test_everything_is_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with Signals(lambda _: None):
        interrupt()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    with waiting():  # what was noted is forgotten
        pass


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals(lambda _: pytest.fail("heard")):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            interrupt(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_held_signal_comes_afterwards(seen: list[int]) -> None:
    with held():
        interrupt()
        assert seen == []
    assert seen == [signal.SIGTERM]


def test_a_child_gets_them_when_it_is_ready(seen: list[int]) -> None:
    reader, writer = os.pipe()
    with held():
        pid = os.fork()
        if pid == 0:
            os.read(reader, 1)  # by now the signal has been sent
            signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
            release()
            os._exit(1)
    os.kill(pid, signal.SIGTERM)
    os.write(writer, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert seen == []
    os.close(reader)
    os.close(writer)
