"""Serving a device in a thread of this process, for tests and tools that are their own frontend.

It owns the thread and its loop.  It must not know devices.
"""

from __future__ import annotations

from _socket import socketpair
from threading import Thread

from .loop import DeviceLoop
from .server import serve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from types import TracebackType
    from typing import Self

    from .device import Device


class DeviceThread:
    """`device`, being served on one end of a socketpair; `socket` is the frontend's end.

    `close` ends the serving and raises what the device raised, if it did.  `call` runs something in
    the serving thread, where alone the device may be touched.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.socket, theirs = socketpair()
        self._loop = DeviceLoop()
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, args=(theirs,), name="device", daemon=True)
        self._thread.start()
        self.call = self._loop.call_soon_threadsafe

    def take_socket(self) -> Socket:
        """The frontend's end, which its new owner closes."""
        return self.socket

    def close(self) -> None:
        """End the serving; the frontend's end is closed, too."""
        self._loop.stop()
        self._thread.join()
        self._loop.close()
        self.socket.close()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, sock: Socket) -> None:
        try:
            serve(self.device, sock, loop=self._loop)
        except BaseException as error:
            self._error = error
