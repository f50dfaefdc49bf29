"""A child process that is ended by force, by whoever wants that."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from threading import Thread

import pytest
from fakes.backend import no_new_fds

from pyvmm.child import ChildProcess

Fork = Callable[[Callable[[], object]], ChildProcess]


@pytest.fixture
def fork() -> Iterator[Fork]:
    """Makes children that lead a session, call a function, and wait to be killed."""
    made = []

    def make(act: Callable[[], object]) -> ChildProcess:
        pid = os.fork()
        if not pid:
            try:
                act()
                while True:
                    signal.pause()
            finally:
                os._exit(9)
        made.append(ChildProcess(pid))
        return made[-1]

    with no_new_fds():
        yield make
        for child in made:
            child.destroy(5)
            if child.pidfd >= 0:
                child.forget()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_it_is_over_and_reaped(fork: Fork) -> None:
    child = fork(os.setsid)
    assert not child.ended()
    assert child.destroy(5)
    assert gone(child.pid) and child.status == 128 + signal.SIGKILL
    assert child.destroy(5), "harmless when repeated"
    child.kill(signal.SIGTERM)
    child.forget()
    assert child.destroy(5) and child.ended()


def test_one_that_is_stopped_or_hears_nothing(fork: Fork) -> None:
    child = fork(lambda: (os.setsid(), signal.signal(signal.SIGTERM, signal.SIG_IGN)))
    child.kill(signal.SIGSTOP)
    assert child.destroy(5) and gone(child.pid)


def test_one_that_leads_no_group_yet(fork: Fork) -> None:
    child = fork(lambda: None)
    assert child.destroy(5) and gone(child.pid)


def test_what_it_has_started_goes_with_it(fork: Fork) -> None:
    reader, writer = os.pipe()

    def act() -> None:
        os.setsid()
        pid = os.fork()
        if pid:
            os.write(writer, b"%d" % pid)

    child = fork(act)
    grandchild = int(os.read(reader, 100))
    os.close(writer)
    assert child.destroy(5)
    assert os.read(reader, 1) == b"", "the last holder of the pipe is gone"
    os.close(reader)
    assert grandchild != child.pid


@pytest.mark.parametrize("end", [lambda child: child.destroy(5), lambda child: child.forget()])
def test_what_a_dead_one_has_left_goes_with_it(fork: Fork, end: Callable[[ChildProcess], object]) -> None:
    """As of a script that starts the program without `exec`."""
    reader, writer = os.pipe()

    def act() -> None:
        os.setsid()
        if os.fork():
            os._exit(3)

    child = fork(act)
    os.close(writer)
    assert child.wait(5) == 3
    end(child)
    assert os.read(reader, 1) == b"", "the last holder of the pipe is gone"
    os.close(reader)
    assert child.status == 3 and gone(child.pid)


def test_in_one_thread_while_another_one_waits(fork: Fork) -> None:
    child = fork(os.setsid)
    statuses: list[int | None] = []
    waiting = Thread(target=lambda: statuses.append(child.wait(10)))
    waiting.start()
    time.sleep(0.05)
    assert child.destroy(5)
    waiting.join()
    assert statuses == [128 + signal.SIGKILL]


def test_one_that_is_another_user_s(fork: Fork) -> None:
    """Nothing of it is ours to end: that is said, and costs no descriptor."""
    if os.geteuid():
        pytest.skip("only root has another user's process")
    ready, tell = os.pipe()

    def act() -> None:
        pid = os.fork()
        if not pid:
            os.close(tell)
            os.setsid()
            signal.pause()
        os.write(tell, f"{pid} ".encode())
        child = ChildProcess(pid)
        os.setresuid(65534, 65534, 65534)
        free = os.dup(tell)
        os.close(free)
        child.kill(signal.SIGTERM)
        over = child.destroy(0.1)
        os.write(tell, f"{over} {os.dup(tell) - free}".encode())
        os.close(tell)

    child = fork(act)
    os.close(tell)
    said = b""
    while len(said.split()) < 3 and (piece := os.read(ready, 99)):
        said += piece
    os.close(ready)
    os.kill(int(said.split()[0]), signal.SIGKILL)
    assert said.split()[1:] == [b"False", b"0"] and not child.ended()
