"""One connection to a backend as the frontend holds it: dialogue, notices, hang-up watch.

It owns everything that is made anew with each connection and closes it in one place.
It keeps no device state, so that a frontend can replace one link by another.
"""

from __future__ import annotations

import select

from . import rings
from .channel import Channel
from .client import Client
from .messages import ProtocolFeature
from .notices import ALL, Notices

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable, Mapping

    from ..loop import EventLoop
    from .notices import Handler
    from .trace import DeviceTrace


class Link:
    """`client` asks the backend; `notices`, once there, are what the backend asks."""

    def __init__(self, sock: socket, deadline: float, trace: DeviceTrace | None = None) -> None:
        self.client = Client(Channel(sock), deadline)
        self._trace = trace
        if trace is not None:
            self.client.observe = trace.exchange
        self.notices: Notices | None = None
        self.fault = ""
        # The connection is readable whenever a virtual CPU awaits a reply; only its end is of
        # interest to the event loop, so that is what a descriptor of its own reports.
        self._hangup = select.epoll()
        self._hangup.register(sock.fileno(), select.EPOLLRDHUP)

    def open(self, choose: Callable[[int], int], handlers: Mapping[str, Handler]) -> None:
        """Negotiate, and give the backend a way to ask when BACKEND_REQ is agreed on.

        Until the loop watches, who waits for an answer serves what the backend asks: it may want that first.
        """
        self.client.open(choose)
        if self.client.negotiation.has(ProtocolFeature.BACKEND_REQ):
            self.notices = Notices(self.client.negotiation, handlers)
            if self._trace is not None:
                self.notices.observe = self._trace.notice
            self.client.aside = self.notices
            self.notices.hand_over(self._send_backend_fd)

    def _send_backend_fd(self, fd: int) -> None:
        self.client.call("SET_BACKEND_REQ_FD", fds=(fd,))

    def watch(self, loop: EventLoop, on_hangup: Callable[[], None], on_notice: Callable[[], None]) -> None:
        """Report in the loop's thread that the connection ended, or that the backend asks."""
        loop.add_reader(self._hangup.fileno(), on_hangup)
        if self.notices is not None:
            loop.add_reader(self.notices.fileno(), on_notice)

    def unwatch(self, loop: EventLoop) -> None:
        """Undo `watch`; call it before `close`, in the loop's thread."""
        if not self._hangup.closed:
            loop.remove_reader(self._hangup.fileno())
        self.drop_notices(loop)

    def drop_notices(self, loop: EventLoop) -> None:
        """Listen to the backend's requests no more."""
        if self.notices is not None:
            loop.remove_reader(self.notices.fileno())
            self.notices.close()
            self.notices = None

    def stop(self) -> None:
        """Stop every ring; what the backend asked for by then is done as well, though the loop be busy."""
        rings.stop(self.client)
        notices = self.notices
        if notices is not None:
            notices.serve(ALL)

    def shutdown(self, fault: str = "") -> None:
        """End the connection, from any thread; descriptors stay until `close`.

        What the backend asks for is not done any more.  `fault` is kept as the reason: a thread that waits
        for a reply only sees the end.
        """
        self.fault = self.fault or fault
        self.client.channel.shutdown()
        notices = self.notices
        if notices is not None:
            notices.mute()

    def close(self) -> None:
        """Close every descriptor."""
        self._hangup.close()
        self.client.close()
        if self.notices is not None:
            self.notices.close()
