"""One-line messages to the user on standard error, by level.

It owns the verbosity and the memory of what was said once.  The standard `logging`
module costs more to import than a guest needs to start, and its features have no use
here.  Lines are written with one system call, so lines of threads never mix.
"""

from __future__ import annotations

import os

WARN, INFO, DEBUG = 0, 1, 2
level = WARN
_said: set[object] = set()


def _say(text: str) -> None:
    try:
        os.write(2, f"pyvmm: {text}\n".encode("utf-8", "backslashreplace"))
    except OSError:
        return  # standard error is gone; there is nobody to tell


def warn(text: str) -> None:
    """Say something that the user should know at every verbosity."""
    _say(text)


def info(text: str) -> None:
    """Say what is being done (-v)."""
    if level >= INFO:
        _say(text)


def debug(text: str) -> None:
    """Say what happens inside (-vv)."""
    if level >= DEBUG:
        _say(text)


def once(key: object, text: str) -> None:
    """Warn the first time that `key` is seen: a guest must not be able to flood the log."""
    if key not in _said:
        _said.add(key)
        warn(text)
