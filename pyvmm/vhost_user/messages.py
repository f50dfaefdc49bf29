"""The vhost-user vocabulary: feature bits and one row per request, for both directions.

It owns who may say what, with which payload, descriptors and answer, and what must have
been negotiated before; encoder, decoder, session, both roles and the tests read the same
rows.  It must not know sockets, what descriptors are for, or devices.  Numbers and names
follow QEMU's docs/interop/vhost-user.rst.
"""

from __future__ import annotations

from struct import Struct

from ..record import Record
from .payloads import (
    MAX_REGIONS,
    U64,
    Config,
    DeviceState,
    Empty,
    Inflight,
    Iotlb,
    Log,
    MemTable,
    Mmap,
    Payload,
    Raw,
    SharedObject,
    ShmemConfig,
    SingleRegion,
    VringAddr,
    VringArea,
    VringFile,
    VringState,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

VERSION = 1
FLAG_REPLY = 1 << 2
FLAG_NEED_REPLY = 1 << 3
HEADER = Struct("=III")  # request, flags, payload size
MAX_FDS = 32  # the most that any frontend sends at once (rust-vmm's limit)
BASELINE_REGIONS = 8  # what every backend accepts in SET_MEM_TABLE

# virtio feature bits that belong to vhost, not to the guest
F_LOG_ALL = 1 << 26
F_PROTOCOL_FEATURES = 1 << 30
F_IOMMU_PLATFORM = 1 << 33

CONFIG_WRITABLE = 0  # SET_CONFIG flags: the driver writes (QEMU, libvhost-user: 0)
CONFIG_MIGRATION = 1


class ProtocolFeature:
    """VHOST_USER_PROTOCOL_F_*, as masks."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    NET_MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM = 1 << 22


P = ProtocolFeature
PROTOCOL_FEATURES: dict[str, int] = {name: mask for name, mask in vars(P).items() if name.isupper()}


def bit_names(features: int, masks: Mapping[str, int]) -> list[str]:
    """The names of the bits set in `features`, lowest first; those without one as numbers."""
    names = {mask: name for name, mask in masks.items()}
    return [names.get(1 << bit, f"bit {bit}") for bit in range(64) if features >> bit & 1]


def protocol_feature_names(features: int) -> str:
    """The names of the bits set in `features`, for messages."""
    return "|".join(bit_names(features, PROTOCOL_FEATURES)) or "none"


class Request(Record):
    """One kind of request and everything that both ends must know about it.

    `reply` lists the payloads that an own reply may have; empty means that there is only
    an ack, and only when the request asked for one (REPLY_ACK, a U64 where 0 is success).
    `fds` and `reply_fds` are the smallest and the largest number of descriptors.
    `needs` are protocol features that must all be acked; `offered` and `acked` are virtio
    feature bits that GET_FEATURES must have shown and SET_FEATURES must have acked.
    """

    id: int
    name: str
    payload: type[Payload] = Empty
    reply: tuple[type[Payload], ...] = ()
    fds: tuple[int, int] = (0, 0)
    reply_fds: tuple[int, int] = (0, 0)
    needs: int = 0
    offered: int = 0
    acked: int = 0
    known: bool = True

    @property
    def replies(self) -> tuple[type[Payload], ...]:
        """Payloads that an answer of either kind may have."""
        return self.reply or (U64,)


class RequestTable:
    """The requests that one side may send, by number and by name."""

    def __init__(self, sender: str, rows: tuple[Request, ...]) -> None:
        self.sender = sender
        self.rows = rows
        self.by_id = {row.id: row for row in rows}
        self.by_name = {row.name: row for row in rows}

    def __iter__(self) -> Iterator[Request]:
        return iter(self.rows)

    def get(self, number: int) -> Request:
        """The row of request `number`; for an unknown one a row with `known` False."""
        return self.by_id.get(number) or Request(
            number, f"request {number}", Raw, fds=(0, MAX_FDS), known=False
        )


FRONTEND_REQUESTS = RequestTable(
    "frontend",
    (
        Request(1, "GET_FEATURES", reply=(U64,)),
        Request(2, "SET_FEATURES", U64),
        Request(3, "SET_OWNER"),
        Request(4, "RESET_OWNER"),
        Request(5, "SET_MEM_TABLE", MemTable, fds=(0, MAX_REGIONS)),
        # libvhost-user answers with a status, rust-vmm echoes the request
        Request(6, "SET_LOG_BASE", Log, (U64, Log), fds=(1, 1), needs=P.LOG_SHMFD),
        Request(7, "SET_LOG_FD", fds=(1, 1)),
        Request(8, "SET_VRING_NUM", VringState),
        Request(9, "SET_VRING_ADDR", VringAddr),
        Request(10, "SET_VRING_BASE", VringState),
        Request(11, "GET_VRING_BASE", VringState, (VringState,)),
        Request(12, "SET_VRING_KICK", VringFile, fds=(0, 1)),
        Request(13, "SET_VRING_CALL", VringFile, fds=(0, 1)),
        Request(14, "SET_VRING_ERR", VringFile, fds=(0, 1)),
        Request(15, "GET_PROTOCOL_FEATURES", reply=(U64,), offered=F_PROTOCOL_FEATURES),
        Request(16, "SET_PROTOCOL_FEATURES", U64, offered=F_PROTOCOL_FEATURES),
        Request(17, "GET_QUEUE_NUM", reply=(U64,), needs=P.MQ),
        Request(18, "SET_VRING_ENABLE", VringState, acked=F_PROTOCOL_FEATURES),
        Request(19, "SEND_RARP", U64, needs=P.RARP),
        Request(20, "NET_SET_MTU", U64, needs=P.NET_MTU),
        Request(21, "SET_BACKEND_REQ_FD", fds=(1, 1), needs=P.BACKEND_REQ),
        Request(22, "IOTLB_MSG", Iotlb, (U64,), acked=F_IOMMU_PLATFORM),
        Request(23, "SET_VRING_ENDIAN", VringState, needs=P.CROSS_ENDIAN),
        # an empty reply means that the backend could not read it
        Request(24, "GET_CONFIG", Config, (Config, Empty), needs=P.CONFIG),
        Request(25, "SET_CONFIG", Config, needs=P.CONFIG),
        Request(26, "CREATE_CRYPTO_SESSION", Raw, (Raw,), needs=P.CRYPTO_SESSION),
        Request(27, "CLOSE_CRYPTO_SESSION", U64, needs=P.CRYPTO_SESSION),
        Request(28, "POSTCOPY_ADVISE", reply=(Empty,), reply_fds=(1, 1), needs=P.PAGEFAULT),
        Request(29, "POSTCOPY_LISTEN", needs=P.PAGEFAULT),
        Request(30, "POSTCOPY_END", reply=(U64,), needs=P.PAGEFAULT),
        Request(31, "GET_INFLIGHT_FD", Inflight, (Inflight,), reply_fds=(0, 1), needs=P.INFLIGHT_SHMFD),
        Request(32, "SET_INFLIGHT_FD", Inflight, fds=(1, 1), needs=P.INFLIGHT_SHMFD),
        Request(33, "GPU_SET_SOCKET", fds=(1, 1)),
        Request(34, "RESET_DEVICE", needs=P.RESET_DEVICE),
        Request(35, "VRING_KICK", VringState, needs=P.INBAND_NOTIFICATIONS),
        Request(36, "GET_MAX_MEM_SLOTS", reply=(U64,), needs=P.CONFIGURE_MEM_SLOTS),
        Request(37, "ADD_MEM_REG", SingleRegion, fds=(1, 1), needs=P.CONFIGURE_MEM_SLOTS),
        # a descriptor is wrong here, but some frontends send one
        Request(38, "REM_MEM_REG", SingleRegion, fds=(0, 1), needs=P.CONFIGURE_MEM_SLOTS),
        Request(39, "SET_STATUS", U64, needs=P.STATUS),
        Request(40, "GET_STATUS", reply=(U64,), needs=P.STATUS),
        Request(
            41,
            "GET_SHARED_OBJECT",
            SharedObject,
            (Empty, U64, SharedObject),
            reply_fds=(0, 1),
            needs=P.SHARED_OBJECT,
        ),
        Request(
            42,
            "SET_DEVICE_STATE_FD",
            DeviceState,
            (U64,),
            fds=(1, 1),
            reply_fds=(0, 1),
            needs=P.DEVICE_STATE,
        ),
        Request(43, "CHECK_DEVICE_STATE", reply=(U64,), needs=P.DEVICE_STATE),
        Request(44, "GET_SHMEM_CONFIG", reply=(ShmemConfig,), needs=P.SHMEM),
    ),
)

BACKEND_REQUESTS = RequestTable(
    "backend",
    (
        Request(1, "IOTLB_MSG", Iotlb, needs=P.BACKEND_REQ, acked=F_IOMMU_PLATFORM),
        Request(2, "CONFIG_CHANGE_MSG", needs=P.BACKEND_REQ | P.CONFIG),
        Request(3, "VRING_HOST_NOTIFIER_MSG", VringArea, fds=(0, 1), needs=P.BACKEND_REQ | P.HOST_NOTIFIER),
        Request(4, "VRING_CALL", VringState, needs=P.BACKEND_REQ | P.INBAND_NOTIFICATIONS),
        Request(5, "VRING_ERR", VringState, needs=P.BACKEND_REQ | P.INBAND_NOTIFICATIONS),
        Request(6, "SHARED_OBJECT_ADD", SharedObject, needs=P.BACKEND_REQ | P.SHARED_OBJECT),
        Request(7, "SHARED_OBJECT_REMOVE", SharedObject, needs=P.BACKEND_REQ | P.SHARED_OBJECT),
        Request(
            8,
            "SHARED_OBJECT_LOOKUP",
            SharedObject,
            (U64,),
            reply_fds=(0, 1),
            needs=P.BACKEND_REQ | P.SHARED_OBJECT,
        ),
        Request(9, "SHMEM_MAP", Mmap, fds=(1, 1), needs=P.BACKEND_REQ | P.SHMEM),
        Request(10, "SHMEM_UNMAP", Mmap, needs=P.BACKEND_REQ | P.SHMEM),
    ),
)

REQUESTS = (*FRONTEND_REQUESTS, *BACKEND_REQUESTS)
