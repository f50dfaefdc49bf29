"""Split virtqueues (virtio 1.3, section 2.7): their layout, and what can be told from it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .memory import GuestView
from .ring import NEXT, Ring, Sample

DESCRIPTOR = np.dtype([("addr", "<u8"), ("len", "<u4"), ("flags", "<u2"), ("next", "<u2")])
USED_ELEMENT = np.dtype([("id", "<u4"), ("len", "<u4")])
INDEX = np.dtype("<u2")
WRAP = 1 << 16


class SplitRing(Ring):
    """One split virtqueue; the arrays show what is in guest memory now.

    `descriptors` has `size` elements of DESCRIPTOR, `avail` `size` heads, `used` `size` elements of
    USED_ELEMENT.  Raises ValueError when the addresses are not in RAM.
    """

    format = "split"

    def __init__(self, view: GuestView, size: int, desc: int, avail: int, used: int) -> None:
        self.size = size
        self.descriptors = view.array(desc, DESCRIPTOR, size)
        self._driver = view.array(avail, INDEX, size + 3)  # flags, idx, ring, used_event
        self._device = view.array(used, INDEX, 2)  # flags, idx
        self.avail = self._driver[2 : 2 + size]
        self.used = view.array(used + 4, USED_ELEMENT, size)

    def sample(self) -> Sample:
        """The indices, which count chains modulo 65536, and what they tell for certain: how many it has.

        Of a device that gives back out of order the heads are the latest ones, as many as it has.
        """
        used = int(self._device[1])  # first, so that it is never ahead of the other
        avail = int(self._driver[1])
        count = (avail - used) % WRAP
        if count > self.size:
            return Sample(avail, used, used, None, broken=True)
        heads = tuple(int(self.avail[turn % self.size]) for turn in range(avail - count, avail))
        return Sample(avail, used, used, count > 0, heads)

    def chain(self, head: int) -> Iterator[tuple[int, int, int]]:
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
