"""Where a console's bytes go on the host: nothing, the terminal, a pty, a file, a socket.

It owns the host's descriptors and the terminal's mode, which is put back whatever
happens.  It does not know which device uses the stream.
"""

from __future__ import annotations

import os
import socket
import stat

from . import log
from .errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .config import StreamConfig


class Stream:
    """An input and an output descriptor (-1: none) and what must be undone at the end."""

    def __init__(self, input_fd: int = -1, output_fd: int = -1, owned: tuple[int, ...] = ()) -> None:
        self.input_fd = input_fd
        self.output_fd = output_fd
        self._owned = owned

    def close(self) -> None:
        """Close what was opened here; harmless when repeated."""
        for fd in self._owned:
            os.close(fd)
        self._owned = ()
        self.input_fd = self.output_fd = -1


class Terminal(Stream):
    """Standard input and output, the terminal in raw mode until `close`."""

    def __init__(self) -> None:
        super().__init__(0, 1)
        self._saved: list[object] | None = None
        if os.isatty(0):
            import termios
            import tty

            self._saved = termios.tcgetattr(0)
            tty.setraw(0, termios.TCSANOW)

    def close(self) -> None:
        """Put the terminal back as it was found."""
        super().close()
        if self._saved is not None:
            import termios

            termios.tcsetattr(0, termios.TCSADRAIN, self._saved)  # type: ignore[arg-type]
            self._saved = None


class ListeningStream(Stream):
    """A unix socket that one peer at a time may connect to; see `accept`."""

    def __init__(self, option: str, path: str) -> None:
        super().__init__()
        self._path = path
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            _unlink_stale(path)
            self.listener.bind(path)
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
        fd = peer.detach()
        self.input_fd = self.output_fd = fd
        self._owned = (fd,)

    def drop(self) -> None:
        """Forget the peer."""
        super().close()

    def close(self) -> None:
        """Close everything and remove the socket."""
        self.drop()
        if self.listener.fileno() >= 0:
            self.listener.close()
            _unlink_stale(self._path)


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


def _file(option: str, path: str) -> Stream:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"{option}: {path}: {error.strerror}; a writable file is needed") from error
    return Stream(-1, fd, (fd,))


def _socket(option: str, path: str) -> Stream:
    return ListeningStream(option, path)


def _unlink_stale(path: str) -> None:
    """Remove a socket left over from before; anything else at `path` stays."""
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    except FileNotFoundError:
        return


_OPENERS = {
    "off": _nothing,
    "null": _nothing,
    "tty": _terminal,
    "pty": _pty,
    "file": _file,
    "socket": _socket,
}
