"""The in-flight buffer: what lets a new backend finish the requests of one that died.

The backend makes it and writes to it; the frontend only keeps the descriptor from one connection
to the next and hands it over before the rings start.  It is never mapped here, so that
nothing in it can harm us.  This module owns that descriptor and must not know the buffer's format.
"""

from __future__ import annotations

import os
import stat

from ..errors import RemoteProtocolError
from .messages import ProtocolFeature
from .opening import Unfit
from .payloads import Inflight

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .client import Client

MAX_SIZE = 1 << 30  # 256 queues of 32768 descriptors of 16 bytes are an eighth of it


class InflightBuffer:
    """Holds the buffer of one device of `queues` queues, the largest with `queue_size` descriptors."""

    def __init__(self, queues: int, queue_size: int) -> None:
        self._shape = queues, queue_size
        self._asked = Inflight(0, 0, queues, queue_size)
        self._payload = self._asked
        self._fd = -1

    @property
    def held(self) -> bool:
        """Whether requests in flight are tracked."""
        return self._fd >= 0

    def share(self, client: Client) -> None:
        """Give the backend the buffer, which it makes itself the first time.

        Raises Unfit when there is a buffer and the backend cannot take it.
        """
        if not client.negotiation.has(ProtocolFeature.INFLIGHT_SHMFD):
            if self.held:
                raise Unfit("it has no INFLIGHT_SHMFD, and requests of the one before may be in flight")
            return
        if not self.held:
            self._obtain(client)
        if self.held:
            client.call("SET_INFLIGHT_FD", self._payload, (self._fd,))

    def _obtain(self, client: Client) -> None:
        payload, fds = client.ask_with_fds("GET_INFLIGHT_FD", self._asked, Inflight)
        if not payload.mmap_size and not fds:
            return  # libvhost-user's way to say that it has no memory for one
        try:
            problem = _problem(payload, fds)
        except OSError as error:
            problem = f"is of no use: {error.strerror}"
        if problem:
            for fd in fds:
                os.close(fd)
            raise RemoteProtocolError(f"GET_INFLIGHT_FD: the buffer {problem}")
        self._payload, self._fd = payload, fds[0]

    def another(self) -> InflightBuffer:
        """One for the device's next life, while this one is still in use."""
        return InflightBuffer(*self._shape)

    def drop(self) -> None:
        """Forget the buffer: the driver has reset the device.  Harmless when there is none."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _problem(payload: Inflight, fds: list[int]) -> str:
    if not fds:
        return "has no descriptor"
    if not 0 < payload.mmap_size <= MAX_SIZE:
        return f"has {payload.mmap_size} bytes"
    facts = os.fstat(fds[0])
    if not stat.S_ISREG(facts.st_mode):
        return "is no file"
    if payload.mmap_offset + payload.mmap_size > facts.st_size:
        return f"ends at {payload.mmap_offset + payload.mmap_size}, beyond its file of {facts.st_size} bytes"
    return ""
