"""The device configuration space: the backend's, or one given to the frontend.

It owns the rules by which every known backend answers.  Reads ask for the whole space
from offset 0 and are cut here: libvhost-user and DPDK ignore the offset, some backends want
exactly the structure's size, and some hand out their heap to who asks for more.  Writes
follow the kind's policy.  The last bytes seen are kept, so that a read always has an
answer; they are no cache, since a space may change by being written (virtio-input).  It
must not know the layout of any device's configuration.
"""

from __future__ import annotations

from ..errors import RemoteProtocolError
from ..virtio.kinds import ABSORB, WHOLE
from .client import Refusal
from .messages import CONFIG_WRITABLE
from .payloads import Config

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .client import Client

SHRINK = 4  # step in which a smaller structure is tried; fields are at most this wide at the end


class LocalConfig:
    """A configuration space that only the frontend knows."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        # by the driver, the latest last, which a later backend has not seen: (offset, length) -> bytes
        self.written: dict[tuple[int, int], bytes] = {}
        self._given = data
        self._bytes = bytearray(data)

    def last(self, offset: int, length: int) -> bytes:
        """What is known of a range, zeros beyond the end."""
        return bytes(self._bytes[offset : offset + length]).ljust(length, b"\0")

    def read(self, client: Client, offset: int, length: int) -> bytes:
        """What the driver reads."""
        return self.last(offset, length)

    def keep(self, offset: int, data: bytes) -> None:
        """What the driver writes; bytes beyond the end are dropped."""
        data = data[: max(0, self.size - offset)]
        if data:
            self._bytes[offset : offset + len(data)] = data
            place = (offset, len(data))
            self.written.pop(place, None)  # what is written to the same bytes again moves to the end
            self.written[place] = data

    def forget(self) -> None:
        """The driver has reset the device: what it wrote is no more."""
        self.written.clear()
        self._bytes[:] = self._given

    def write(self, client: Client, offset: int, data: bytes) -> None:
        """Hand on what was kept."""

    def succeed(self, client: Client, before: LocalConfig) -> bool:
        """Be what `before` was, a space of the same size; whether the driver finds other bytes now."""
        for (offset, _), data in before.written.items():
            self.keep(offset, data)
            try:
                self.write(client, offset, data)
            except Refusal:
                continue  # as it was the first time, if it was
        return self._bytes != before._bytes


class BackendConfig(LocalConfig):
    """The backend's configuration space of at most `size` bytes."""

    def __init__(self, client: Client, size: int, policy: str) -> None:
        super().__init__(bytes(size))
        self._policy = policy
        self._find_size(client)

    def read(self, client: Client, offset: int, length: int) -> bytes:
        """Read through to the backend; raises Refusal when it does not, `last` is there for that case."""
        if not self._fetch(client):
            raise Refusal("the backend refused GET_CONFIG")
        return self.last(offset, length)

    def forget(self) -> None:
        """The rest is the backend's, which is asked at the next read."""
        self.written.clear()

    def write(self, client: Client, offset: int, data: bytes) -> None:
        """Write through by the policy; raises Refusal when the backend does not take it."""
        data = data[: max(0, self.size - offset)]
        if not data or self._policy == ABSORB:
            return
        if self._policy == WHOLE:
            offset, data = 0, bytes(self._bytes)
        client.call("SET_CONFIG", Config(offset, CONFIG_WRITABLE, data))

    def _find_size(self, client: Client) -> None:
        """Shrink until the backend answers: its structure may be older and shorter than ours."""
        while self.size and not self._fetch(client):
            self.size -= min(SHRINK, self.size)
        del self._bytes[self.size :]

    def _fetch(self, client: Client) -> bool:
        """Read the whole space; False when the backend reports an error."""
        reply = client.call("GET_CONFIG", Config(0, 0, bytes(self.size)))
        if not isinstance(reply, Config) or not reply.data:
            return False
        if (reply.offset, len(reply.data)) != (0, self.size):
            raise RemoteProtocolError(
                f"GET_CONFIG of {self.size} bytes was answered with {len(reply.data)} at {reply.offset}"
            )
        self._bytes[:] = reply.data
        if self._policy == ABSORB:
            for (offset, length), data in self.written.items():
                self._bytes[offset : offset + length] = data
        return True
