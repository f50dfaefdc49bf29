"""Packed virtqueues (virtio 1.3, section 2.8): their layout, and what can be told from it.

The driver's position can be seen: AVAIL is the wrap counter of the lap in which a descriptor was last
written, and changes there.  The device's position cannot: it writes one used descriptor for each
chain and skips as many as the chain had, which go on looking available; how many, only driver and
device know.  So what follows the last used descriptor may be the rest of the chain that was given
back, or chains that the device has, or the one and then the others.

- Nothing follows: the device has nothing.
- No used descriptor has the buffer ID of the newest chain: the device has that one, since giving it
  back would have left such a descriptor within the last lap.
- The rest of a chain ends with its ID (2.8.6), has no INDIRECT (2.8.19), and follows the used descriptor
  if the device gives back in order.  But a driver that has everything back may use the ID
  again, for the chain that follows: the same bytes, and the device has something.
- A device that gives back out of order may leave a chain there that it gave back before another, longer
  one.  Then an earlier used descriptor has its ID; as it has when the driver used the ID again.
- With EVENT_IDX, drivers say from which used descriptor on they want to be told: never from one
  beyond their own position, and when the device gets there they look.  That tells those cases apart,
  but for the moment until they look.  Without it nothing does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..virtio.spec import F_EVENT_IDX, F_IN_ORDER
from .memory import GuestView
from .ring import INDIRECT, NEXT, WRITE, Ring, Sample

DESCRIPTOR = np.dtype([("addr", "<u8"), ("len", "<u4"), ("id", "<u2"), ("flags", "<u2")])
EVENT = np.dtype([("off_wrap", "<u2"), ("flags", "<u2")])
AVAIL, USED = 1 << 7, 1 << 15
RING_EVENT_FLAGS_DESC = 2


class PackedRing(Ring):
    """One packed virtqueue; the arrays show what is in guest memory now.

    `descriptors` has `size` elements of DESCRIPTOR; `driver` and `device`, the event suppression
    structures, are one EVENT each.  `features` are those that the driver accepted.  Raises ValueError
    when the addresses are not in RAM.
    """

    format = "packed"

    def __init__(
        self, view: GuestView, size: int, desc: int, avail: int, used: int, features: int = 0
    ) -> None:
        self.size = size
        self.descriptors = view.array(desc, DESCRIPTOR, size)
        self.driver = view.array(avail, EVENT, 1)
        self.device = view.array(used, EVENT, 1)
        self._event_idx = bool(features & F_EVENT_IDX)
        self._in_order = bool(features & F_IN_ORDER)

    def sample(self) -> Sample:
        """Positions, in descriptors modulo twice the size: the first half is the lap of wrap counter 1.

        `holds` does not depend on the order in which the device gives back.  It does on a driver that has
        one chain for each buffer ID and, with EVENT_IDX, keeps its event offset and answers interrupts.
        Linux keeps it but while it polls; a network card that polls for ever (napi_tx=N) has an old one.

        Heads are the places of first descriptors, and `used` is the earliest that it can be.  Of a device
        that gives back out of order these are the latest heads, as many as it has if chains have one
        descriptor each, else as if what it gave back had been in order.

        A driver writes a chain's first descriptor last: for that moment, a ring contradicts itself.
        """
        size = self.size
        asked = self._event()  # first: a newer one could be ahead of the ring
        ring = self.descriptors.copy()
        lap = ring["flags"] & AVAIL != 0
        changes = np.flatnonzero(lap[1:] != lap[:-1]) + 1
        place = int(changes[0]) if len(changes) else size
        avail = (place if lap[0] else place + size) % (2 * size)
        history = _History(np.roll(ring, -place))
        if len(changes) > 1 or history.endless:
            return Sample(avail, avail, avail, None, broken=True)
        oldest = avail - size
        event = -1 if asked is None else (asked - oldest) % (2 * size)
        holds, first, last = history.device(event, self._in_order)
        return Sample(
            avail,
            used=(oldest + history.starts[first]) % (2 * size),
            last=(oldest + history.given) % (2 * size),
            holds=holds,
            heads=tuple((oldest + start) % size for start in history.starts[first:-1]),
            unsure=last - first,
        )

    def _event(self) -> int | None:
        """The position from which on the driver wants to be told."""
        off_wrap, flags = self.driver[0].tolist()
        place, wrap = off_wrap & 0x7FFF, off_wrap >> 15
        if not self._event_idx or flags & 3 != RING_EVENT_FLAGS_DESC or place >= self.size:
            return None
        return int(place if wrap else place + self.size)

    def chain(self, head: int) -> Iterator[tuple[int, int, int]]:
        """Flags without AVAIL and USED, as split rings have them."""
        for place in range(head, head + self.size if head < self.size else 0):
            address, length, _, flags = self.descriptors[place % self.size].tolist()
            yield address, length, flags & (NEXT | WRITE | INDIRECT)
            if not flags & NEXT:
                return


class _History:
    """A packed ring in the order of time, from what the driver wrote longest ago to what it wrote last.

    `given` is where the last used descriptor is, or -1.  What looks like chains behind it begins at
    each of `starts` but the last, which is the driver's position, and has `ids`.
    """

    def __init__(self, ring: NDArray[np.void]) -> None:
        self._flags = flags = ring["flags"]
        self._used = np.flatnonzero((flags & AVAIL != 0) == (flags & USED != 0))
        self.given = int(self._used[-1]) if len(self._used) else -1
        ends = np.flatnonzero(flags[self.given + 1 :] & NEXT == 0) + self.given + 1
        self.starts: list[int] = [self.given + 1, *(ends + 1).tolist()]
        self.ids: list[int] = ring["id"][ends].tolist()
        self.endless = self.starts[-1] != len(ring)
        written = [entry for entry in ring[self._used].tolist() if any(entry)]  # zeros are new (2.8.13)
        self._back: list[int] = [number for _, _, number, _ in written]

    def device(self, event: int, in_order: bool) -> tuple[bool | None, int, int]:
        """Whether the device has a chain; from which of them on it may, and from which on it does."""
        if not self.ids:
            return False, 0, 0
        count, rests = len(self.ids), self._rests(in_order)
        holds = self._holds(event, count in rests or (not in_order and self._overtaken()))
        if holds is False:
            return holds, count, count
        if event == self.starts[0]:
            return holds, 0, 0
        possible = [rest for rest in rests if rest < count or holds is None]
        return holds, min(possible, default=0), max(possible, default=0)

    def _holds(self, event: int, maybe_nothing: bool) -> bool | None:
        if not maybe_nothing:
            return True
        end = self.starts[-1]
        return event < end if self.given < event <= end else None

    def _rests(self, in_order: bool) -> list[int]:
        """How many of the chains may be the rest of what was given back, in order.

        With IN_ORDER one used descriptor may stand for several chains.  All of these were in flight
        together, and all others are now, so that their IDs differ.
        """
        if not in_order:
            return [0, 1] if self._is_rest(1) and self._one_chain() else [0]
        count = len(self.ids)
        least, most = count - _different(self.ids[::-1]), _different(self.ids)
        return [rest for rest in range(least, most + 1) if not rest or self._is_rest(rest)]

    def _is_rest(self, count: int) -> bool:
        """Whether the used descriptor has the ID of the last of `count` chains (2.8.6, 2.8.8).

        One that the driver has overwritten does not stand for the newest chain.
        """
        if self.given < 0:
            return count < len(self.ids)
        return self.ids[count - 1 : count] == self._back[-1:]

    def _one_chain(self) -> bool:
        """Whether a chain may have begun at the last used descriptor and gone on behind it."""
        before = self.given - 1
        inside = before >= 0 and before not in self._used and self._flags[before] & NEXT
        return not inside and not self._flags[self.given + 1] & INDIRECT

    def _overtaken(self) -> bool:
        """Whether the newest chain may have been given back, and another one after it.

        What was given back since was in flight together with it, so the IDs differ.
        """
        newest, back = self.ids[-1], self._back
        if newest not in back or newest == back[-1]:
            return False
        return back[::-1].index(newest) < _different(back[::-1])


def _different(ids: Sequence[int]) -> int:
    """How many of the first `ids` differ from each other."""
    seen = set()
    for number in ids:
        if number in seen:
            break
        seen.add(number)
    return len(seen)
