"""Starting a backend with its socket in hand, and what can be told when it ends.

It owns the process and the hand-over of the socket: the listening socket is made, connected
to and unlinked before the program starts, so there is nothing to wait for, nobody else can
connect, and no file is left behind.  It must not know what the program serves, nor what
virtio does with the connection.
"""

from __future__ import annotations

import os
from _socket import AF_UNIX, SOCK_STREAM, socket

from ..errors import ConfigError
from ..vhost_user.endpoint import Endpoint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .children import Child

    Arguments = Callable[[int], Sequence[str]]  # from the listening socket's number to argv

DEATH_MS = 300  # how long a program whose connection broke may take to end and say why


class BackendProcess:
    """A backend started for one device.  `endpoint` is what the frontend connects to.

    `argv` gets the number that the listening socket has in the child.  `close` ends the
    process if it still runs; close the frontend first, which lets the backend flush and end.
    `lock` is a descriptor to be closed after that; `prepare` runs in the child before the program.
    """

    def __init__(
        self, name: str, argv: Arguments, lock: int = -1, prepare: Callable[[], None] | None = None
    ) -> None:
        from .children import Child

        self.name = name
        listener, connection = connected_listener()
        try:
            self.child = Child(argv(listener.fileno()), (listener.fileno(),), prepare)
        except BaseException:
            connection.close()
            raise
        finally:
            listener.close()
        self.endpoint = StartedEndpoint(name, connection, self.child)
        self._lock = lock

    @property
    def pid(self) -> int:
        """The process id."""
        return self.child.pid

    @property
    def pidfd(self) -> int:
        """Readable when the process has ended."""
        return self.child.pidfd

    def close(self) -> None:
        """End and reap the process, and drop a connection that nobody took; harmless when repeated."""
        self.endpoint.close()
        self.child.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class StartedEndpoint(Endpoint):
    """The one connection to a backend that was started here."""

    def __init__(self, name: str, connection: socket, child: Child) -> None:
        super().__init__(name)
        self._connection: socket | None = connection
        self._child = child

    def connect(self, timeout: float) -> socket:
        connection, self._connection = self._connection, None
        if connection is None:
            raise ConfigError(f"{self.name}: serves one connection, and that was taken")
        return connection

    def explain(self) -> str:
        """How the process ended and the last line that it printed."""
        if self._child.pidfd < 0:
            return ""
        status = self._child.wait(DEATH_MS)
        words = self._child.last_words()
        end = f"it ended with status {status}" if status is not None else "it still runs"
        return f" ({end}: {words})" if words else f" ({end})"

    def close(self) -> None:
        """Drop the connection if nobody took it."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def connected_listener() -> tuple[socket, socket]:
    """A listening socket and a connection that waits in its queue; the path is gone already."""
    folder = _private_directory()
    path = os.path.join(folder, "s")
    listener, connection = socket(AF_UNIX, SOCK_STREAM), socket(AF_UNIX, SOCK_STREAM)
    try:
        listener.bind(path)
        listener.listen(1)
        connection.connect(path)
    except BaseException:
        listener.close()
        connection.close()
        raise
    finally:
        if os.path.exists(path):
            os.unlink(path)
        os.rmdir(folder)
    return listener, connection


def _private_directory() -> str:
    base = os.environ.get("XDG_RUNTIME_DIR") or "/tmp"
    if not os.access(base, os.W_OK) or len(base) > 60:
        base = "/tmp"
    path = os.path.join(base, f"pyvmm-{os.getpid()}-{os.urandom(6).hex()}")
    try:
        os.mkdir(path, 0o700)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; set XDG_RUNTIME_DIR to a writable directory") from None
    return path
