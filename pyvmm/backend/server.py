"""Serving a device: where its connections come from, one after another.

It owns the listening socket, the loop of a blocking `serve`, and the wait for the next
frontend after one has gone.  It must not know messages or devices' insides.
"""

from __future__ import annotations

from _socket import AF_UNIX, SO_ACCEPTCONN, SOCK_STREAM, SOL_SOCKET, socket

from .. import log
from ..errors import ConfigError
from ..files import SocketFile
from .connection import Connection
from .inflight import MAX_QUEUES, MAX_SIZE
from .loop import DeviceLoop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .device import Device

    Where = str | int | socket


class Server:
    """Serves `device` to one frontend at a time within a loop that somebody runs.

    A connected socket serves once and then stops the loop; a listening one goes on until the
    loop is stopped.  The server closes the socket.
    """

    def __init__(self, device: Device, sock: socket, loop: DeviceLoop) -> None:
        self._device = device
        self._loop = loop
        self._connection: Connection | None = None
        self._listener = sock if is_listening(sock) else None
        check(device)
        device.open(loop)
        if self._listener is None:
            self._connect(sock)
        else:
            loop.add_reader(sock.fileno(), self._on_client)

    def close(self) -> None:
        """End the connection, then the device, and close what was listened on."""
        try:
            if self._connection is not None:
                self._connection.close()
        finally:
            if self._listener is not None:
                self._loop.remove_reader(self._listener.fileno())
                self._listener.close()
            self._device.close()

    def _connect(self, sock: socket) -> None:
        make = self._device.connection_class or Connection
        self._connection = make(self._device, sock, self._loop, self._on_end)

    def _on_client(self) -> None:
        assert self._listener is not None
        try:
            client = accept(self._listener)
        except OSError:
            return  # it went away before we looked
        self._loop.remove_reader(self._listener.fileno())
        self._connect(client)

    def _on_end(self, reason: str) -> None:
        if reason:
            log.warn(f"{type(self._device).__name__.lower()} backend: connection ended: {reason}")
        self._connection = None
        if self._listener is None:
            self._loop.stop()
        else:
            self._loop.add_reader(self._listener.fileno(), self._on_client)


def serve(device: Device, where: Where, *, loop: DeviceLoop | None = None) -> None:
    """Serve `device` until the loop is stopped, or, on a connected socket, until it closes.

    `where` is the path of a socket to listen on (one left over there is replaced, and it is
    removed in the end), or a socket or descriptor, listening or connected, which is closed in the end.

    ConfigError when the device cannot be served as it is, OSError when there cannot be such a socket.
    """
    sock, remove = socket_at(where)
    own = loop or DeviceLoop()
    try:
        server = Server(device, sock, own)
        try:
            own.run()
        finally:
            server.close()
    finally:
        sock.close()
        remove()
        if loop is None:
            own.close()


def check(device: Device) -> None:
    """ConfigError when no driver could use such virtqueues, or no message name them (virtio 1.3, 2.7)."""
    sizes = device.queue_sizes
    if not 0 < len(sizes) <= MAX_QUEUES or not all(0 < size <= MAX_SIZE for size in sizes):
        raise ConfigError(
            f"queue_sizes {sizes}: from 1 to {MAX_QUEUES} virtqueues of 1 to {MAX_SIZE} entries are needed"
        )


def socket_at(where: Where) -> tuple[socket, Callable[[], None]]:
    """The socket that `where` means, and what removes its file if it was made here.

    OSError when there is none or none can be made, as where another server listens.
    """
    if isinstance(where, socket):
        return where, _nothing
    if isinstance(where, int):
        return socket(fileno=where), _nothing
    file, sock = SocketFile(where), socket(AF_UNIX, SOCK_STREAM)
    try:
        file.bind(sock)
        sock.listen(1)
    except BaseException:
        file.remove()
        sock.close()
        raise
    return sock, file.remove


def _nothing() -> None:
    """There is no file to be removed."""


def accept(listener: socket) -> socket:
    """The next client; OSError when there is none.  What `socket.socket.accept` does."""
    fd, _ = listener._accept()  # type: ignore[attr-defined]
    return socket(fileno=fd)


def is_listening(sock: socket) -> bool:
    """Whether connections can be accepted from the socket."""
    return bool(sock.getsockopt(SOL_SOCKET, SO_ACCEPTCONN))
