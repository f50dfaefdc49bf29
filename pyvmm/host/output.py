"""What a helper program prints: kept for its last words, or passed on line by line.

It owns the descriptors for that.  It must not know which program prints.
"""

from __future__ import annotations

import os
import select

from ..lean import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_TAIL = 4096
_LINE = 1000  # bytes of a line that are passed on
_MOMENT = 0.2  # seconds
_AT_ONCE = 65536  # bytes read in one go: as much as a pipe holds


class Kept:
    """Keeps everything in a file without a name; `fd` is for the program."""

    def __init__(self, name: str) -> None:
        self.fd = os.memfd_create(f"{name} output", os.MFD_CLOEXEC)

    def started(self) -> None:
        """The program has its own copy of `fd`."""

    def listen(self) -> None:
        """Nobody is told."""

    def last(self) -> str:
        """The last line, or nothing."""
        size = os.fstat(self.fd).st_size
        tail = os.pread(self.fd, _TAIL, max(0, size - _TAIL)).strip()
        return tail.split(b"\n")[-1].decode("utf-8", "replace")

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


class Passed:
    """Calls `tell` with each line, in a thread of its own: a program that prints waits for nobody.

    `fd` is for the program.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._reader, self.fd = os.pipe2(os.O_CLOEXEC)
        self._stop, self._stopper = os.pipe2(os.O_CLOEXEC)
        self._thread: Thread | None = None
        self._rest = b""
        self._last = ""

    def started(self) -> None:
        """The program has its own copy of `fd`: its end is the pipe's."""
        os.close(self.fd)
        self.fd = -1

    def listen(self) -> None:
        """Pass lines on as they come; not before the last of our own backends is forked."""
        if self._thread is None:
            self._thread = Thread(self._read)

    def last(self) -> str:
        """The last line, or nothing; what was printed just now gets a moment to arrive."""
        self.listen()
        assert self._thread is not None
        self._thread.join(_MOMENT)
        return self._last

    def close(self) -> None:
        """Pass on what is left, and close the pipe; the thread does, lest it read from another file."""
        if self._stopper < 0:
            return
        self.listen()
        assert self._thread is not None
        os.close(self._stopper)
        self._stopper = -1
        self._thread.join(_MOMENT)  # it may be held up by whoever does not read what we say
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _read(self) -> None:
        poll = select.poll()
        for fd in (self._reader, self._stop):
            poll.register(fd, select.POLLIN)
        ready: set[int] = set()
        while self._stop not in ready:
            ready = {fd for fd, _ in poll.poll()}
            if self._reader in ready and not self._take():
                break
        self._line(self._rest)
        for fd in (self._reader, self._stop):
            os.close(fd)

    def _take(self) -> bool:
        """Pass on what is there; false at the end."""
        data = os.read(self._reader, _AT_ONCE)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[:_LINE]
        for line in lines:
            self._line(line)
        return bool(data)

    def _line(self, line: bytes) -> None:
        text = line[:_LINE].decode("utf-8", "replace").strip()
        if text:
            self._last = text
            self._tell(text)
