"""Files that users name: opened without ever waiting, and only where their kind makes sense.

It owns the words for everything that can be wrong with a path, and how to write to a reader that may
stop reading.  A pipe that nobody writes to would stop the program for ever, and a directory can
be opened and not read; neither gets through here.  What the file is for is the caller's.
"""

from __future__ import annotations

import errno
import os
import select
import stat

from .errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable, Mapping

    Test = Callable[[int], bool]

_KINDS: tuple[tuple[Test, str], ...] = (
    (stat.S_ISREG, "regular file"),
    (stat.S_ISDIR, "directory"),
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "character device"),
    (stat.S_ISBLK, "block device"),
)
SOCKET_PATH_MAX = 107  # sun_path less its terminating zero
OUTPUT_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND
OUTPUT_CURE = "a writable file is needed"
PIECE = 4096  # what a pipe that polls writable takes without blocking
LOOK_MS = 100
_REASONS = {errno.ENXIO: "nobody is at its other end"}


def open_file(
    subject: str, path: str, cure: str, *tests: Test, flags: int = os.O_RDONLY, mode: int = 0o644
) -> int:
    """A close-on-exec descriptor of `path`, whose kind passes one of `tests` (default: a regular file).

    Raises ConfigError "`subject`: what is wrong; `cure`", whose cause is the OSError if there was one.
    """
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, mode)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{subject}: {_reason(error)}; {cure}") from error
    kind = os.fstat(fd).st_mode
    if not any(test(kind) for test in tests or (stat.S_ISREG,)):
        os.close(fd)
        raise ConfigError(f"{subject}: is a {_name(kind)}; {cure}")
    os.set_blocking(fd, True)
    return fd


def open_output(subject: str, path: str, *, emptied: bool) -> int:
    """A descriptor that appends to `path`, which may be new; a pipe needs its reader.  Raises ConfigError.

    Who does not know yet whether there will be something to write calls `empty` later: a start that fails
    must not cost an old log.
    """
    kinds = (stat.S_ISREG, stat.S_ISCHR, stat.S_ISFIFO)
    flags = OUTPUT_FLAGS | (os.O_TRUNC if emptied else 0)
    return open_file(subject, path, OUTPUT_CURE, *kinds, flags=flags)


def empty(subject: str, fd: int) -> None:
    """Forget what an output file held before.  Raises ConfigError like `open_output`."""
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.ftruncate(fd, 0)
    except OSError as error:
        raise ConfigError(f"{subject}: {_reason(error)}; {OUTPUT_CURE}") from error


def check_apart(outputs: Mapping[str, str], others: Mapping[str, str]) -> None:
    """Refuse to write what others use: from paths to what messages call them.  Raises ConfigError."""
    used = {_file(path): name for path, name in others.items()} if outputs else {}
    for path, name in outputs.items():
        other = used.get(_file(path))
        if other:
            raise ConfigError(f"{name}: {path}: is the file of {other}; write to another one")


def _file(path: str) -> object:
    """What two paths to one regular file have in common, or a path of its own."""
    try:
        facts = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return (facts.st_dev, facts.st_ino) if stat.S_ISREG(facts.st_mode) else object()


def write_all(fd: int, data: bytes, go_on: Callable[[], bool]) -> bool:
    """Write `data` at the reader's pace; whether all of it was taken.

    While nothing is taken, `go_on` is asked ten times a second whether to wait longer.  Raises OSError.
    """
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while data:
        if poll.poll(LOOK_MS):
            data = data[os.write(fd, data[:PIECE]) :]
        elif not go_on():
            return False
    return True


class SocketFile:
    """The file at `path` of a listening socket: what a dead server left is replaced, only ours is removed."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._ours: tuple[int, ...] | None = None

    def bind(self, sock: socket) -> None:
        """Bind `sock` there; OSError, as when somebody listens there."""
        unlink_stale(self.path)
        sock.bind(self.path)
        self._ours = _identity(self.path)

    def remove(self) -> None:
        """Remove the file, unless somebody has put another there; harmless when repeated."""
        ours, self._ours = self._ours, None
        if ours is not None and _identity(self.path) == ours:
            os.unlink(self.path)


def unlink_stale(path: str) -> None:
    """Remove a socket left over from before; anything else at `path` stays, and one in use.

    Whether somebody listens shows in how connecting a datagram socket fails, which the
    listener does not notice.
    """
    from _socket import AF_UNIX, SOCK_DGRAM, socket

    probe = socket(AF_UNIX, SOCK_DGRAM)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    except OSError:
        return  # it is used, absent or out of reach: listening will tell
    finally:
        probe.close()


def _identity(path: str) -> tuple[int, ...] | None:
    """What a change of owner or mode leaves alone; numbers of inodes alone are used again."""
    try:
        facts = os.lstat(path)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino, facts.st_mtime_ns


def _reason(error: OSError | ValueError) -> str:
    if not isinstance(error, OSError):
        return str(error)
    return _REASONS.get(error.errno or 0) or error.strerror or str(error)


def _name(kind: int) -> str:
    return next((name for test, name in _KINDS if test(kind)), "file of an unknown kind")
