"""What a device needs of a backend, agreed upon when a connection opens and at each one after it.

It owns the choice of features, the number of queues and where the configuration space comes
from; what does not fit is refused here in words for the user.  It keeps nothing of a
connection, and must not know how the device is started or what a driver has done.
"""

from __future__ import annotations

from .. import log
from ..errors import ConfigError, ProtocolError
from ..record import Record
from ..virtio import spec
from .config_space import BackendConfig, LocalConfig
from .messages import BASELINE_REGIONS, ProtocolFeature

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Protocol

    from .client import Client
    from .endpoint import Endpoint
    from .link import Link
    from .notices import Handler

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
        def backend_limit(self, reported: int, /) -> int: ...
        def impossible_features(self, count: int, /) -> int: ...


def _bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


# Feature bits that may reach the guest: the device's own, and of the transport's those that need
# nothing from us: INDIRECT_DESC, EVENT_IDX, VERSION_1, IN_ORDER, ORDER_PLATFORM, NOTIFICATION_DATA.
# Not among them: LOG_ALL (26) and PROTOCOL_FEATURES (30), which are vhost's; ACCESS_PLATFORM (33) and
# RING_RESET (40), which want more of a frontend than there is; RING_PACKED (34): see `Opening`.
GUEST_FEATURES = _bits(*range(24), 28, 29, 32, 35, 36, 38, *range(50, 64))
VERSION_1 = 1 << 32

BASIC = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
WITH_CONFIG = ProtocolFeature.CONFIG | ProtocolFeature.BACKEND_REQ
# SHMEM is bit 22.  Drafts had it at 20, and vhost 0.16.0 at 21: those bits mean other things by now.
WITH_MEMORY = ProtocolFeature.SHMEM | ProtocolFeature.BACKEND_REQ

MAX_QUEUES = 256  # the index of SET_VRING_KICK has 8 bits
MAX_QUEUE_SIZE = 32768


class Unfit(ConfigError):
    """The backend speaks the protocol and cannot be this device."""


class Agreed(Record):
    """What came out: feature bits for the guest, configuration space, shared memory as (shmid, size)."""

    features: int
    config: LocalConfig
    shared_memory: tuple[tuple[int, int], ...] = ()


