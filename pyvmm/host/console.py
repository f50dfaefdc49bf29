"""The kernel console of an emulated machine: kept for a post-mortem, shown when wanted.

It owns one end of a socket pair and the last of what came out of it.
"""

from __future__ import annotations

import os
from _socket import socketpair

from ..errors import GuestError, GuestPanic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket

    from ..loop import EventLoop

_KEPT = 64 * 1024
_PANIC = b"Kernel panic - not syncing: "
_INIT = b"pyvmm-init: fatal: "
_LAST_WORDS: tuple[tuple[bytes, type[GuestError], str], ...] = (
    (_PANIC, GuestPanic, "its kernel panicked"),
    (_INIT, GuestError, "its init said"),
)


class ConsoleLog:
    """Reads the console until `close`.  With `verbose` it also goes to standard error."""

    def __init__(self, loop: EventLoop, verbose: bool = False) -> None:
        self._loop, self._verbose = loop, verbose
        self._ours, self._theirs = socketpair()
        self.text = b""
        loop.add_reader(self._ours.fileno(), self._ready)

    def take_socket(self) -> socket:
        """The machine's end; the caller closes it."""
        return self._theirs

    def _ready(self) -> None:
        self._read()

    def _read(self) -> bool:
        data = self._ours.recv(65536)
        if not data:
            self._loop.remove_reader(self._ours.fileno())
        self.text = (self.text + data)[-_KEPT:]
        if self._verbose:
            os.write(2, data.replace(b"\r\n", b"\n"))
        return bool(data)

    def drain(self) -> None:
        """Take what the machine said last, when the loop does not run any more."""
        self._ours.setblocking(False)
        try:
            while self._read():
                pass
        except BlockingIOError:
            return

    def explain(self, how: str) -> GuestError:
        """Why the machine ended without a word from its init; `how` is what else is known, or nothing."""
        for mark, kind, what in _LAST_WORDS:
            if mark in self.text:
                return kind(f"the guest ended: {what}: {_line_after(self.text, mark)}")
        last = self.text.strip().split(b"\n")[-1].decode("utf-8", "replace").strip()
        said = [how] if how else []
        said += [f"its console's last line: {last}"] if last else []
        return GuestError("; ".join(["the guest ended without a word", *said]))

    def close(self) -> None:
        """Release both ends."""
        if self._ours.fileno() >= 0:
            self._loop.remove_reader(self._ours.fileno())
        self._ours.close()
        self._theirs.close()


def _line_after(text: bytes, mark: bytes) -> str:
    return text.split(mark)[-1].split(b"\n")[0].decode("utf-8", "replace").strip()
