"""Where backends answer: a socket's path, an inherited descriptor, and how to connect.

It owns the wait for a backend that is still starting and the words for everything that
can be wrong with a socket.  It knows nothing of what is said over the connection.
"""

from __future__ import annotations

import errno
import os
import select
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

    from ..child import ChildProcess
    from ..loop import EventLoop

PATIENCE = 1.0  # seconds of waiting for a backend before the user is told
NOT_YET = (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN)  # the backend may still be starting
CONNECTED = "pass a connected Unix stream socket"


class Endpoint:
    """A place where a backend answers.  `name` is what messages call it.

    `before_waiting` is called when a backend is not there yet, and may raise what makes waiting useless.
    `final` says why there cannot be a second connection, if so; `same_again` that the next backend will be
    like the one before; `longest_pause` is how many seconds may pass between two looks for it.
    """

    final = ""
    same_again = False
    longest_pause = 2.0

    def __init__(self, name: str) -> None:
        self.name = name
        self.before_waiting: Callable[[], object] = _nothing

    def connect(self, timeout: float) -> socket:
        """A new connection, in at most `timeout` seconds; ConfigError says what to mend."""
        raise ConfigError(f"{self.name}: cannot be connected to")

    def reconnect(self) -> socket | None:
        """Another connection after one was lost, without waiting; None when it is not there yet.

        Called in the event loop's thread.  ConfigError says what keeps it from coming.
        """
        return None

    def holder(self) -> ChildProcess | None:
        """The process at the other end of the latest connection, if it is ours to end."""
        return None

    def explain(self) -> str:
        """What is known about why the backend went away, or nothing; may wait a moment for its end."""
        return ""

    def explain_later(self, loop: EventLoop, then: Callable[[str], None]) -> None:
        """The same for the thread of `loop`, which goes on meanwhile: `then` gets the words, or none."""
        then("")


class PathEndpoint(Endpoint):
    """A backend that listens on a Unix socket in the file system."""

    def connect(self, timeout: float) -> socket:
        path = self.name
        if len(os.fsencode(path)) > SOCKET_PATH_MAX:
            raise ConfigError(f"socket {path}: is longer than {SOCKET_PATH_MAX} bytes; use a shorter path")
        start, pause = monotonic(), 0.002
        while True:
            try:
                return self._connect()
            except OSError as error:
                self._judge(error, monotonic() - start, timeout)
                self.before_waiting()
            with waiting():
                sleep(pause)
            pause = min(pause * 1.5, 0.1)

    def reconnect(self) -> socket | None:
        try:
            return self._connect()
        except OSError as error:
            if error.errno in NOT_YET:
                return None
            raise ConfigError(f"socket {self.name}: {os.strerror(error.errno or 0)}") from None

    def _connect(self) -> socket:
        sock = socket(AF_UNIX, SOCK_STREAM)
        sock.setblocking(False)  # a full queue is EAGAIN then, instead of a wait without end
        try:
            sock.connect(self.name)
        except BaseException:
            sock.close()
            raise
        return sock

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

    final = "an inherited connection serves only once"

    def __init__(self, fd: int) -> None:
        super().__init__(f"fd {fd}")
        self._fd = fd

    def connect(self, timeout: float) -> socket:
        fd, self._fd = self._fd, -1
        if fd < 0:
            raise ConfigError(f"{self.name}: {self.final}")
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

    def reconnect(self) -> socket | None:
        return self._connect(0.0)


class ListeningEndpoint(Endpoint):
    """A socket of ours that backends connect to, one after another; removed at `close`.

    Raises ConfigError when nobody can listen at `path`.
    """

    longest_pause = 0.2  # a look at our own socket disturbs nobody

    def __init__(self, option: str, path: str) -> None:
        super().__init__(path)
        from ..streams import ListeningStream

        self._stream = ListeningStream(option, path)

    def connect(self, timeout: float) -> socket:
        end, told = monotonic() + timeout, monotonic() + PATIENCE
        poller = select.poll()
        poller.register(self._stream.listener.fileno(), select.POLLIN)
        while (sock := self.reconnect()) is None:
            if monotonic() > end:
                raise ConfigError(
                    f"socket {self.name}: no backend connected (waited {timeout:g} s); start the backend"
                )
            if monotonic() > told:
                log.once(("waiting", self.name), f"waiting for a backend to connect to {self.name}")
            self.before_waiting()
            with waiting():
                poller.poll(100)
        return sock

    def reconnect(self) -> socket | None:
        try:
            return self._stream.listener.accept()[0]
        except BlockingIOError:
            return None

    def close(self) -> None:
        """Listen no more and remove the socket."""
        self._stream.close()


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
