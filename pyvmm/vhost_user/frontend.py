"""The generic vhost-user frontend: makes one backend into a device for virtio.

It owns the device's negotiated state, the order of messages at start and stop, the lock
that serialises virtual CPUs, and what happens when the backend is lost.  What the device
is comes in as data (`kind`); it must not know about PCI, registers or interrupts.  The
order of messages is the one that QEMU, rust-vmm, libvhost-user, DPDK and SPDK agree on.
"""

from __future__ import annotations

from .. import log
from ..errors import BackendLost, ConfigError, ProtocolError, RemoteProtocolError
from ..lean import Lock
from .client import Refusal
from .config_space import BackendConfig, LocalConfig
from .endpoint import endpoint
from .link import Link
from .memory import MemoryTable
from .messages import F_PROTOCOL_FEATURES, ProtocolFeature
from .payloads import U64, VringAddr, VringFile, VringState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable, Sequence
    from typing import Protocol, TypeVar

    from ..loop import EventLoop
    from ..virtio.queue import QueueSetup
    from .codec import Message
    from .endpoint import Endpoint
    from .memory import GuestRam

    Result = TypeVar("Result")

    class Kind(Protocol):
        """What the frontend must know of a device kind; `pyvmm.virtio.kinds` has them."""

        @property
        def device_id(self) -> int: ...
        @property
        def name(self) -> str: ...
        @property
        def min_queues(self) -> int: ...
        @property
        def config_size(self) -> int: ...
        @property
        def write_policy(self) -> str: ...


def _bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


# Feature bits that may reach the guest: the device's own, and of the transport's those that need
# nothing from us: INDIRECT_DESC, EVENT_IDX, VERSION_1, IN_ORDER, ORDER_PLATFORM, NOTIFICATION_DATA.
# Not among them: LOG_ALL (26) and PROTOCOL_FEATURES (30), which are vhost's; ACCESS_PLATFORM (33),
# RING_PACKED (34) and RING_RESET (40), which want more of a frontend than there is.
GUEST_FEATURES = _bits(*range(24), 28, 29, 32, 35, 36, 38, *range(50, 64))
VERSION_1 = 1 << 32

BASIC = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK
WITH_CONFIG = ProtocolFeature.CONFIG | ProtocolFeature.BACKEND_REQ

