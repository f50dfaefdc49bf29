"""The generic vhost-user frontend: makes one backend into a device for virtio.

It owns the device's state, the lock that serialises virtual CPUs, and what happens when the
backend is lost.  What must be agreed upon is in `opening`, the order of messages in `rings`.  What
the device is comes in as data (`kind`); it must not know about PCI, registers or interrupts.
"""

from __future__ import annotations

from .. import log
from ..errors import BackendLost, ConfigError, ProtocolError
from ..lean import Lock
from . import rings
from .client import Refusal
from .endpoint import endpoint
from .link import Link
from .memory import MemoryTable
from .opening import Opening
from .rings import Wanted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    from ..loop import EventLoop
    from ..virtio.queue import QueueSetup
    from .codec import Message
    from .endpoint import Endpoint
    from .memory import GuestRam
    from .opening import Kind

    Result = TypeVar("Result")


class Frontend:
    """One backend, connected and negotiated; see `pyvmm.virtio.device.Backend` for the methods.

    `connect` is an Endpoint, a socket's path, an inherited descriptor, or a function that gets
    the seconds allowed and returns a connected socket.  `config` is a configuration space to use
    instead of the backend's.  `deadline` is in seconds and holds for each request.  Raises
    ConfigError when there is no backend, or one that does not fit; `force` lets a device have
    fewer queues than its drivers can do with.

    `on_config_change` and `on_lost` are called in the thread of `loop`, once `start_watching` was.
    """

    def __init__(
        self,
        connect: Endpoint | str | int | Callable[[float], socket],
        kind: Kind,
        queue_sizes: Sequence[int],
        config: bytes | None,
        ram: GuestRam,
        loop: EventLoop,
        deadline: float = 10.0,
        name: str = "",
        *,
        connect_timeout: float = 10.0,
        force: bool = False,
    ) -> None:
        self._endpoint = endpoint(connect)
        self.name = name or f"{kind.name} at {self._endpoint.name}"
        self.device_id = kind.device_id
        self.queue_sizes = tuple(queue_sizes)
        self.shared_memory: tuple[tuple[int, int], ...] = ()
        self.on_config_change: Callable[[], None] = _nothing
        self.on_lost: Callable[[str], None] = _nothing
        self._loop = loop
        self._deadline = deadline
        self._lock = Lock()
        self._lost = ""
        self._retired: Link | None = None
        self._config_changed = False
        self._running: tuple[QueueSetup, ...] = ()
        self._opening = Opening(self.name, kind, queue_sizes, config, force)
        self._memory = MemoryTable(ram)
        self._link: Link | None = Link(self._endpoint.connect(connect_timeout), deadline)
        self._open(self._link)

    # -- opening -----------------------------------------------------------------------
    def _open(self, link: Link) -> None:
        try:
            self._negotiate(link)
        except ProtocolError as error:
            link.close()
            known = self._endpoint.explain()
            raise ConfigError(
                f"{self.name}: no vhost-user dialogue with {self._endpoint.name}: "
                f"{error}{known or '; is a vhost-user backend there?'}"
            ) from None
        except BaseException:
            link.close()
            raise

    def _negotiate(self, link: Link) -> None:
        agreed = self._opening.open(link, {"CONFIG_CHANGE_MSG": self._note_config_change})
        self.features = agreed.features
        self._config = agreed.config
        self.config_size = agreed.config.size

    # -- start and stop ----------------------------------------------------------------
    def activate(self, features: int, queues: Sequence[QueueSetup]) -> None:
        """Start the device with the driver's `features` and its enabled `queues`.

        Returns when the backend has carried out everything.  Raises ProtocolError; the backend is
        lost then.
        """
        wanted = Wanted(features & self.features, tuple(queues))
        self._with_link(lambda link: self._start(link, wanted))

    def reset(self) -> None:
        """Stop the rings.  The backend touches guest memory no more, or it is lost."""
        try:
            self._with_link(self._stop)
        except ProtocolError as error:
            log.debug(f"{self.name}: reset: {error}")

    def set_call(self, index: int, fd: int | None) -> None:
        """Send the interrupts of a running queue elsewhere.  Raises ProtocolError."""
        if any(queue.index == index for queue in self._running):
            self._with_link(lambda link: rings.send_fd(link.client, "SET_VRING_CALL", index, fd))

    def _start(self, link: Link, wanted: Wanted) -> None:
        self._stop(link)
        self._running = wanted.queues
        rings.start(link.client, self._memory, wanted, [0] * len(wanted.queues))

    def _stop(self, link: Link) -> None:
        queues, self._running = self._running, ()
        rings.stop(link.client, queues)

    # -- configuration space -----------------------------------------------------------
    def read_config(self, offset: int, length: int) -> bytes:
        """`length` bytes; the last known ones when the backend does not give them."""
        try:
            return self._with_link(lambda link: self._config.read(link.client, offset, length))
        except ProtocolError:
            return self._config.last(offset, length)

    def write_config(self, offset: int, data: bytes) -> None:
        """Hand a driver's write on; one that the backend refuses changes nothing else."""
        try:
            self._with_link(lambda link: self._write_config(link, offset, data))
        except ProtocolError as error:
            log.debug(f"{self.name}: configuration write: {error}")

    def _write_config(self, link: Link, offset: int, data: bytes) -> None:
        try:
            self._config.write(link.client, offset, data)
        except Refusal as error:
            log.once((self.name, "config write"), f"{self.name}: write of {len(data)} at {offset}: {error}")

    # -- the event loop's side ---------------------------------------------------------
    def start_watching(self) -> None:
        """Notice from now on, in the loop's thread, when the backend ends or asks."""
        link = self._link
        if link is not None:
            link.watch(self._loop, self._hung_up, self._noticed)

    def _hung_up(self) -> None:
        # a thread that holds the lock sees the end of the connection too, and lets go
        with self._lock:
            if self._link is not None:
                self._lose(self._link, "the backend closed the connection")

    def _noticed(self) -> None:
        """Serve the backend's requests, without the lock: see `notices`."""
        link = self._link
        if link is None or link.notices is None:
            return
        try:
            link.notices.serve()
        except ProtocolError as error:
            link.shutdown(f"the backend's own request: {error}")
            self._hung_up()
            return
        if link.notices.ended:
            link.drop_notices(self._loop)
        if self._config_changed:
            self._config_changed = False
            self.on_config_change()

    def _note_config_change(self, message: Message) -> int:
        self._config_changed = True
        return 0

    # -- loss --------------------------------------------------------------------------
    def _with_link(self, action: Callable[[Link], Result]) -> Result:
        with self._lock:
            link = self._link
            if link is None:
                raise BackendLost(self._lost)
            try:
                return action(link)
            except ProtocolError as error:
                self._lose(link, str(error))
                raise

    def _lose(self, link: Link, reason: str) -> None:
        """Give the connection up; the lock is held.  The rest is done in the loop's thread."""
        self._link, self._retired = None, link
        self._lost = link.fault or reason
        self._running = ()
        link.shutdown()
        self._loop.call_soon_threadsafe(self._announce_loss)

    def _announce_loss(self) -> None:
        link, self._retired = self._retired, None
        if link is None:
            return
        link.unwatch(self._loop)
        link.close()
        self._lost += self._endpoint.explain()
        self.on_lost(self._lost)

    def interrupt(self) -> None:
        """Wake a thread that waits for the backend; the backend is lost then."""
        for link in (self._link, self._retired):
            if link is not None:
                link.shutdown("the machine ends")

    def close(self) -> None:
        """End the connection and close every descriptor; a waiting thread is woken first."""
        self.interrupt()
        with self._lock:
            links = (self._link, self._retired)
            self._link = self._retired = None
            self._lost = self._lost or "the device was closed"
        for link in links:
            if link is not None:
                link.unwatch(self._loop)
                link.close()


def _nothing(*_: object) -> None:
    """Nobody has asked to be told."""
