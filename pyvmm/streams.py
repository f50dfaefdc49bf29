"""Where a console's bytes go on the host: nothing, the terminal, a pty, a file, a socket.

It owns the host's descriptors and the terminal's mode, which is put back whatever
happens.  It does not know which device uses the stream.
"""

from __future__ import annotations

import os
from _socket import SHUT_RDWR

from . import log
from .errors import ConfigError
from .files import SOCKET_PATH_MAX, SocketFile, empty, open_output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .config import StreamConfig


class Stream:
    """An input and an output descriptor (-1: none) and what must be undone at the end."""

    def __init__(self, input_fd: int = -1, output_fd: int = -1, owned: tuple[int, ...] = ()) -> None:
        self.input_fd = input_fd
        self.output_fd = output_fd
        self._owned = owned

    def start(self) -> None:
        """The guest runs from now on."""

    def size(self) -> tuple[int, int] | None:
        """Columns and rows, where there are any."""
        return None

    def close(self) -> None:
        """Close what was opened here; harmless when repeated."""
        for fd in self._owned:
            os.close(fd)
        self._owned = ()
        self.input_fd = self.output_fd = -1


class FileStream(Stream):
    """A file to append to, emptied at `start`."""

    def __init__(self, option: str, path: str) -> None:
        self._subject = f"{option}: {path}"
        fd = open_output(self._subject, path, emptied=False)
        super().__init__(-1, fd, (fd,))

    def start(self) -> None:
        """Forget what the file held before."""
        empty(self._subject, self.output_fd)


class Terminal(Stream):
    """Standard input and output, the terminal in raw mode from `start` to `close`.

    Until then Ctrl-C is the user's, who may not want to wait for a backend.
    """

    def __init__(self) -> None:
        super().__init__(0, 1)
        self._saved: list[object] | None = None

    def start(self) -> None:
        """Let the guest have every key."""
        if os.isatty(0):
            import termios
            import tty

            self._saved = termios.tcgetattr(0)
            tty.setraw(0, termios.TCSANOW)

    def size(self) -> tuple[int, int] | None:
        """What the terminal says; nothing when output goes elsewhere."""
        if not os.isatty(1):
            return None
        columns, rows = os.get_terminal_size(1)
        return columns, rows

    def close(self) -> None:
        """Put the terminal back as it was found."""
        super().close()
        saved, self._saved = self._saved, None
        if saved is not None:
            import termios

            try:
                termios.tcsetattr(0, termios.TCSADRAIN, saved)  # type: ignore[arg-type]
            except termios.error as error:
                log.debug(f"the terminal is gone: {error}")


class ListeningStream(Stream):
    """A unix socket that one peer at a time may connect to; see `accept`.

    Where that fails, as while the process has no descriptor left, look again after PATIENCE seconds.
    """

    PATIENCE = 0.1

    def __init__(self, option: str, path: str) -> None:
        super().__init__()
        import socket

        self._peer: socket.socket | None = None
        if len(os.fsencode(path)) > SOCKET_PATH_MAX:
            raise ConfigError(f"{option}: {path}: is longer than {SOCKET_PATH_MAX} bytes; use a shorter path")
        self._file = SocketFile(path)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._file.bind(self.listener)
            self.listener.listen(1)
        except OSError as error:
            self.listener.close()
            raise ConfigError(
                f"{option}: cannot listen at {path}: {error.strerror}; use another path"
            ) from error

    def accept(self) -> None:
        """Take the waiting peer; an earlier one is dropped."""
        peer, _ = self.listener.accept()
        self.drop()
        self._peer = peer
        self.input_fd = self.output_fd = peer.fileno()

    def hang_up(self) -> None:
        """End the connection, if there is one: a thread that writes to the peer notices at once."""
        if self._peer is not None:
            self._peer.shutdown(SHUT_RDWR)

    def drop(self) -> None:
        """Forget the peer, to whom nobody writes any more."""
        super().close()
        if self._peer is not None:
            self._peer.close()
            self._peer = None

    def close(self) -> None:
        """Close everything and remove the socket."""
        self.drop()
        if self.listener.fileno() >= 0:
            self.listener.close()
            self._file.remove()


def open_stream(option: str, config: StreamConfig) -> Stream:
    """Open what `config` names; `option` is for messages.  Raises ConfigError."""
    if config.mode == "fd":
        return Stream(config.fd, config.fd)
    return _OPENERS[config.mode](option, config.path)


def _nothing(option: str, path: str) -> Stream:
    return Stream()


def _terminal(option: str, path: str) -> Stream:
    return Terminal()


def _pty(option: str, path: str) -> Stream:
    import tty

    ours, theirs = os.openpty()
    tty.setraw(theirs)
    log.warn(f"{option}: connect to {os.ttyname(theirs)}")
    return Stream(ours, ours, (ours, theirs))  # holding the far end keeps ours from hanging up


_OPENERS: dict[str, Callable[[str, str], Stream]] = {
    "off": _nothing,
    "null": _nothing,
    "tty": _terminal,
    "pty": _pty,
    "file": FileStream,
    "socket": ListeningStream,
}
