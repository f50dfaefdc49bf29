"""The virtqueues of a live machine, as NumPy arrays over its memory.

It owns the layouts of split rings as structured types (virtio 1.3, section 2.7) and what can be told
from the rings alone: indices, what the device still has, whether it gets on.  It maps guest RAM
read-only and changes nothing.  It must not know where the facts about the machine come from:
`pyvmm.control` hands them out.  NumPy costs 0.1 s to import; only `pyvmm rings` loads this.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layout import RamRange
from .record import Record
from .virtio.spec import F_RING_PACKED

DESCRIPTOR = np.dtype([("addr", "<u8"), ("len", "<u4"), ("flags", "<u2"), ("next", "<u2")])
USED_ELEMENT = np.dtype([("id", "<u4"), ("len", "<u4")])
INDEX = np.dtype("<u2")
NEXT, WRITE, INDIRECT = 1, 2, 4
WRAP = 1 << 16

IDLE, BUSY, STUCK, BROKEN = "idle", "busy", "stuck", "broken"


class GuestView:
    """Guest RAM, mapped read-only: the `ranges` of the file `fd`, which stays the caller's."""

    def __init__(self, fd: int, ranges: Sequence[RamRange]) -> None:
        self._ranges = tuple(ranges)
        size = max(piece.offset + piece.size for piece in ranges)
        if os.fstat(fd).st_size < size:
            raise ValueError(f"the RAM file has {os.fstat(fd).st_size} bytes, its ranges need {size}")
        self._bytes = np.frombuffer(mmap.mmap(fd, size, prot=mmap.PROT_READ), dtype=np.uint8)

    def array(self, address: int, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        """`count` elements at a guest address, without a copy; ValueError outside of RAM."""
        length = count * dtype.itemsize
        for piece in self._ranges:
            if piece.address <= address and address + length <= piece.end:
                start = address - piece.address + piece.offset
                return self._bytes[start : start + length].view(dtype)
        raise ValueError(f"guest addresses {address:#x} to {address + length:#x} are not in RAM")


class SplitRing:
    """One split virtqueue; the arrays show what is in guest memory now.

    `descriptors` has `size` elements of DESCRIPTOR, `avail` `size` heads, `used` `size` elements of
    USED_ELEMENT.  Raises ValueError when the addresses are not in RAM.
    """

    def __init__(self, view: GuestView, size: int, desc: int, avail: int, used: int) -> None:
        self.size = size
        self.descriptors = view.array(desc, DESCRIPTOR, size)
        self._driver = view.array(avail, INDEX, size + 3)  # flags, idx, ring, used_event
        self._device = view.array(used, INDEX, 2)  # flags, idx
        self.avail = self._driver[2 : 2 + size]
        self.used = view.array(used + 4, USED_ELEMENT, size)

    @property
    def avail_index(self) -> int:
        """How many chains the driver has made available, modulo 65536."""
        return int(self._driver[1])

    @property
    def used_index(self) -> int:
        """How many chains the device has given back, modulo 65536."""
        return int(self._device[1])

    @property
    def outstanding(self) -> int:
        """How many chains the device has; above `size` when the ring is broken."""
        return (self.avail_index - self.used_index) % WRAP

    def in_flight(self) -> list[int]:
        """The heads of the chains that the device has, oldest first, if it gives back in order.

        Rings do not tell more: of a device that gives back out of order these are the latest heads,
        as many as it has.
        """
        count, end = self.outstanding, self.avail_index
        if count > self.size:
            return []
        return [int(self.avail[turn % self.size]) for turn in range(end - count, end)]

    def chain(self, head: int) -> Iterator[tuple[int, int, int]]:
        """Address, length and flags of each descriptor of a chain; a loop ends after `size`."""
        index = head
        for _ in range(self.size):
            if index >= self.size:
                return
            entry = self.descriptors[index]
            flags = int(entry["flags"])
            yield int(entry["addr"]), int(entry["len"]), flags
            if not flags & NEXT:
                return
            index = int(entry["next"])


class Sample(Record):
    """What one queue looked like at one moment."""

    avail: int
    used: int
    size: int

    @property
    def outstanding(self) -> int:
        """How many chains the device has."""
        return (self.avail - self.used) % WRAP


def sample(ring: SplitRing) -> Sample:
    """The indices of `ring` now; the used index first, so that it is never ahead of the other."""
    used = ring.used_index
    return Sample(ring.avail_index, used, ring.size)


def state(before: Sample, after: Sample) -> str:
    """What two samples of a queue tell: STUCK if the device had something all the time and gave nothing."""
    if after.outstanding > after.size:
        return BROKEN
    if not after.outstanding:
        return IDLE
    return STUCK if before.outstanding and before.used == after.used else BUSY


class LiveQueue:
    """A queue of a machine as `pyvmm.control` describes it."""

    def __init__(self, view: GuestView, device: str, facts: Mapping[str, int]) -> None:
        self.device = device
        self.index = facts["index"]
        self.ring = SplitRing(view, facts["size"], facts["desc"], facts["avail"], facts["used"])


def live_queues(machine: Mapping[str, Any], ram_fd: int) -> list[LiveQueue]:
    """The running queues of a machine whose memory is `ram_fd`, but for packed ones (see `packed`)."""
    view = GuestView(ram_fd, [RamRange(*piece) for piece in machine["ram"]])
    return [
        LiveQueue(view, device["name"], queue)
        for device in machine["devices"]
        if not device["features"] & F_RING_PACKED
        for queue in device["queues"]
    ]


def packed(machine: Mapping[str, Any]) -> list[str]:
    """The devices whose rings are packed: memory does not tell how far those are."""
    return [device["name"] for device in machine["devices"] if device["features"] & F_RING_PACKED]
