"""Starting a backend with its socket in hand, again after each loss, and what is told when it ends.

It owns the process and the hand-over of the socket.  Where we make the listening socket it is
connected to and unlinked before the program starts, so there is nothing to wait for, nobody
else can connect, and no file is left behind.  A program serves one connection: many end with it
anyway, and what is left in another one's memory is of no use to a machine.  It must not know
what the program serves, nor what virtio does with the connection.
"""

from __future__ import annotations

import os
from _socket import AF_UNIX, SOCK_STREAM, socket
from time import monotonic, sleep

from .. import log
from ..ending import waiting
from ..errors import ConfigError
from ..lean import signal
from ..vhost_user.endpoint import Endpoint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from ..backend.process import DeviceProcess
    from ..child import ChildProcess
    from ..loop import EventLoop
    from .children import Child

    Arguments = Callable[[int], Sequence[str]]  # from the listening socket's number to argv
    PathArguments = Callable[[str], Sequence[str]]  # from the path to listen at

    class Process(Protocol):
        """A child of ours."""

        def ended(self) -> bool: ...
        def kill(self, number: int) -> None: ...


DEATH = 0.3  # seconds, how long a program whose connection broke may take to end and say why
GRACE = 2.0  # seconds that a program without a connection gets to end when it is asked to


class Leaving:
    """Ends a process in the course of some calls, none of which waits."""

    def __init__(self) -> None:
        self._asked = 0.0

    def over(self, process: Process) -> bool:
        """Whether it has ended; it is asked to the first time, and forced when it takes too long."""
        if process.ended():
            return True
        if not self._asked:
            self._asked = monotonic()
            process.kill(signal.SIGTERM)
        elif monotonic() - self._asked > GRACE:
            process.kill(signal.SIGKILL)
        return False


