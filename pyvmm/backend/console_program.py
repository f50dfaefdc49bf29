"""The console backend as a program: `python -m pyvmm.backend.console`.

It owns the `--port` grammar and the terminal, whose size it passes on.  The device itself is
in `console`.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

from .. import config as cfg
from .. import options
from ..errors import ConfigError
from ..streams import FileStream, ListeningStream, Stream, open_stream
from .console import Console
from .endpoints import PortConfig
from .program import main

if TYPE_CHECKING:
    import argparse

    from .loop import DeviceLoop

OPTION = "--port"
KEYS = (
    options.Key("name", options.string, ""),
    options.Key("console", options.toggle, False),
    options.Key("to", lambda text: cfg.stream(OPTION, text), cfg.StreamConfig()),
    options.Key("fd", options.integer, -1),
)
HELP = (
    "one port of the guest's: name=NAME,console=on|off,to=off|null|tty|pty|file=PATH|socket=PATH, "
    "or fd=N for a connected stream socket; may be repeated; without any, a console on this terminal"
)
DEFAULT = "console=on,to=tty"


class TerminalConsole(Console):
    """A console whose streams were opened here, and which follows the terminal's size."""

    def __init__(self, texts: list[str]) -> None:
        self._streams: list[Stream] = []
        self._fds: set[int] = set()
        try:
            super().__init__([self._port(options.parse(OPTION, text, KEYS)) for text in texts])
        except BaseException:
            self._close_streams()
            raise
        self._on_terminal = [i for i, text in enumerate(texts) if "to=tty" in text and os.isatty(0)]

    def open(self, loop: DeviceLoop) -> None:
        super().open(loop)
        for stream in self._streams:
            if isinstance(stream, FileStream):  # but a terminal stays as it is: Ctrl-C ends the program
                stream.start()
        if self._on_terminal:
            signal.signal(signal.SIGWINCH, lambda *_: loop.call_soon_threadsafe(self._follow_size))
            self._follow_size()

    def close(self) -> None:
        super().close()
        self._close_streams()

    def _port(self, values: dict[str, Any]) -> PortConfig:
        """Open what one `--port` names.  The device closes its own copies of the descriptors."""
        fd = values["fd"]
        if fd >= 0:
            self._check(fd)
            return PortConfig(values["name"], values["console"], fd, fd)
        stream = open_stream(OPTION, values["to"])
        self._streams.append(stream)
        if isinstance(stream, ListeningStream):
            return PortConfig(values["name"], values["console"], listen_fd=os.dup(stream.listener.fileno()))
        if stream.input_fd == stream.output_fd >= 0:
            both = os.dup(stream.input_fd)
            return PortConfig(values["name"], values["console"], both, both)
        ends = (fd if fd < 0 else os.dup(fd) for fd in (stream.input_fd, stream.output_fd))
        return PortConfig(values["name"], values["console"], *ends)

    def _check(self, fd: int) -> None:
        try:
            os.fstat(fd)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"{OPTION}: fd={fd}: {getattr(error, 'strerror', error)}") from None
        if fd in self._fds:
            raise ConfigError(f"{OPTION}: fd={fd}: two ports cannot have the same one")
        self._fds.add(fd)

    def _follow_size(self) -> None:
        columns, rows = os.get_terminal_size(0)
        for number in self._on_terminal:
            self.resize(number, columns, rows)

    def _close_streams(self) -> None:
        while self._streams:
            self._streams.pop().close()


def make(arguments: argparse.Namespace) -> Console:
    """The device for the command line; ConfigError when a port is wrong."""
    texts = arguments.port or [DEFAULT]
    if sum("to=tty" in text for text in texts) > 1:
        raise ConfigError(f"{OPTION}: only one port can have the terminal; give the others to=pty")
    return TerminalConsole(texts)


def run(argv: list[str] | None = None) -> None:
    """The program."""
    main("console", make, [(OPTION, [], HELP)], argv)
