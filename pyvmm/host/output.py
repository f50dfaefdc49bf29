"""What a helper program prints: kept for its last words, or passed on line by line.

It owns the descriptors for that.  It must not know which program prints.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..loop import EventLoop

_TAIL = 4096
_LINE = 1000  # bytes of a line that are passed on
_AT_ONCE = 65536  # bytes read in one go: as much as a pipe holds


class Kept:
    """Keeps everything in a file without a name; `fd` is for the program."""

    def __init__(self, name: str) -> None:
        self.fd = os.memfd_create(f"{name} output", os.MFD_CLOEXEC)

    def started(self) -> None:
        """The program has its own copy of `fd`."""

    def watch(self, loop: EventLoop) -> None:
        """Nobody listens."""

    def last(self) -> str:
        """The last line, or nothing."""
        size = os.fstat(self.fd).st_size
        tail = os.pread(self.fd, _TAIL, max(0, size - _TAIL)).strip()
        return tail.split(b"\n")[-1].decode("utf-8", "replace")

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


class Passed:
    """Calls `tell` with each line, in the thread of the loop that watches; `fd` is for the program."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._reader, self.fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._reader, False)
        self._loop: EventLoop | None = None
        self._rest = b""
        self._last = ""

    def started(self) -> None:
        """The program has its own copy of `fd`: its end is the pipe's."""
        os.close(self.fd)
        self.fd = -1

    def watch(self, loop: EventLoop) -> None:
        """Pass lines on as they come."""
        self._loop = loop
        loop.add_reader(self._reader, self._read)

    def last(self) -> str:
        """The last line, or nothing."""
        self._read()
        return self._last

    def close(self) -> None:
        """Pass on what is left, and close the pipe."""
        if self._reader < 0:
            return
        self._read()
        self._line(self._rest)
        self._unwatch()
        for fd in (self._reader, self.fd):
            if fd >= 0:
                os.close(fd)
        self._reader = self.fd = -1

    def _read(self) -> None:
        try:
            data = os.read(self._reader, _AT_ONCE)
        except BlockingIOError:
            return
        if not data:
            self._unwatch()
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[:_LINE]
        for line in lines:
            self._line(line)

    def _line(self, line: bytes) -> None:
        text = line[:_LINE].decode("utf-8", "replace").strip()
        if text:
            self._last = text
            self._tell(text)

    def _unwatch(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._reader)
            self._loop = None
