"""The serial port's two sides joined: the 16550 in the guest, a stream on the host.

It owns the way of the bytes between them and copies what the guest writes to listeners
(the crash and panic messages are found there).  The stream stays when the guest restarts; the UART
is a new one then.  It knows neither registers, which are the UART's, nor how streams are opened.
"""

from __future__ import annotations

import errno
import os
from time import monotonic

from .files import write_all
from .lean import Lock
from .legacy.uart import Uart
from .streams import ListeningStream, open_stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .config import StreamConfig
    from .loop import EventLoop

CHUNK = 4096  # of input
MOST_WAITING = 1 << 16  # bytes of input that the guest has not read; more stays with whoever sends it
PAUSE = 0.02  # seconds until that is looked at again
LAST_SECONDS = 0.5  # that a reader gets when the machine ends
READER_GONE = (
    errno.EPIPE, errno.EIO, errno.EBADF, errno.ENOSPC, errno.ECONNRESET, errno.ENOTCONN, errno.EAGAIN,
)  # fmt: skip


class SerialPort:
    """COM1, once it is attached; `option` is for messages.

    `listeners` are called with what the guest writes, on the thread of the virtual CPU.
    """

    SIZE = 8

    def __init__(self, option: str, config: StreamConfig, loop: EventLoop) -> None:
        self.listeners: list[Callable[[bytes], None]] = []
        self._writing = Lock()  # taken for as long as a descriptor is written to: its number is used again
        self._loop = loop
        self._stream = open_stream(option, config)
        self.attach(lambda _: None)
        if isinstance(self._stream, ListeningStream):
            loop.add_reader(self._stream.listener.fileno(), self._accept)
        self._watch()

    def attach(self, set_irq: Callable[[bool], None]) -> None:
        """The guest starts, or starts again: a UART as after a reset, whose line `set_irq(level)` drives.

        What the old one still holds is lost: input that no guest has read, and output without `flush`.
        """
        self.uart = Uart(self._output, set_irq)

    def start(self) -> None:
        """The guest runs from now on."""
        self._stream.start()

    def close(self) -> None:
        """Say what the guest said last, stop reading and close the stream."""
        self.uart.flush()
        self._unwatch()
        if isinstance(self._stream, ListeningStream):
            self._loop.remove_reader(self._stream.listener.fileno())
            self._stream.hang_up()
        with self._writing:
            self._stream.close()

    def _watch(self) -> None:
        if self._stream.input_fd >= 0:
            try:
                self._loop.add_reader(self._stream.input_fd, self._input)
            except PermissionError:
                return  # a regular file or /dev/null as terminal: there is no input to wait for

    def _unwatch(self) -> None:
        if self._stream.input_fd >= 0:
            self._loop.remove_reader(self._stream.input_fd)

    def _accept(self) -> None:
        self._unwatch()
        assert isinstance(self._stream, ListeningStream)
        self._stream.hang_up()
        with self._writing:
            try:
                self._stream.accept()
            except OSError:
                self._loop.pause(self._stream.listener.fileno(), ListeningStream.PATIENCE)
        self._watch()

    def _input(self) -> None:
        if self.uart.waiting >= MOST_WAITING:
            self._unwatch()
            self._loop.call_later(PAUSE, self._watch)
            return
        try:
            data = os.read(self._stream.input_fd, CHUNK)
        except OSError:
            data = b""
        if data:
            self.uart.feed(data)
        else:
            self._unwatch()
            if isinstance(self._stream, ListeningStream):
                self._stream.hang_up()
                with self._writing:
                    self._stream.drop()

    def _output(self, data: bytes) -> None:
        for listener in self.listeners:
            listener(data)
        with self._writing:
            if self._stream.output_fd >= 0:
                self._write(self._stream.output_fd, data)

    def _write(self, fd: int, data: bytes) -> None:
        """Write `data` at the reader's pace; when the machine ends, a reader that is too slow loses bytes."""
        due = 0.0

        def go_on() -> bool:
            nonlocal due
            if self._loop.stopped:
                due = due or monotonic() + LAST_SECONDS
            return not due or monotonic() < due

        try:
            write_all(fd, data, go_on)
        except OSError as error:
            if error.errno not in READER_GONE:
                raise
