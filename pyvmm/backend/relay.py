"""The backend's own requests, passed to the frontend by a proxy.

It owns a thread, since each may come while the proxy waits for an answer of the backend's, and be what
that waits for.  It must not know what the requests mean.
"""

from __future__ import annotations

import os
import select
from threading import Thread

from .. import log
from ..errors import LocalProtocolError, RemoteProtocolError
from ..vhost_user.channel import pair
from ..vhost_user.messages import BACKEND_REQUESTS
from ..vhost_user.session import Responder
from .connection import SECONDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..vhost_user.codec import Message
    from ..vhost_user.recording import Recorder
    from ..vhost_user.session import Negotiation
    from .connection import Connection


class Relay:
    """Passes what comes on its socket to the frontend of `connection`; `theirs` is the backend's end."""

    def __init__(self, connection: Connection, negotiation: Negotiation, recorder: Recorder | None) -> None:
        self._connection = connection
        self._recorder = recorder
        self._channel, self.theirs = pair()
        self._responder = Responder(BACKEND_REQUESTS, negotiation, os.close)
        self._thread = Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and both ends."""
        self._channel.shutdown()
        self.theirs.close()
        self._thread.join(SECONDS)
        self._channel.close()

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._channel.fileno(), select.POLLIN)
        try:
            while True:
                poller.poll()
                message = self._channel.receive_now(self._responder.decoder)
                if message is not None:
                    self._pass(message)
        except (RemoteProtocolError, LocalProtocolError, OSError, ValueError) as error:
            log.debug(f"proxy: no more requests of the backend: {error}")
        self._responder.decoder.close()
        self._channel.shutdown()  # the backend may wait for an ack

    def _pass(self, message: Message) -> None:
        try:
            self._responder.received(message)
            if self._recorder is not None:
                self._recorder.notice(message)
            status = 0
            if message.request.name == "CONFIG_CHANGE_MSG":
                self._connection.send_config_change()
            else:
                status = self._connection.ask(message.request.name, message.payload, message.fds)
            self._channel.send(self._responder.ack(status))
        finally:
            message.close()
