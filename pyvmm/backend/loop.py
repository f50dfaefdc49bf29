"""The backends' event loop: the VMM's, which can also wait until a descriptor is writable.

A writer is an epoll instance inside the loop's own: readable there means writable here, so
the same descriptor may have a reader and a writer.  It must not know what is written.
Method names are asyncio's.
"""

from __future__ import annotations

import select

from ..loop import EventLoop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..loop import Callback


class Watch:
    """Calls back while `fd` shows one of the epoll `events` (hang-ups and errors always)."""

    def __init__(self, loop: EventLoop, fd: int, events: int, callback: Callback) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        try:
            self._epoll.register(fd, events)
            loop.add_reader(self._epoll.fileno(), callback)
        except BaseException:
            self._epoll.close()
            raise

    def close(self) -> None:
        """Stop watching; harmless the second time."""
        if not self._epoll.closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()


def can_poll(fd: int) -> bool:
    """Whether a loop can watch `fd`: epoll refuses files and /dev/null, which are always ready."""
    with select.epoll() as epoll:
        try:
            epoll.register(fd, 0)
        except PermissionError:
            return False
    return True


class DeviceLoop(EventLoop):
    """`EventLoop` with `add_writer` and `remove_writer`."""

    def __init__(self) -> None:
        super().__init__()
        self._writers: dict[int, Watch] = {}

    def add_writer(self, fd: int, callback: Callback) -> None:
        """Call `callback` whenever `fd` can be written, until `remove_writer`."""
        self.remove_writer(fd)
        self._writers[fd] = Watch(self, fd, select.EPOLLOUT, callback)

    def remove_writer(self, fd: int) -> None:
        """Forget `fd`; harmless when it is unknown.  Call it before the fd is closed."""
        watch = self._writers.pop(fd, None)
        if watch is not None:
            watch.close()

    def fileno(self) -> int:
        """Readable when `turn` has something to do, timers aside: for a loop around this one."""
        return self._epoll.fileno()

    def turn(self) -> float | None:
        """Dispatch what is ready, without waiting; seconds until the next timer, None without one."""
        self._turn(0)
        return self._timeout()

    def close(self) -> None:
        for fd in list(self._writers):
            self.remove_writer(fd)
        super().close()
