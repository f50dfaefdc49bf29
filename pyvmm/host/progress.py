"""Progress of something long, on one line of standard error, for a person who watches.

When standard error is no terminal it says nothing.  It does not know what takes long.
"""

from __future__ import annotations

import os

_WIDTH = 100
_DIM, _PLAIN, _CLEAR = "\033[2m", "\033[0m", "\r\033[K"


class Progress:
    """`show` replaces the line, `clear` removes it."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._active = os.isatty(2)
        self._shown = False

    def show(self, text: str) -> None:
        """Say what is going on now."""
        if self._active:
            self._shown = True
            line = f"[{self._title}] {text}"
            self._write(f"{_CLEAR}{_DIM}{line[:_WIDTH]}{_PLAIN}")

    def clear(self) -> None:
        """Leave the line empty, for what comes next."""
        if self._shown:
            self._shown = False
            self._write(_CLEAR)

    def _write(self, text: str) -> None:
        try:
            os.write(2, text.encode("utf-8", "replace"))
        except OSError:
            self._active = False