MAX_QUEUES = 256  # the index of SET_VRING_KICK has 8 bits
MAX_QUEUE_SIZE = 32768


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
        self._kind = kind
        self._override = config
        self._loop = loop
        self._deadline = deadline
        self._lock = Lock()
        self._lost = ""
        self._retired: Link | None = None
        self._config_changed = False
        self._running: tuple[QueueSetup, ...] = ()
        self._check_queues(force)
        self._memory = MemoryTable(ram)
        self._link: Link | None = Link(self._endpoint.connect(connect_timeout), deadline)
        self._open(self._link)

    # -- opening -----------------------------------------------------------------------
    def _check_queues(self, force: bool) -> None:
        count, least = len(self.queue_sizes), self._kind.min_queues
        if not 1 <= count <= MAX_QUEUES:
            raise ConfigError(f"{self.name}: {count} queues; a device has 1 to {MAX_QUEUES}")
        if count < least and not force:
            raise ConfigError(
                f"{self.name}: {count} queues, but {self._kind.name} drivers need {least}; "
                f"give {least} queue sizes, or --force if you know the driver"
            )
        for size in self.queue_sizes:
            if not 1 <= size <= MAX_QUEUE_SIZE or size & (size - 1):
                raise ConfigError(
                    f"{self.name}: queue size {size}; it must be a power of two up to {MAX_QUEUE_SIZE}"
                )

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
        link.open(self._choose, {"CONFIG_CHANGE_MSG": self._note_config_change})
        offered = link.client.negotiation.virtio_offered or 0
        self.features = offered & GUEST_FEATURES
        if not offered & VERSION_1:
            log.warn(f"{self.name}: the backend lacks VIRTIO_F_VERSION_1, which drivers insist on")
        limit = link.client.queue_limit()
        if limit is not None and len(self.queue_sizes) > limit:
            raise ConfigError(
                f"{self.name}: {len(self.queue_sizes)} queues, but the backend has {limit}; "
                f"give at most {limit} queue sizes"
            )
        self._config = self._find_config(link)
        self.config_size = self._config.size

    def _choose(self, offered: int) -> int:
        """Ack what will be used, no more: a backend may rely on what is acked."""
        wanted = BASIC
        if self._override is None and self._kind.config_size:
            wanted |= WITH_CONFIG
        if not offered & wanted & ProtocolFeature.CONFIG:
            wanted &= ~ProtocolFeature.BACKEND_REQ  # all it could say is that CONFIG changed
        return offered & wanted

    def _find_config(self, link: Link) -> LocalConfig:
        size = self._kind.config_size
        if self._override is not None:
            return LocalConfig(self._override)
        if link.client.negotiation.has(ProtocolFeature.CONFIG):
            return BackendConfig(link.client, size, self._kind.write_policy)
        if size:
            log.warn(
                f"{self.name}: the backend has no configuration space, the guest reads zeros; see config="
            )
        return LocalConfig(bytes(size))

    # -- start and stop ----------------------------------------------------------------
    def activate(self, features: int, queues: Sequence[QueueSetup]) -> None:
        """Start the device with the driver's `features` and its enabled `queues`.

        Returns when the backend has carried out everything.  Raises ProtocolError; the backend is
        lost then.
        """
        self._with_link(lambda link: self._start(link, features, tuple(queues)))

    def reset(self) -> None:
        """Stop the rings.  The backend touches guest memory no more, or it is lost."""
        try:
            self._with_link(self._stop)
        except ProtocolError as error:
            log.debug(f"{self.name}: reset: {error}")

    def set_call(self, index: int, fd: int | None) -> None:
        """Send the interrupts of a running queue elsewhere.  Raises ProtocolError."""
        if any(queue.index == index for queue in self._running):
            self._with_link(lambda link: _send_fd(link, "SET_VRING_CALL", index, fd))

    def _start(self, link: Link, features: int, queues: tuple[QueueSetup, ...]) -> None:
        if self._running:
            self._stop(link)
        call = link.client.call
        protocol = (link.client.negotiation.virtio_offered or 0) & F_PROTOCOL_FEATURES
        # without bit 30 a backend enables all rings by itself and refuses SET_VRING_ENABLE
        call("SET_FEATURES", U64(features & self.features | protocol))
        call("SET_MEM_TABLE", self._memory.payload, self._memory.fds)
        for queue in queues:  # all sizes first: SPDK wants to know how many queues there are
            call("SET_VRING_NUM", VringState(queue.index, queue.size))
        self._running = queues
        for queue in queues:
            self._start_ring(link, queue)
        if protocol:
            for queue in queues:
                call("SET_VRING_ENABLE", VringState(queue.index, 1))
        link.client.barrier()

    def _start_ring(self, link: Link, queue: QueueSetup) -> None:
        address = self._memory.user_address
        parts = VringAddr(queue.index, 0, address(queue.desc), address(queue.used), address(queue.avail), 0)
        link.client.call("SET_VRING_BASE", VringState(queue.index, 0))
        link.client.call("SET_VRING_ADDR", parts)
        # GET_VRING_BASE made the backend forget both descriptors, so they are sent at each start;
        # the kick is last because it starts the ring
        _send_fd(link, "SET_VRING_CALL", queue.index, queue.call)
        _send_fd(link, "SET_VRING_KICK", queue.index, queue.kick)

    def _stop(self, link: Link) -> None:
        queues, self._running = self._running, ()
        if link.client.negotiation.virtio_acked & F_PROTOCOL_FEATURES:
            for queue in queues:
                link.client.call("SET_VRING_ENABLE", VringState(queue.index, 0))
        for queue in queues:
            base = link.client.ask("GET_VRING_BASE", VringState(queue.index, 0), VringState)
            if base.index != queue.index:
                raise RemoteProtocolError(
                    f"GET_VRING_BASE of ring {queue.index} was answered for ring {base.index}"
                )

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


def _send_fd(link: Link, name: str, index: int, fd: int | None) -> None:
    link.client.call(name, VringFile(index, fd is not None), () if fd is None else (fd,))


def _nothing(*_: object) -> None:
    """Nobody has asked to be told."""