class Opening:
    """What one device needs; `open` asks a backend for it.

    `config` is a configuration space to use instead of the backend's, `pieces` is how many guest RAM
    has.  Raises ConfigError for queues that no device of this kind can have; `force` allows fewer
    than its drivers can do with.  `packed` allows packed rings: memory does not tell where a lost
    backend stopped in those, so they are not for devices that are to go on with another.
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        queue_sizes: Sequence[int],
        config: bytes | None,
        force: bool,
        pieces: int,
        packed: bool,
    ) -> None:
        self.name = name
        self._kind = kind
        self._queues = len(queue_sizes)
        self._override = config
        self._pieces = pieces
        self._allowed = GUEST_FEATURES | (spec.F_RING_PACKED if packed else 0)
        self._warned = False
        self.greet: Callable[[Client], object] = lambda _: None  # what else a new backend is told
        self._check_queues(queue_sizes, force)

    def _check_queues(self, sizes: Sequence[int], force: bool) -> None:
        count, least = len(sizes), self._kind.min_queues
        if not 1 <= count <= MAX_QUEUES:
            raise ConfigError(f"{self.name}: {count} queues; a device has 1 to {MAX_QUEUES}")
        if count < least and not force:
            raise ConfigError(
                f"{self.name}: {count} queues, but {self._kind.name} drivers need {least}; "
                f"give {least} queue sizes, or --force if you know the driver"
            )
        for size in sizes:
            if not 1 <= size <= MAX_QUEUE_SIZE or size & (size - 1):
                raise ConfigError(
                    f"{self.name}: queue size {size}; it must be a power of two up to {MAX_QUEUE_SIZE}"
                )

    def first(self, link: Link, handlers: Mapping[str, Handler], endpoint: Endpoint) -> Agreed:
        """`open` for the connection with which the device begins: a ConfigError is all that it raises."""
        try:
            agreed = self.open(link, handlers)
        except ProtocolError as error:
            link.close()
            known = endpoint.explain()
            raise ConfigError(
                f"{self.name}: no vhost-user dialogue with {endpoint.name}: "
                f"{error}{known or '; is a vhost-user backend there?'}"
            ) from None
        except BaseException:
            link.close()
            raise
        link.client.aside = None
        return agreed

    def open(self, link: Link, handlers: Mapping[str, Handler]) -> Agreed:
        """Negotiate.  Raises ProtocolError, and Unfit for a backend that does not fit."""
        link.open(self._choose, handlers)
        offered = link.client.negotiation.virtio_offered or 0
        self._check_limit(link.client.queue_limit())
        self._check_slots(link.client.slot_limit())
        features = offered & self._allowed & ~self._kind.impossible_features(self._queues)
        agreed = Agreed(features, self._find_config(link), self._find_memory(link))
        self.greet(link.client)
        if not self._warned:
            self._warned = True
            self._warn(offered, agreed.config)
        return agreed

    def _check_limit(self, reported: int | None) -> None:
        limit = MAX_QUEUES if reported is None else self._kind.backend_limit(reported)
        if self._queues > limit:
            raise Unfit(
                f"{self.name}: {self._queues} queues, but the backend has {limit}; "
                f"give at most {limit} queue sizes"
            )

    def _check_slots(self, reported: int | None) -> None:
        limit = BASELINE_REGIONS if reported is None else reported
        if self._pieces > limit:
            raise Unfit(
                f"{self.name}: guest RAM has {self._pieces} pieces, and the backend takes {limit} "
                "(GET_MAX_MEM_SLOTS); up to 3G are one piece"
            )

    def _warn(self, offered: int, config: LocalConfig) -> None:
        if not offered & VERSION_1:
            log.warn(f"{self.name}: the backend lacks VIRTIO_F_VERSION_1, which drivers insist on")
        if self._override is None and config.size and not isinstance(config, BackendConfig):
            log.warn(
                f"{self.name}: the backend has no configuration space, the guest reads zeros; see config="
            )
        if isinstance(config, BackendConfig) and not config.size:
            log.warn(f"{self.name}: the backend refuses to read its configuration space; see config=")

    def check(self, agreed: Agreed, before: Agreed) -> None:
        """Raise Unfit for a backend that cannot go on where the one before stopped.

        `before` is what the driver knows: the features it accepted, configuration space, shared memory.
        """
        lacking = before.features & ~agreed.features
        if lacking:
            raise Unfit(f"it does not offer the feature bits {lacking:#x}, which the driver uses")
        size, kind = agreed.config.size, type(agreed.config)
        if size != before.config.size or kind is not type(before.config):
            raise Unfit(
                f"its configuration space has {size if kind is BackendConfig else 'no'} bytes, "
                f"that of the one before {before.config.size}"
            )
        if agreed.shared_memory != before.shared_memory:
            raise Unfit("its shared memory regions are not those of the one before")

    def _choose(self, offered: int) -> int:
        """Ack what will be used, no more: a backend may rely on what is acked."""
        wanted = BASIC
        if self._override is None and self._kind.config_size and offered & ProtocolFeature.CONFIG:
            wanted |= WITH_CONFIG
        if offered & WITH_MEMORY == WITH_MEMORY:
            wanted |= WITH_MEMORY | ProtocolFeature.BACKEND_SEND_FD
        return offered & wanted

    def _find_memory(self, link: Link) -> tuple[tuple[int, int], ...]:
        if not link.client.negotiation.has(ProtocolFeature.SHMEM):
            return ()
        from .shared_memory import ask  # few devices have any

        return ask(link.client, self.name)

    def _find_config(self, link: Link) -> LocalConfig:
        size = self._kind.config_size
        if self._override is not None:
            return LocalConfig(self._override)
        if link.client.negotiation.has(ProtocolFeature.CONFIG):
            return BackendConfig(link.client, size, self._kind.write_policy)
        return LocalConfig(bytes(size))
