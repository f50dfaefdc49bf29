"""One-line messages to the user on standard error, by level.

It owns the verbosity and the memory of what was said once.  The standard `logging`
module costs more to import than a guest needs to start, and its features have no use
here.  Lines are written with one system call, so lines of threads never mix.  A reader that stands still
loses lines: it must not hold up a machine, nor its end.
"""

from __future__ import annotations

import os
import select
from _thread import allocate_lock

PIECE = 4096  # what a pipe that polls writable takes without blocking
PATIENCE = 1.0  # seconds for a reader
WARN, INFO, DEBUG = 0, 1, 2
level = WARN
_said: set[object] = set()
_lock = allocate_lock()  # guards the room that was found
os.register_at_fork(after_in_child=_lock._at_fork_reinit)  # type: ignore[attr-defined]


def _say(text: str) -> None:
    data = f"pyvmm: {text}\n".encode("utf-8", "backslashreplace")
    if not _lock.acquire(timeout=PATIENCE):
        return
    try:
        while data and _room():
            data = data[os.write(2, data[:PIECE]) :]
    except OSError:
        return  # standard error is gone; there is nobody to tell
    finally:
        _lock.release()


def _room() -> bool:
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    return bool(poll.poll(PATIENCE * 1000))


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
