"""The payload structs of vhost-user: how each is laid out, read and written.

One class a struct of QEMU's docs/interop/vhost-user.rst, with its field names and order;
the base class encodes and decodes them all.  It owns layouts and what a struct says
about itself; it must not know which request carries it.  Integers are in native byte
order, sizes are bytes.
"""

from __future__ import annotations

from struct import Struct

from ..record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

MAX_REGIONS = 32  # descriptors in one message, by rust-vmm's limit
MAX_CONFIG = 4096  # VHOST_USER_CONFIG_SIZE
MAX_RAW = 4096
SHMEM_REGIONS = 256

INDEX_MASK = 0xFF
NO_FD = 1 << 8


class Payload(Record):
    """What follows a header.  `_wire` lays the fields out in their order; padding is `x`."""

    _wire = Struct("=")

    def encode(self) -> bytes:
        """Bytes on the wire; struct.error when a value does not fit its field."""
        return self._wire.pack(*self._asdict().values())

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read exactly one payload; ValueError when the fields contradict one another."""
        return cls(*cls._wire.unpack(data))

    @classmethod
    def fits(cls, size: int) -> bool:
        """Whether a payload of this kind can be `size` bytes long."""
        return size == cls._wire.size

    def fd_count(self) -> int | None:
        """How many descriptors this very payload announces; None: the row alone decides."""
        return None


class Empty(Payload):
    """No payload."""


class U64(Payload):
    """One number: feature bits, a count, or a status where 0 is success."""

    value: int
    _wire = Struct("=Q")


class VringState(Payload):
    """A vring's index and a number: size, base (split: avail index) or enable."""

    index: int
    num: int
    _wire = Struct("=II")


class VringAddr(Payload):
    """User addresses of a vring's three parts; this order is the wire's."""

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int
    _wire = Struct("=IIQQQQ")


class VringFile(Payload):
    """A vring's index and whether an eventfd comes along (bit 8 says that none does)."""

    index: int
    has_fd: bool
    _wire = Struct("=Q")

    def encode(self) -> bytes:
        if not 0 <= self.index <= INDEX_MASK:
            raise ValueError(f"vring index {self.index} does not fit 8 bits")
        return self._wire.pack(self.index | (0 if self.has_fd else NO_FD))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        (value,) = cls._wire.unpack(data)
        if value & ~(INDEX_MASK | NO_FD):
            raise ValueError(f"reserved bits set in vring index {value:#x}")
        return cls(value & INDEX_MASK, not value & NO_FD)

    def fd_count(self) -> int:
        return int(self.has_fd)


class MemRegion(Payload):
    """One memory region: guest address, size, user address, offset in its file."""

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int
    _wire = Struct("=QQQQ")


class MemTable(Payload):
    """All memory regions at once, one descriptor each in the same order."""

    regions: tuple[MemRegion, ...]
    _wire = Struct("=II")

    def encode(self) -> bytes:
        return self._wire.pack(len(self.regions), 0) + b"".join(region.encode() for region in self.regions)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        count, _ = cls._wire.unpack_from(data)
        step, head = MemRegion._wire.size, cls._wire.size
        regions = tuple(MemRegion.decode(data[at : at + step]) for at in range(head, len(data), step))
        if count != len(regions):
            raise ValueError(f"{count} regions announced, {len(regions)} sent")
        return cls(regions)

    @classmethod
    def fits(cls, size: int) -> bool:
        count, rest = divmod(size - cls._wire.size, MemRegion._wire.size)
        return rest == 0 and 0 <= count <= MAX_REGIONS

    def fd_count(self) -> int:
        return len(self.regions)


class SingleRegion(MemRegion):
    """One memory region to add or to remove."""

    _wire = Struct("=8xQQQQ")


class Log(Payload):
    """Where the dirty log lies in its file."""

    size: int
    offset: int
    _wire = Struct("=QQ")


class Config(Payload):
    """A piece of the configuration space.  A request to read carries zero bytes of that length."""

    offset: int
    flags: int
    data: bytes
    _wire = Struct("=III")

    def encode(self) -> bytes:
        return self._wire.pack(self.offset, len(self.data), self.flags) + self.data

    @classmethod
    def decode(cls, data: bytes) -> Self:
        offset, size, flags = cls._wire.unpack_from(data)
        body = data[cls._wire.size :]
        if size != len(body):
            raise ValueError(f"{size} configuration bytes announced, {len(body)} sent")
        return cls(offset, flags, body)

    @classmethod
    def fits(cls, size: int) -> bool:
        return cls._wire.size <= size <= cls._wire.size + MAX_CONFIG


class Inflight(Payload):
    """The buffer in which a backend tracks requests in flight; its contents are the backend's."""

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int
    _wire = Struct("=QQHH4x")


class DeviceState(Payload):
    """Direction (0 save, 1 load) and phase (0 stopped) of a state transfer."""

    direction: int
    phase: int
    _wire = Struct("=II")


class VringArea(Payload):
    """A doorbell page in a descriptor; bit 8 of `index` says that none comes along."""

    index: int
    size: int
    offset: int
    _wire = Struct("=QQQ")

    def fd_count(self) -> int:
        return 0 if self.index & NO_FD else 1


class Iotlb(Payload):
    """struct vhost_iotlb_msg; kind: 1 miss, 2 update, 3 invalidate, 4 access failure."""

    iova: int
    size: int
    user_address: int
    permissions: int
    kind: int
    _wire = Struct("=QQQBB6x")


class SharedObject(Payload):
    """The UUID of an exported buffer."""

    uuid: bytes
    _wire = Struct("=16s")


class ShmemConfig(Payload):
    """How many shared memory regions there are, and 256 sizes; the position is the shmid."""

    count: int
    sizes: tuple[int, ...]
    _wire = Struct(f"=I4x{SHMEM_REGIONS}Q")

    def encode(self) -> bytes:
        return self._wire.pack(self.count, *self.sizes)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        count, *sizes = cls._wire.unpack(data)
        return cls(count, tuple(sizes))


class Mmap(Payload):
    """A piece of a descriptor's file and its place in shared memory region `shmid`; flag 1: writable."""

    shmid: int
    fd_offset: int
    shm_offset: int
    length: int
    flags: int
    _wire = Struct("=B7xQQQQ")


class Raw(Payload):
    """Bytes that pyvmm passes on without reading them."""

    data: bytes

    def encode(self) -> bytes:
        return self.data

    @classmethod
    def decode(cls, data: bytes) -> Self:
        return cls(data)

    @classmethod
    def fits(cls, size: int) -> bool:
        return 0 <= size <= MAX_RAW
