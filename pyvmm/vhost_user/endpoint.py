"""Where backends answer: a socket's path, an inherited descriptor, and how to connect.

It owns the wait for a backend that is still starting and the words for everything that
can be wrong with a socket.  It knows nothing of what is said over the connection.
"""

from __future__ import annotations

import errno
import os
import stat
from _socket import AF_UNIX, SO_DOMAIN, SO_TYPE, SOCK_STREAM, SOL_SOCKET, socket
from time import monotonic, sleep

from .. import log
from ..ending import waiting
from ..errors import ConfigError
from ..files import SOCKET_PATH_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 1.0  # seconds of waiting for a backend before the user is told
NOT_YET = (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN)  # the backend may still be starting
CONNECTED = "pass a connected Unix stream socket"


class Endpoint:
    """A place where a backend answers.  `name` is what messages call it.

    `before_waiting` is called when a backend is not there yet, and may raise what makes waiting useless.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.before_waiting: Callable[[], object] = _nothing

    def connect(self, timeout: float) -> socket:
        """A new connection, in at most `timeout` seconds; ConfigError says what to mend."""
        raise ConfigError(f"{self.name}: cannot be connected to")

    def explain(self) -> str:
        """What is known about why the backend went away, or nothing."""
        return ""


class PathEndpoint(Endpoint):
    """A backend that listens on a Unix socket in the file system."""

    def connect(self, timeout: float) -> socket:
        path = self.name
        if len(os.fsencode(path)) > SOCKET_PATH_MAX:
            raise ConfigError(f"socket {path}: is longer than {SOCKET_PATH_MAX} bytes; use a shorter path")
        start, pause = monotonic(), 0.002
        while True:
            sock = socket(AF_UNIX, SOCK_STREAM)
            sock.setblocking(False)  # a full queue is EAGAIN then, instead of a wait without end
            try:
                sock.connect(path)
                return sock
            except OSError as error:
                sock.close()
                self._judge(error, monotonic() - start, timeout)
                self.before_waiting()
            except BaseException:
                sock.close()
                raise
            with waiting():
                sleep(pause)
            pause = min(pause * 1.5, 0.1)

    def _judge(self, error: OSError, waited: float, timeout: float) -> None:
        """Return when it is worth another try, else raise what is wrong."""
        if error.errno in NOT_YET and self._may_come(error) and waited < timeout:
            if waited > PATIENCE:
                log.once(("waiting", self.name), f"waiting for a backend at socket {self.name}")
            return
        cures = {
            errno.ENOENT: f"does not exist (waited {timeout:g} s); start the backend or mend the path",
            errno.ECONNREFUSED: f"nobody listens there (waited {timeout:g} s); start the backend",
            errno.EAGAIN: f"no connection is taken (waited {timeout:g} s); does it serve another VM?",
            errno.EACCES: "permission denied; run as a user that may write to the socket",
            errno.EPROTOTYPE: "is no stream socket; vhost-user backends listen on a stream socket",
        }
        reason = cures.get(error.errno or 0, os.strerror(error.errno or 0))
        raise ConfigError(f"socket {self.name}: {reason}") from None

    def _may_come(self, error: OSError) -> bool:
        if error.errno != errno.ECONNREFUSED:
            return True
        try:
            if stat.S_ISSOCK(os.stat(self.name).st_mode):
                return True
        except OSError:
            return True
        raise ConfigError(f"socket {self.name}: is not a socket; give the path that the backend listens on")


class FdEndpoint(Endpoint):
    """A connected socket that was inherited, good for one connection."""

    def __init__(self, fd: int) -> None:
        super().__init__(f"fd {fd}")
        self._fd = fd

    def connect(self, timeout: float) -> socket:
        fd, self._fd = self._fd, -1
        if fd < 0:
            raise ConfigError(f"{self.name}: an inherited connection serves only once")
        try:
            sock = socket(fileno=fd)
        except OSError as error:
            raise ConfigError(f"{self.name}: {os.strerror(error.errno or 0)}; {CONNECTED}") from None
        wrong = _why_unfit(sock)
        if wrong:
            sock.close()
            raise ConfigError(f"{self.name}: {wrong}; {CONNECTED}")
        os.set_inheritable(fd, False)
        return sock


def _why_unfit(sock: socket) -> str:
    if (
        sock.getsockopt(SOL_SOCKET, SO_DOMAIN) != AF_UNIX
        or sock.getsockopt(SOL_SOCKET, SO_TYPE) != SOCK_STREAM
    ):
        return "is no Unix stream socket"
    try:
        sock.getpeername()
    except OSError as error:
        return os.strerror(error.errno or 0)
    return ""


class CallEndpoint(Endpoint):
    """A backend that a function connects to: it gets the seconds allowed."""

    def __init__(self, name: str, connect: Callable[[float], socket]) -> None:
        super().__init__(name)
        self._connect = connect

    def connect(self, timeout: float) -> socket:
        return self._connect(timeout)


def _nothing() -> None:
    """Nothing stands against waiting."""


def endpoint(where: Endpoint | str | int | Callable[[float], socket]) -> Endpoint:
    """The endpoint that a path, an inherited descriptor or a connecting function stands for."""
    if isinstance(where, Endpoint):
        return where
    if isinstance(where, str):
        return PathEndpoint(where)
    if isinstance(where, int):
        return FdEndpoint(where)
    return CallEndpoint("backend", where)
