"""One try to go on with another backend: what it has been told, and what the driver wants by now.

It owns the connection until the frontend takes it over.  The dialogue is in a thread of its own and
without the frontend's lock, so nobody waits for a backend that may be slow, or none.  Meanwhile
the driver may write, move interrupts or reset the device.  What it wants is noted with the
lock (`aim`) and told without it (`follow`), until there is nothing new.
"""

from __future__ import annotations

from . import rings
from .config_space import LocalConfig
from .progress import used_index

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .inflight import InflightBuffer
    from .link import Link
    from .memory import MemoryTable
    from .opening import Agreed
    from .rings import Wanted


class Attempt:
    """A backend at the other end of `link` that may become the device's.

    `agreed` is what came out of the opening, `changed` says whether the driver finds another
    configuration.  `abandoned` means that the driver has reset the device: the rings that the backend was
    told of are no more, and the in-flight buffer is left to us.
    """

    agreed: Agreed
    _before: LocalConfig

    def __init__(self, link: Link, inflight: InflightBuffer) -> None:
        self.link = link
        self.changed = self.abandoned = False
        self._inflight = inflight
        self._wanted: Wanted | None = None
        self._told: Wanted | None = None
        self._bases: list[int] = []
        self._writes = -1

    @property
    def started(self) -> bool:
        """Whether the backend has been told of rings and memory, or will be next."""
        return self._wanted is not None

    def aim(self, memory: MemoryTable, wanted: Wanted | None, config: LocalConfig, writes: int) -> bool:
        """Note what the driver wants, and what it wrote to `config` so far; whether that is news."""
        if (wanted, writes) == (self._wanted, self._writes):
            return False
        if wanted is not None and self._wanted is None:
            self._bases = [used_index(memory, queue) for queue in wanted.queues]
        self._wanted, self._writes = wanted, writes
        self._before = LocalConfig(config.last(0, config.size))
        self._before.written = config.written.copy()
        return True

    def follow(self, memory: MemoryTable) -> None:
        """Tell the backend; raises ProtocolError or Unfit."""
        client, wanted, told = self.link.client, self._wanted, self._told
        if wanted is not None and told is None:
            rings.start(client, memory, wanted, self._bases, self._inflight)
        elif wanted is not None and told is not None:
            for queue in (queue for queue in wanted.queues if queue not in told.queues):
                rings.send_fd(client, "SET_VRING_CALL", queue.index, queue.call)
        self._told = wanted
        self.changed = self.agreed.config.succeed(client, self._before) or self.changed

    def hand_over(self, before: LocalConfig) -> Link:
        """The connection, which the loop watches from now on; both ends look at their rings.

        What the driver wrote `before` counts from now on: a reset may have made it forgotten.
        """
        self.link.client.aside = None
        self.agreed.config.written = before.written
        if self._wanted is not None:
            rings.wake(self._wanted.queues)
        return self.link

    def abandon(self) -> None:
        """The driver has reset the device, with the frontend's lock; whoever waits for an answer gives up."""
        self.abandoned = True
        self.link.shutdown("the driver reset the device")

    def close(self) -> None:
        """Give up the connection, once the frontend has forgotten the attempt."""
        self.link.close()
        if self.abandoned:
            self._inflight.drop()
