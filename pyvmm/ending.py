"""The signals that end the program: taken at once while it waits, else where that is safe.

A signal handler that raises may do so between any two instructions, for example after a
process was started and before anybody owns it.  So handlers only take a note here, and the
few places that may wait long say so with `waiting()`: there the note is raised, as
SystemExit with the status that shells give to signals.  This module must not know what
else the handlers do.
"""

from __future__ import annotations

from .lean import in_main_thread, signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Note:
    number = 0
    open = False  # the main thread waits, and nothing was raised yet


class Signals:
    """`with Signals(react):` each of SIGNALS calls `react(number)`, in the main thread.

    Signals that are ignored, as under nohup, stay ignored.
    """

    def __init__(self, react: Callable[[int], None]) -> None:
        self._react = react
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            previous = signal.getsignal(number)
            if previous != signal.SIG_IGN:
                self._previous[number] = previous
                signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        _Note.number = 0

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self._react(number)
        _Note.number = _Note.number or number
        if _Note.open:
            _Note.open = False
            raise SystemExit(128 + _Note.number)


class waiting:
    """`with waiting():` around what may take long and holds nothing that would be lost.

    Only the main thread is interrupted, since only it gets signals.
    """

    def __enter__(self) -> None:
        if in_main_thread():
            _Note.open = True
            if _Note.number:
                _Note.open = False
                raise SystemExit(128 + _Note.number)

    def __exit__(self, *_: object) -> None:
        if in_main_thread():
            _Note.open = False


def give_way() -> None:
    """Raise what `waiting` would; for other threads, between two steps of something long."""
    if _Note.number:
        raise SystemExit(128 + _Note.number)


class held:
    """`with held():` around a fork, so that a child never runs its parent's handlers.

    The child unblocks SIGNALS once it has handlers of its own; see `release`.
    """

    def __enter__(self) -> None:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)


def release() -> None:
    """In a child: forget what the parent was told, and let the signals come that `held` holds back."""
    _Note.number, _Note.open = 0, False
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
