"""The VMM's one event loop: descriptors, timers and calls from other threads.

It owns an epoll instance and a wake-up pipe and runs in the thread that calls
`run`.  It does not know what the descriptors carry.  Method names are asyncio's, whose
import would cost more than booting a guest does.

Python runs a signal's handler between two steps of its own, so a signal that comes after the last
step before the wait would have to wait, too.  It therefore writes to the pipe while `run` has the
main thread.
"""

from __future__ import annotations

import errno
import os
import select
from _heapq import heappop, heappush
from time import monotonic

from .lean import deque, in_main_thread, signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    Callback = Callable[[], None]

EVENTS = select.EPOLLIN | select.EPOLLRDHUP
LONGEST_WAIT = 86400.0  # seconds at a time: poll and epoll take 2**31 ms; who waits longer waits again


class Timer:
    """A pending `call_later`; `cancel` makes it do nothing."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callback) -> None:
        self.when = when
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Have nothing happen when the time comes."""
        self.callback = None

    def __lt__(self, other: Timer) -> bool:
        return self.when < other.when


class EventLoop:
    """Level-triggered readers, one-shot timers, thread-safe calls, one `run`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._woken, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._epoll.register(self._woken, select.EPOLLIN)
        self._readers: dict[int, Callback] = {self._woken: self._run_posted}
        self._posted: deque[Callback] = deque()
        self._timers: list[Timer] = []
        self._stopped = False

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call `callback` whenever `fd` is readable or hung up, until `remove_reader`.

        Raises PermissionError for what cannot be waited for: regular files, /dev/null.
        """
        if fd not in self._readers:
            self._epoll.register(fd, EVENTS)
        self._readers[fd] = callback

    def remove_reader(self, fd: int) -> None:
        """Forget `fd`; harmless when it is unknown.  Call it before the fd is closed."""
        if self._readers.pop(fd, None) is not None:
            try:
                self._epoll.unregister(fd)
            except OSError as error:
                if error.errno not in (errno.EBADF, errno.ENOENT):
                    raise

    def pause(self, fd: int, seconds: float) -> None:
        """Leave the reader of `fd` alone for so long: it is ready, but nothing can be done about it now."""
        callback = self._readers[fd]
        self._epoll.modify(fd, 0)

        def go_on() -> None:
            if self._readers.get(fd) is callback:  # else it has been removed meanwhile
                self._epoll.modify(fd, EVENTS)

        self.call_later(seconds, go_on)

    def call_later(self, seconds: float, callback: Callback) -> Timer:
        """Call `callback` once, `seconds` from now."""
        timer = Timer(monotonic() + seconds, callback)
        heappush(self._timers, timer)
        return timer

    def call_soon_threadsafe(self, callback: Callback) -> None:
        """Call `callback` in the loop's thread; may be called from any thread.  Nothing once closed."""
        self._posted.append(callback)
        self._wake()

    def stop(self) -> None:
        """Make `run` return; may be called from any thread and from signal handlers."""
        self._stopped = True
        self._wake()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def run(self) -> None:
        """Dispatch until `stop`.  An exception in a callback ends the loop and is raised."""
        if not in_main_thread():
            self._run()
            return
        before = signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        try:
            self._run()
        finally:
            signal.set_wakeup_fd(before, warn_on_full_buffer=False)

    def close(self) -> None:
        """Close the loop's own descriptors; readers' descriptors belong to others."""
        self._readers.clear()
        self._timers.clear()
        self._epoll.close()
        waker, self._waker = self._waker, -1  # first: another thread may want to wake us while we close
        if waker >= 0:
            os.close(waker)
            os.close(self._woken)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while not self._stopped:
            self._turn(self._timeout())

    def _wake(self) -> None:
        if self._waker >= 0:
            try:
                os.write(self._waker, b"\0")
            except BlockingIOError:
                return  # full: it wakes already

    def _turn(self, timeout: float | None) -> None:
        """Wait for something to happen, at most so many seconds, and dispatch it."""
        ready = [(fd, self._readers.get(fd)) for fd, _ in self._epoll.poll(timeout)]
        for fd, callback in ready:
            if callback is not None and self._readers.get(fd) is callback:  # else it was another file's
                callback()
        self._run_timers()

    def _timeout(self) -> float | None:
        while self._timers and self._timers[0].callback is None:
            heappop(self._timers)
        return min(max(0.0, self._timers[0].when - monotonic()), LONGEST_WAIT) if self._timers else None

    def _run_timers(self) -> None:
        now = monotonic()
        while self._timers and self._timers[0].when <= now and not self._stopped:
            callback = heappop(self._timers).callback
            if callback is not None:
                callback()

    def _run_posted(self) -> None:
        os.read(self._woken, 4096)
        while self._posted:
            self._posted.popleft()()
