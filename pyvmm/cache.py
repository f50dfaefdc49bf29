"""The user's cache directory: where it is, and how a file gets into it whole.

It owns the place (XDG base directory specification) and the write-then-rename.  It does
not know what is cached, nor when an entry has become useless.
"""

from __future__ import annotations

import os

from .errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO


def directory(*below: str) -> str:
    """`$XDG_CACHE_HOME/pyvmm/...` (default `~/.cache`), not created; relative settings are ignored."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "pyvmm", *below)


class Unusable(ConfigError):
    """Nothing can be kept in the cache."""


def make(*below: str) -> str:
    """`directory`, made if it is not there.  Raises Unusable when nothing can be put into it."""
    path = directory(*below)
    try:
        os.makedirs(path, exist_ok=True)
        reason = "" if os.access(path, os.W_OK | os.X_OK) else "is not writable"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise Unusable(f"the cache {path}: {reason}; set XDG_CACHE_HOME to a writable directory")
    return path


class whole_file:
    """`with whole_file(path) as file:` makes `path` appear complete, or not at all."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._temporary = f"{path}.{os.getpid()}.part"

    def __enter__(self) -> IO[bytes]:
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        self._file = open(self._temporary, "wb")
        return self._file

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._temporary, self.path)
        else:
            os.unlink(self._temporary)


def entries(*below: str) -> Iterator[os.DirEntry[str]]:
    """What is cached in a directory; nothing when it is not there."""
    try:
        yield from os.scandir(directory(*below))
    except OSError:
        return
