"""A virtqueue as the driver describes it, and what makes the description usable.

It owns the registers of one queue and the rules for ring addresses (virtio 2.7).  It must not
know how the description arrived or who will serve the queue.
"""

from __future__ import annotations

from ..record import Record
from . import spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..layout import RamRange


class QueueSetup(Record):
    """An enabled queue for a backend: guest addresses, doorbell and interrupt descriptors.

    `kick` is an eventfd that counts the driver's notifications; `call` is one that raises the
    queue's interrupt, None when the driver wants none.  Both stay the transport's.
    """

    index: int
    size: int
    desc: int
    avail: int
    used: int
    kick: int
    call: int | None


class Queue:
    """The driver-visible state of one queue; `max_size` is what the device offers."""

    __slots__ = ("avail", "desc", "enabled", "index", "max_size", "size", "used", "vector")

    def __init__(self, index: int, max_size: int) -> None:
        self.index = index
        self.max_size = max_size
        self.reset()

    def reset(self) -> None:
        """Back to what a driver finds first (4.1.4.3)."""
        self.size = self.max_size
        self.vector = spec.NO_VECTOR
        self.enabled = False
        self.desc = self.avail = self.used = 0

    def set_size(self, size: int) -> None:
        """The driver chose a size; one that it must not choose reads back as 0 (4.1.4.3.1)."""
        fits = 0 < size <= self.max_size and not size & (size - 1)
        self.size = size if fits else 0

    def fault(self, ram: Sequence[RamRange], packed: bool = False) -> str | None:
        """What makes the queue, split or `packed`, unusable, in words, or None.

        Backends map guest RAM and follow these addresses, and some drop the connection over a
        misaligned one, so nothing wrong may reach them.
        """
        if not self.size:
            return "its size is not a power of two within the limit"
        driver, device = (
            ((spec.EVENT_ALIGN, spec.EVENT_BYTES), (spec.EVENT_ALIGN, spec.EVENT_BYTES))
            if packed
            else (
                (spec.AVAIL_ALIGN, spec.avail_bytes(self.size)),
                (spec.USED_ALIGN, spec.used_bytes(self.size)),
            )
        )
        for name, address, (align, length) in (
            ("descriptor area", self.desc, (spec.DESC_ALIGN, spec.desc_bytes(self.size))),
            ("driver area", self.avail, driver),
            ("device area", self.used, device),
        ):
            if address % align:
                return f"its {name} at {address:#x} is not aligned to {align} bytes"
            if not any(part.address <= address and address + length <= part.end for part in ram):
                return f"its {name} at {address:#x} ({length} bytes) does not lie in guest RAM"
        return None
