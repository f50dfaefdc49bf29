"""The event loop: readers, timers, calls from threads, stop and errors."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from pyvmm.loop import EventLoop


def test_a_reader_is_called_while_readable_and_not_after_removal() -> None:
    ours, theirs = os.pipe()
    seen: list[bytes] = []

    def read() -> None:
        seen.append(os.read(ours, 1))
        if len(seen) == 2:
            loop.remove_reader(ours)
            loop.call_later(0.02, loop.stop)

    with EventLoop() as loop:
        loop.add_reader(ours, read)
        os.write(theirs, b"abc")
        loop.run()
    assert seen == [b"a", b"b"]
    os.close(ours)
    os.close(theirs)


def test_timers_run_in_order_and_can_be_cancelled() -> None:
    order: list[str] = []
    with EventLoop() as loop:
        loop.call_later(0.03, loop.stop)
        loop.call_later(0.02, lambda: order.append("second"))
        loop.call_later(0.01, lambda: order.append("first"))
        loop.call_later(0.015, lambda: order.append("cancelled")).cancel()
        loop.run()
    assert order == ["first", "second"]


def test_a_timer_may_be_farther_away_than_epoll_can_wait() -> None:
    with EventLoop() as loop:
        loop.call_later(1e9, lambda: pytest.fail("too early"))
        threading.Timer(0.05, loop.stop).start()
        loop.run()


def test_a_wait_that_is_too_long_for_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvmm.loop.LONGEST_WAIT", 0.01)
    with EventLoop() as loop:
        begin = time.monotonic()
        loop.call_later(0.05, loop.stop)
        loop.run()
        assert time.monotonic() - begin >= 0.05


def test_calls_from_other_threads_run_in_the_loops_thread() -> None:
    where: list[int] = []
    with EventLoop() as loop:

        def call() -> None:
            where.append(threading.get_ident())
            loop.stop()

        worker = threading.Thread(target=lambda: loop.call_soon_threadsafe(call))
        worker.start()
        loop.run()
        worker.join()
    assert where == [threading.get_ident()]


def test_stop_from_another_thread_ends_an_idle_loop_at_once() -> None:
    with EventLoop() as loop:
        threading.Timer(0.05, loop.stop).start()
        begin = time.monotonic()
        loop.run()
        assert time.monotonic() - begin < 5


def test_a_signal_that_does_not_interrupt_the_wait_ends_it() -> None:
    """It comes to another thread here, as one just before the wait would not interrupt it either."""
    with EventLoop() as loop:
        previous = signal.signal(signal.SIGUSR1, lambda *_: loop.stop())
        kill = threading.Timer(0.05, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGUSR1))
        kill.start()
        late = loop.call_later(10, loop.stop)
        loop.run()
        assert late.when - time.monotonic() > 5
        kill.join()
        signal.signal(signal.SIGUSR1, previous)
    assert signal.set_wakeup_fd(-1) == -1


def test_any_number_of_calls_from_threads_fits() -> None:
    calls: list[int] = []
    with EventLoop() as loop:
        for number in range(100_000):
            loop.call_soon_threadsafe(lambda number=number: calls.append(number))  # type: ignore[misc]
        loop.call_soon_threadsafe(loop.stop)
        loop.run()
    assert calls == list(range(100_000))


def test_an_exception_ends_the_loop_and_reaches_the_owner() -> None:
    def fail() -> None:
        raise ValueError("boom")

    with EventLoop() as loop:
        loop.call_later(0, fail)
        with pytest.raises(ValueError, match="boom"):
            loop.run()


def test_close_leaves_no_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(10):
        EventLoop().close()
    assert os.listdir("/proc/self/fd") == before


def test_removing_unknown_or_closed_descriptors_is_harmless() -> None:
    ours, theirs = os.pipe()
    with EventLoop() as loop:
        loop.remove_reader(ours)
        loop.add_reader(ours, lambda: None)
        os.close(ours)
        os.close(theirs)
        loop.remove_reader(ours)


def test_what_cannot_be_waited_for_is_refused_and_forgotten() -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    with EventLoop() as loop:
        with pytest.raises(PermissionError):
            loop.add_reader(fd, lambda: None)
        loop.remove_reader(fd)
    os.close(fd)


def test_a_thread_may_call_while_the_loop_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was left behind: what it writes to would be closed, or somebody else's by then."""
    loop, close = EventLoop(), os.close

    def meanwhile(fd: int) -> None:
        close(fd)
        loop.call_soon_threadsafe(lambda: None)

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", meanwhile)
        loop.close()
    loop.close()


def test_what_was_ready_under_a_number_says_nothing_of_its_next_owner() -> None:
    """Two are ready, and the first callback closes the other one, whose number the next reader gets."""
    pipes = [os.pipe() for _ in range(2)]
    renewed: list[int] = []
    with EventLoop() as loop:

        def first() -> None:
            for ours, theirs in pipes:
                loop.remove_reader(ours)
                os.close(ours)
                os.close(theirs)
            for _ in pipes:
                renewed.extend(os.pipe())
            for fd in renewed:
                loop.add_reader(fd, lambda: pytest.fail("nothing is ready there"))

        for ours, theirs in pipes:
            loop.add_reader(ours, first)
            os.write(theirs, b"x")
        loop._turn(1)
        assert {fd for pair in pipes for fd in pair} == set(renewed)
    for fd in renewed:
        os.close(fd)


@pytest.mark.parametrize("removed", [False, True])
def test_a_reader_pauses_for_a_time(removed: bool) -> None:
    ours, theirs = os.pipe()
    calls: list[float] = []
    with EventLoop() as loop:

        def ready() -> None:
            calls.append(time.monotonic())
            if len(calls) == 1:
                loop.pause(ours, 0.05)
                if removed:
                    loop.remove_reader(ours)
                    os.close(ours)
            else:
                loop.stop()

        loop.add_reader(ours, ready)
        os.write(theirs, b"x")
        loop.call_later(0.2, loop.stop)
        loop.run()
        if not removed:
            loop.remove_reader(ours)
            os.close(ours)
    assert len(calls) == (1 if removed else 2)
    assert removed or calls[1] - calls[0] >= 0.05
    os.close(theirs)
