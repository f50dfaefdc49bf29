"""The short replacements keep the rules of what they replace, and keep the boot path short."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from pyvmm.lean import ExitStack, Thread, deque, in_main_thread, signal

# Each of these pulls in enumerations or half the library; see pyvmm/lean.py.
SLOW = {
    "argparse", "asyncio", "collections", "contextlib", "dataclasses", "enum", "functools", "inspect", "json",
    "logging", "pathlib", "re", "signal", "socket", "subprocess", "tempfile", "threading", "typing",
}  # fmt: skip


@pytest.mark.parametrize("module", ["pyvmm.cli.boot", "pyvmm.cli.run", "pyvmm.run", "pyvmm.vm"])
def test_the_boot_path_imports_nothing_slow(module: str) -> None:
    code = f"import sys; before = set(sys.modules); import {module}; print(*(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert not SLOW & set(done.stdout.split())


def test_callbacks_run_in_reverse_order_whatever_fails() -> None:
    done: list[int] = []
    stack = ExitStack()
    stack.callback(done.append, 1)
    stack.callback(lambda: 1 / 0)
    stack.callback(done.append, 2)
    with pytest.raises(ZeroDivisionError):
        stack.close()
    assert done == [2, 1]
    stack.close()
    assert done == [2, 1]


def test_what_was_popped_is_not_undone() -> None:
    done: list[int] = []
    with ExitStack() as stack:
        stack.callback(done.append, 1)
        kept = stack.pop_all()
        stack.callback(done.append, 2)
    assert done == [2]
    kept.close()
    assert done == [2, 1]


def test_threads_are_joined_or_not_in_time() -> None:
    seen: deque[bool] = deque()
    release = threading.Event()

    def target(event: threading.Event) -> None:
        event.wait()
        seen.append(in_main_thread())

    thread = Thread(target, release)
    assert not thread.join(0.01)
    release.set()
    assert thread.join(10)
    assert thread.join()
    assert list(seen) == [False]
    assert in_main_thread()


def test_a_join_that_a_signal_interrupted_does_not_stop_the_next() -> None:
    """A handler that raises may do so after the lock was taken and before it is given back."""
    thread = Thread(lambda: None)
    assert thread.join(10)
    thread._running.acquire()
    assert thread.join(0.01)


def test_signals_are_the_usual_ones() -> None:
    import signal as documented

    assert signal.SIGTERM == documented.SIGTERM
    assert signal.getsignal(signal.SIGINT) is documented.getsignal(documented.SIGINT)