class BackendProcess:
    """A backend started for one device.  `endpoint` is what the frontend connects to.

    `argv` gets the number that the listening socket has in the child.  `close` ends the
    process if it still runs; close the frontend first, which lets the backend flush and end.
    `lock` is a descriptor to be closed after that; `prepare` runs in the child before the program.
    What the program prints is kept for its last words, or `spoken` where its lines are passed on.
    """

    def __init__(
        self,
        name: str,
        argv: Arguments,
        lock: int = -1,
        prepare: Callable[[], None] | None = None,
        *,
        spoken: bool = False,
    ) -> None:
        self._argv, self._prepare = argv, prepare
        self._lock = lock
        self._begin(name, spoken)

    def _begin(self, name: str, spoken: bool) -> None:
        self.name = name
        self._tell = self._say if spoken else None
        self._waiting: socket | None = None
        self._served = False
        self._leaving = Leaving()
        self.child = self._launch()
        self.endpoint = StartedEndpoint(self)

    def _launch(self) -> Child:
        """A fresh process, and a connection to it in `_waiting`."""
        from .children import Child

        listener, connection = connected_listener()
        try:
            child = Child(self._argv(listener.fileno()), (listener.fileno(),), self._prepare, self._tell)
        except BaseException:
            connection.close()
            raise
        finally:
            listener.close()
        self._waiting = connection
        return child

    @property
    def pid(self) -> int:
        """The process id."""
        return self.child.pid

    @property
    def pidfd(self) -> int:
        """Readable when the process has ended."""
        return self.child.pidfd

    def connection(self) -> socket | None:
        """A connection to a process that has had none, which may have to be started; None: not yet.

        Raises ConfigError when the program ended without a connection, or cannot be started.
        """
        if self._served:
            if not self._leaving.over(self.child):
                return None
            self.child.close()
            self.child = self._launch()
            self._served, self._leaving = False, Leaving()
            self.child.output.listen()
        sock = self._connect()
        if sock is None and self.child.ended():
            self._served = True  # it has had its turn
            raise ConfigError(f"{self.name} did not listen{self.explain()}")
        self._served = sock is not None
        return sock

    def _say(self, line: str) -> None:
        log.warn(f"{self.name}: {line}")

    def _connect(self) -> socket | None:
        sock, self._waiting = self._waiting, None
        return sock

    def explain(self, patience: float = DEATH) -> str:
        """How the process ended, which it has so many seconds for, and the last line that it printed."""
        if self.child.pidfd < 0:
            return ""
        status = self.child.wait(patience)
        words = self.child.last_words()
        end = f"it ended with status {status}" if status is not None else "it still runs"
        return f" ({end}: {words})" if words else f" ({end})"

    def close(self) -> None:
        """End and reap the process, and drop a connection that nobody took; harmless when repeated."""
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None
        self.child.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class ListeningProcess(BackendProcess):
    """A backend that makes its socket itself, at the path that `argv` gets: in a directory of ours."""

    def __init__(self, name: str, argv: PathArguments, *, spoken: bool = False) -> None:
        self._folder = _private_directory()
        self._path = os.path.join(self._folder, "s")
        self._path_argv = argv
        self._lock = -1
        try:
            self._begin(name, spoken)
        except BaseException:
            self._remove()
            raise

    def _launch(self) -> Child:
        from .children import Child

        _empty(self._folder)
        return Child(self._path_argv(self._path), tell=self._tell)

    def _connect(self) -> socket | None:
        sock = socket(AF_UNIX, SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            return None
        return sock

    def close(self) -> None:
        super().close()
        self._remove()

    def _remove(self) -> None:
        if os.path.isdir(self._folder):
            _empty(self._folder)
            os.rmdir(self._folder)


class StartedEndpoint(Endpoint):
    """Connects to a `BackendProcess`, each time to a fresh one."""

    same_again = True

    def __init__(self, process: BackendProcess) -> None:
        super().__init__(process.name)
        self.process = process

    def connect(self, timeout: float) -> socket:
        self.process.child.output.listen()
        end, pause = monotonic() + timeout, 0.002
        while (sock := self.process.connection()) is None:
            if monotonic() > end:
                raise ConfigError(f"{self.name}: does not listen (waited {timeout:g} s)")
            self.before_waiting()
            with waiting():
                sleep(pause)
            pause = min(pause * 1.5, 0.1)
        return sock

    def reconnect(self) -> socket | None:
        return self.process.connection()

    def holder(self) -> ChildProcess | None:
        return self.process.child

    def explain(self) -> str:
        return self.process.explain()

    def explain_later(self, loop: EventLoop, then: Callable[[str], None]) -> None:
        process, child = self.process, self.process.child
        if child.ended():
            then(process.explain(0))
            return

        def known() -> None:
            late.cancel()
            loop.remove_reader(child.pidfd)
            then(process.explain(0))

        late = loop.call_later(DEATH, known)
        loop.add_reader(child.pidfd, known)


class ForkedEndpoint(Endpoint):
    """A backend of ours in a process that `spawn` forks, again after each loss; `close` ends it."""

    same_again = True

    def __init__(self, name: str, spawn: Callable[[], DeviceProcess]) -> None:
        super().__init__(name)
        self._spawn = spawn
        self._leaving = Leaving()
        self.process = spawn()

    def connect(self, timeout: float) -> socket:
        return self.process.take_socket()

    def reconnect(self) -> socket | None:
        if not self._leaving.over(self.process):
            return None
        self.process.close()
        self.process, self._leaving = self._spawn(), Leaving()
        return self.process.take_socket()

    def holder(self) -> ChildProcess | None:
        return self.process

    def close(self) -> None:
        """End the process."""
        self.process.close()


def connected_listener() -> tuple[socket, socket]:
    """A listening socket and a connection that waits in its queue; the path is gone already."""
    folder = _private_directory()
    path = os.path.join(folder, "s")
    made: list[socket] = []
    try:
        listener = _socket(made)
        listener.bind(path)
        listener.listen(1)
        connection = _socket(made)
        connection.connect(path)
    except BaseException:
        for sock in made:
            sock.close()
        raise
    finally:
        if os.path.exists(path):
            os.unlink(path)
        os.rmdir(folder)
    return listener, connection


def _socket(made: list[socket]) -> socket:
    made.append(socket(AF_UNIX, SOCK_STREAM))
    return made[-1]


def _empty(folder: str) -> None:
    """Remove what a program has put there."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _empty(entry.path)
                os.rmdir(entry.path)
            else:
                os.unlink(entry.path)


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
