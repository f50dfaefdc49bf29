"""A virtio driver in user space, for a device that Linux has no driver for.

It finds the function in sysfs, maps its BAR, and follows virtio 1.2, 3.1.1 and 4.1.4 with one
split virtqueue whose memory is this process's own, locked, its addresses from
/proc/self/pagemap.  It polls; interrupts need a kernel.  Needs root in the guest.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import time
from collections.abc import Callable
from pathlib import Path

PAGE = 4096
MAP_LOCKED = 0x2000
VENDOR = 0x1AF4
CAP_VENDOR, CAPABILITIES = 0x09, 0x34
COMMON, NOTIFY = 1, 2
MEMORY_SPACE, BUS_MASTER = 2, 4
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8
VERSION_1_HIGH = 1  # VIRTIO_F_VERSION_1, seen through feature select 1
NEXT, WRITE, NO_INTERRUPT = 1, 2, 1
ENTRIES = 64
AVAIL, USED = 1024, 2048  # where the rings are in the first page
# struct virtio_pci_common_cfg (4.1.4.3): offset and width
FIELDS = {
    "device_feature_select": (0, 4), "device_feature": (4, 4), "driver_feature_select": (8, 4),
    "driver_feature": (12, 4), "num_queues": (18, 2), "device_status": (20, 1), "queue_select": (22, 2),
    "queue_size": (24, 2), "queue_enable": (28, 2), "queue_notify_off": (30, 2),
    "queue_desc_lo": (32, 4), "queue_desc_hi": (36, 4), "queue_driver_lo": (40, 4),
    "queue_driver_hi": (44, 4), "queue_device_lo": (48, 4), "queue_device_hi": (52, 4),
}  # fmt: skip
CTYPES = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32}


def find(device_id: int) -> Path:
    """The function with this PCI device id, in sysfs."""
    for path in Path("/sys/bus/pci/devices").iterdir():
        if (read_hex(path / "vendor"), read_hex(path / "device")) == (VENDOR, device_id):
            return path
    raise FileNotFoundError(f"no PCI function {VENDOR:x}:{device_id:x}")


def read_hex(path: Path) -> int:
    """A number as sysfs prints it."""
    return int(path.read_text(), 16)


class Pages:
    """Locked memory of this process whose physical addresses are known, page by page."""

    def __init__(self, count: int) -> None:
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE | MAP_LOCKED
        self.view = mmap.mmap(-1, count * PAGE, flags=flags)
        self.view[:] = bytes(count * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.view))
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(start // PAGE * 8)
            entries = struct.unpack(f"<{count}Q", file.read(count * 8))
        self.physical = [(entry & (1 << 55) - 1) * PAGE for entry in entries]
        assert all(self.physical), "the kernel does not tell physical addresses"


class Device:
    """A function without a driver; `with` gives its mapped registers."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Device:
        if (self._path / "driver").exists():  # Linux's virtio-pci takes every function, for any driver
            (self._path / "driver/unbind").write_text(self._path.name)
        (self._path / "enable").write_text("1")
        with open(self._path / "config", "r+b", buffering=0) as file:
            space = file.read(256)
            (command,) = struct.unpack_from("<H", space, 4)
            file.seek(4)
            file.write(struct.pack("<H", command | MEMORY_SPACE | BUS_MASTER))
        self._parts = capabilities(space)
        bar = self._parts[COMMON][0]
        with open(self._path / f"resource{bar}", "r+b", buffering=0) as file:
            self._bar = mmap.mmap(file.fileno(), (self._path / f"resource{bar}").stat().st_size)
        return self

    def __exit__(self, *_: object) -> None:
        self.set("device_status", 0)

    def start(self) -> Queue:
        """Initialise the device with its first queue (3.1.1)."""
        self.set("device_status", 0)
        for status in (ACKNOWLEDGE, ACKNOWLEDGE | DRIVER):
            self.set("device_status", status)
        self.set("device_feature_select", 1)
        assert self.get("device_feature") & VERSION_1_HIGH
        for half, bits in ((0, 0), (1, VERSION_1_HIGH)):
            self.set("driver_feature_select", half)
            self.set("driver_feature", bits)
        self.set("device_status", ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert self.get("device_status") & FEATURES_OK
        queue = self._queue(0)
        self.set("device_status", ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        return queue

    def _queue(self, index: int) -> Queue:
        memory = Pages(3)
        self.set("queue_select", index)
        self.set("queue_size", ENTRIES)
        for part, offset in (("desc", 0), ("driver", AVAIL), ("device", USED)):
            address = memory.physical[0] + offset
            self.set(f"queue_{part}_lo", address & 0xFFFFFFFF)
            self.set(f"queue_{part}_hi", address >> 32)
        self.set("queue_enable", 1)
        _, offset, multiplier = self._parts[NOTIFY]
        doorbell = offset + self.get("queue_notify_off") * multiplier
        return Queue(memory, lambda: self._store(doorbell, 2, index))

    def get(self, name: str) -> int:
        """Read a register of the common configuration."""
        offset, width = FIELDS[name]
        place = self._parts[COMMON][1] + offset
        return int(CTYPES[width].from_buffer(self._bar, place).value)

    def set(self, name: str, value: int) -> None:
        """Write one."""
        offset, width = FIELDS[name]
        self._store(self._parts[COMMON][1] + offset, width, value)

    def _store(self, place: int, width: int, value: int) -> None:
        CTYPES[width].from_buffer(self._bar, place).value = value  # exactly one store of this width


def capabilities(space: bytes) -> dict[int, tuple[int, int, int]]:
    """BAR, offset and notify multiplier of each virtio capability, by type (4.1.4)."""
    found = {}
    place = space[CAPABILITIES]
    while place:
        if space[place] == CAP_VENDOR:
            kind, bar = space[place + 3 : place + 5]
            (offset,) = struct.unpack_from("<I", space, place + 8)
            multiplier = struct.unpack_from("<I", space, place + 16)[0] if kind == NOTIFY else 0
            found.setdefault(kind, (bar, offset, multiplier))
        place = space[place + 1]
    return found


class Queue:
    """A split virtqueue (2.7) with one request under way at a time."""

    def __init__(self, memory: Pages, kick: Callable[[], None]) -> None:
        self._memory = memory
        self._kick = kick
        self._index = 0
        struct.pack_into("<H", memory.view, AVAIL, NO_INTERRUPT)

    def exchange(self, data: bytes, room: int, seconds: float = 20.0) -> bytes:
        """Give the device `data` and `room` bytes to write to; what it wrote."""
        view = self._memory.view
        view[PAGE : PAGE + len(data)] = data
        view[2 * PAGE : 2 * PAGE + room] = bytes(room)
        _, readable, writable = self._memory.physical
        struct.pack_into("<QIHH", view, 0, readable, len(data), NEXT, 1)
        struct.pack_into("<QIHH", view, 16, writable, room, WRITE, 0)
        struct.pack_into("<H", view, AVAIL + 4 + 2 * (self._index % ENTRIES), 0)
        self._index = (self._index + 1) & 0xFFFF
        struct.pack_into("<H", view, AVAIL + 2, self._index)
        self._kick()
        end = time.monotonic() + seconds
        while struct.unpack_from("<H", view, USED + 2)[0] != self._index:
            if time.monotonic() > end:
                raise TimeoutError("the device does not answer")
        head, length = struct.unpack_from("<II", view, USED + 4 + 8 * ((self._index - 1) % ENTRIES))
        assert head == 0
        return bytes(view[2 * PAGE : 2 * PAGE + length])
