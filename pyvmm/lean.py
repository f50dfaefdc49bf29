"""The standard library's `signal`, `Thread`, `deque` and `ExitStack`, without their import time.

The documented modules are Python around modules in C and spend their import on enumerations of
constants and on helpers (`enum`, `functools`, `collections`): 8 ms, two thirds of what the bare
interpreter takes to start, before a guest can run.  Here are the parts in C under their usual names, and the
little that is used of the rest.  A type checker sees the documented modules.  This module knows
nothing about virtual machines.
"""

from __future__ import annotations

__all__ = ("ExitStack", "Lock", "Task", "Thread", "deque", "in_main_thread", "signal")

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from _thread import LockType
    from collections import deque
    from collections.abc import Callable
    from contextlib import ExitStack
    from threading import Lock
    from typing import Any
else:
    import _signal as signal
    from _collections import deque
    from _thread import allocate_lock as Lock

    class ExitStack:
        """What contextlib's does for callbacks: they run in reverse order, all of them."""

        def __init__(self):
            self._callbacks = []

        def callback(self, function, /, *args):
            """Call `function(*args)` at the end."""
            self._callbacks.append((function, args))

        def pop_all(self):
            """Nothing is called at this end, but at that of the stack returned."""
            other = ExitStack()
            other._callbacks, self._callbacks = self._callbacks, []
            return other

        def close(self):
            """Make the calls, the last one first; an exception waits until all were made."""
            while self._callbacks:
                function, args = self._callbacks.pop()
                try:
                    function(*args)
                except BaseException:
                    self.close()
                    raise

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.close()


# Handlers run in the main thread only; a signal that lands on another one wakes nobody.
_HANDLED = frozenset(
    {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD, signal.SIGWINCH}
)


class Thread:
    """`target(*args)` in a thread of its own, for which the end of the process does not wait."""

    def __init__(self, target: Callable[..., None], *args: object) -> None:
        from _thread import start_new_thread

        self._ended = False
        self._running: LockType = Lock()
        self._running.acquire()
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        try:
            start_new_thread(self._run, (target, args))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)

    def _run(self, target: Callable[..., None], args: tuple[object, ...]) -> None:
        try:
            target(*args)
        finally:
            self._ended = True
            self._running.release()

    def join(self, timeout: float = -1) -> bool:
        """Wait for the end, at most `timeout` seconds; whether it came."""
        if not self._ended and self._running.acquire(timeout=timeout):
            # A signal handler that raises here leaves the lock taken; whoever joins next does not need it.
            self._running.release()
        return self._ended


class Task(Thread):
    """What concurrent.futures makes of a function: it runs beside us, `result` is what it returns."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._value: Any = None
        self._error: BaseException | None = None
        super().__init__(self._call, function)

    def _call(self, function: Callable[[], Any]) -> None:
        try:
            self._value = function()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        """Wait for the function's end; returns or raises what it did."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._value

    def close(self) -> None:
        """Wait for the end, whatever it is."""
        self.join()


def in_main_thread() -> bool:
    """Whether signal handlers run in this thread."""
    from _thread import get_native_id
    from os import getpid

    return get_native_id() == getpid()
