"""The host's side of a console port: descriptors that bytes come from and go to.

An `Endpoint` reads into and writes from guest memory without ever blocking and without
changing the flags of descriptors that others may share.  It owns its descriptors.  It must
not know virtqueues or ports (`port`, `console`).
"""

from __future__ import annotations

import os
import select
import stat
from _socket import MSG_DONTWAIT, MSG_NOSIGNAL, socket

from .. import log
from ..record import Record
from .loop import Watch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .loop import DeviceLoop

PIECE = select.PIPE_BUF  # what a descriptor that polls writable takes without blocking


class PortConfig(Record):
    """One port: its name in the guest, and descriptors of the host (-1: none).

    A `console` port becomes a terminal (hvc) in the guest, others a /dev/vport.  Bytes
    come from `input_fd` and go to `output_fd`, which may be the same socket or terminal;
    or from and to one client at a time of the listening stream socket `listen_fd`.
    Without any, input never comes and output vanishes.
    """

    name: str = ""
    console: bool = False
    input_fd: int = -1
    output_fd: int = -1
    listen_fd: int = -1

    @property
    def fds(self) -> tuple[int, ...]:
        """All descriptors that the port uses."""
        return tuple(fd for fd in (self.input_fd, self.output_fd, self.listen_fd) if fd >= 0)


class Endpoint:
    """What carries a port's bytes now.

    `read` and `write` give None when they would block.  0 from `read` is the end of the
    input.  `lost` is set once the other side is gone: nothing can be read or written then.
    """

    lost = False
    input_fd = -1
    output_fd = -1

    def read(self, views: Sequence[memoryview]) -> int | None:
        return 0

    def write(self, views: Sequence[memoryview | bytes | bytearray]) -> int | None:
        return sum(len(view) for view in views)

    def watch_loss(self, loop: DeviceLoop, callback: Callable[[], None]) -> None:
        """Call back when the other side hangs up, even while nobody reads."""

    def close(self) -> None:
        """Release the descriptors."""


class Files(Endpoint):
    """An input and an output descriptor of any kind but sockets; either may be -1."""

    def __init__(self, input_fd: int, output_fd: int) -> None:
        self.input_fd, self.output_fd = input_fd, output_fd
        self._owned = {fd for fd in (input_fd, output_fd) if fd >= 0}
        self._poll = select.poll()
        if output_fd >= 0:
            self._poll.register(output_fd, select.POLLOUT)
        # writes to files neither block nor poll; all others are written in pieces
        self._whole = output_fd >= 0 and stat.S_ISREG(os.fstat(output_fd).st_mode)
        self._gone = output_fd < 0

    def read(self, views: Sequence[memoryview]) -> int | None:
        try:
            return os.readv(self.input_fd, views)
        except BlockingIOError:
            return None
        except OSError:
            return 0  # a terminal that hung up

    def write(self, views: Sequence[memoryview | bytes | bytearray]) -> int | None:
        if self._gone:
            return super().write(views)
        try:
            if self._whole:
                return os.writev(self.output_fd, views)
            return os.write(self.output_fd, views[0][:PIECE]) if self._poll.poll(0) else None
        except BlockingIOError:
            return None
        except OSError as error:
            log.once(("output", self.output_fd), f"console output is lost from here on: {error.strerror}")
            self._gone = True  # input goes on
            return super().write(views)

    def close(self) -> None:
        while self._owned:
            os.close(self._owned.pop())
        self.input_fd = self.output_fd = -1


class Stream(Endpoint):
    """A connected stream socket."""

    def __init__(self, sock: socket) -> None:
        self._sock = sock
        self.input_fd = self.output_fd = sock.fileno()
        self._watch: Watch | None = None

    def read(self, views: Sequence[memoryview]) -> int | None:
        try:
            count = self._sock.recvmsg_into(views, 0, MSG_DONTWAIT)[0]
        except BlockingIOError:
            return None
        except OSError:
            count = 0
        if not count:
            self.lost = hung_up(self._sock.fileno())
        return count

    def write(self, views: Sequence[memoryview | bytes | bytearray]) -> int | None:
        try:
            return self._sock.sendmsg(views, [], MSG_DONTWAIT | MSG_NOSIGNAL)
        except BlockingIOError:
            return None
        except OSError:
            self.lost = True
            return super().write(views)

    def watch_loss(self, loop: DeviceLoop, callback: Callable[[], None]) -> None:
        def hang_up() -> None:
            self.lost = True
            callback()

        if self._watch is None:
            self._watch = Watch(loop, self._sock.fileno(), 0, hang_up)

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._sock.close()
        self.input_fd = self.output_fd = -1


def hung_up(fd: int) -> bool:
    """Whether a socket is closed both ways, rather than only done with sending."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


def endpoint_of(config: PortConfig) -> Endpoint:
    """The endpoint that a port starts with; it owns the descriptors."""
    fd = config.input_fd
    if fd >= 0 and fd == config.output_fd and stat.S_ISSOCK(os.fstat(fd).st_mode):
        return Stream(socket(fileno=fd))
    return Files(config.input_fd, config.output_fd)
