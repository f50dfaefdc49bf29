"""Serving a device from asyncio: its loop runs inside the program's.

It owns nothing but the connection of the two loops.  A device may start tasks from its
methods, which are called in asyncio's thread; a task pushes the chains that it kept
and calls `Queue.notify`.
"""

from __future__ import annotations

import asyncio

from .loop import DeviceLoop
from .server import Server, socket_at

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..loop import Callback, Timer
    from .device import Device
    from .server import Where


async def serve_async(device: Device, where: Where) -> None:
    """As `serve`, until the task is cancelled or, on a connected socket, the connection ends."""
    with _InnerLoop() as loop:
        sock, remove = socket_at(where)
        try:
            server = Server(device, sock, loop)
            try:
                await _Bridge(loop).done
            finally:
                server.close()
        finally:
            sock.close()
            remove()


class _InnerLoop(DeviceLoop):
    """A loop that has a turn after each new timer: set by a task, it may be due before anything else."""

    def call_later(self, seconds: float, callback: Callback) -> Timer:
        timer = super().call_later(seconds, callback)
        self._wake()
        return timer


class _Bridge:
    """Turns `loop` whenever it has something to do; `done` ends with it, or with its exception."""

    def __init__(self, loop: DeviceLoop) -> None:
        self._loop = loop
        self._outer = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self.done = self._outer.create_future()
        self.done.add_done_callback(self._end)
        self._outer.add_reader(loop.fileno(), self._turn)

    def _turn(self) -> None:
        if self.done.done():
            return
        try:
            wait = self._loop.turn()
        except BaseException as error:
            self.done.set_exception(error)
            return
        if self._loop.stopped:
            self.done.set_result(None)
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if wait is None else self._outer.call_later(wait, self._turn)

    def _end(self, _: asyncio.Future[None]) -> None:
        self._outer.remove_reader(self._loop.fileno())
        if self._timer is not None:
            self._timer.cancel()
