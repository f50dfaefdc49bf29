"""A command that runs somewhere else in this process's name: its signals, terminal, directories.

It owns the signal handlers while such a command runs.  It does not know where that is: a
guest and the lab both take `signal` and `resize`.
"""

from __future__ import annotations

import os

from .ending import Signals
from .errors import ConfigError
from .lean import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, Protocol, Self

    class Remote(Protocol):
        """What runs the command; both methods may be called in a signal handler.

        It calls `on_command` when the command starts, and ends it at the second Ctrl-C.
        """

        on_command: Callable[[], None]

        def signal(self, number: int) -> None: ...
        def resize(self, rows: int, columns: int) -> None: ...


def terminal_size() -> tuple[int, int] | None:
    """Rows and columns, when a person sits at both ends."""
    if not (os.isatty(0) and os.isatty(1)):
        return None
    columns, rows = os.get_terminal_size(1)
    return rows, columns


def shared_directory(option: str, path: str) -> str:
    """Absolute path, without links, of a directory that the command shall share."""
    if not os.path.isdir(path):  # of nothing, realpath would make the current directory
        raise ConfigError(f"{option} {path}: no such directory; make it first")
    return os.path.realpath(path)


class Resizes:
    """`with Resizes(react):` the terminal's SIGWINCH calls `react()`, in the main thread."""

    def __init__(self, react: Callable[[], object]) -> None:
        self._react = react

    def __enter__(self) -> Self:
        self._previous: Any = signal.signal(signal.SIGWINCH, lambda *_: self._react())
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGWINCH, self._previous)


class Foreground:
    """`with Foreground(remote):` signals go to `remote`, and the terminal (if any) to its command.

    Before the command starts, Ctrl-C is a signal like any other.  Leave the block after everything
    is closed: what a second signal would do then is not for the interpreter to decide.
    """

    def __init__(self, remote: Remote, terminal: bool) -> None:
        self._remote = remote
        self._wants_terminal = terminal
        self._signals = Signals(remote.signal)
        self._resizes = Resizes(self._resized)

    def __enter__(self) -> Self:
        from .streams import Terminal

        self._signals.__enter__()
        self._resizes.__enter__()
        self._terminal = Terminal()
        if self._wants_terminal:
            self._remote.on_command = self._terminal.start
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._terminal.close()
        self._resizes.__exit__()
        self._signals.__exit__()

    def _resized(self) -> None:
        size = terminal_size()
        if size:
            self._remote.resize(*size)
