"""Where `--trace` goes: standard error or a file, for as long as somebody takes it.

It owns the descriptor and the rule that watching must not disturb: a reader that is gone or
stands still, or a full disk, ends the trace with one warning and the machine runs on.  What a
line says is `vhost_user.trace`'s.
"""

from __future__ import annotations

import os
from time import monotonic

from . import log
from .files import open_output, write_all
from .lean import Lock
from .vhost_user.trace import LEGEND, Trace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .config import TraceConfig

STDERR = 2
STANDSTILL = 1.0  # seconds for a reader to take something


class LineWriter:
    """Writes whole lines to `fd`, from any thread, until that fails.  `name` is for the warning."""

    def __init__(self, name: str, fd: int) -> None:
        self._name = name
        self._fd = fd
        self._lock = Lock()

    def write(self, line: str) -> None:
        """Write one line; after a failure nothing."""
        with self._lock:
            if self._fd < 0:
                return
            failure = _put(self._fd, line.encode("utf-8", "backslashreplace"))
            if failure:
                self._close()
        if failure:
            log.warn(f"{self._name}: {failure}; the trace ends here")

    def close(self) -> None:
        """Close the file; later lines are lost."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd > STDERR:
            os.close(fd)


def _put(fd: int, data: bytes) -> str:
    """Write `data`; why that failed, or nothing."""
    due = monotonic() + STANDSTILL
    try:
        return "" if write_all(fd, data, lambda: monotonic() < due) else "its reader stands still"
    except OSError as error:
        return os.strerror(error.errno or 0)


class OpenTrace(Trace):
    """A trace that owns what it writes to.  Raises ConfigError when the file cannot be opened."""

    def __init__(self, config: TraceConfig) -> None:
        fd, subject = STDERR, "--trace"
        if config.path:
            subject = f"--trace: {config.path}"
            fd = open_output(subject, config.path, emptied=True)
        self._lines = LineWriter(subject, fd)
        super().__init__(self._lines.write, config.format)
        if config.format == "text":
            self._lines.write(f"#    seconds device {LEGEND}\n")

    def close(self) -> None:
        """Close the file."""
        self._lines.close()
