"""How far a backend had come when it was lost, read from the rings in guest memory.

Split virtqueues only (virtio 1.2, 2.7).  It reads the few bytes that both ends share and writes
none; where they lie comes from the driver and was checked before any backend heard of it.  It
must not know backends or messages.
"""

from __future__ import annotations

import os
from struct import iter_unpack, unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..virtio.queue import QueueSetup
    from .memory import MemoryTable
    from .rings import Wanted

INDEX = 2  # offset of `idx` in both rings, of 16 bits
RING = 4  # offset of the entries
F_IN_ORDER = 1 << 35
UNORDERED = (
    "requests may have been completed out of order and the lost backend tracked none: "
    "repeating any could do harm"
)
UNMAPPED = "the guest had memory of the lost backend's before it"


def used_index(memory: MemoryTable, queue: QueueSetup) -> int:
    """How many chains the device has used since its start, 16 bits: where a new backend goes on."""
    (index,) = unpack("<H", _read(memory, queue.used + INDEX, 2))
    return int(index)


def moved(memory: MemoryTable, running: Iterable[tuple[QueueSetup, int]]) -> bool:
    """Whether any of these queues has used a chain since it began at the index beside it."""
    return any(used_index(memory, queue) != base for queue, base in running)


def obstacle(memory: MemoryTable, wanted: Wanted, tracked: bool, torn: bool) -> str:
    """Why no other backend can go on with what the driver has, or nothing.

    `tracked` says whether the lost one kept book of its requests, `torn` whether the guest lost mappings.
    """
    if torn:
        return UNMAPPED
    if tracked or wanted.features & F_IN_ORDER:
        return ""
    return "" if all(in_order(memory, queue) for queue in wanted.queues) else UNORDERED


def in_order(memory: MemoryTable, queue: QueueSetup) -> bool:
    """Whether the chains used so far are those that were made available first, as far as can be seen.

    Only then does the used index say which ones are left.  Each ring shows its last `size` entries.
    False means that this is not so, or that too little is to be seen; True that it is so, unless a chain
    is left since before those entries, whose places are taken by others: then memory can look as
    if it had been used in its turn.
    """
    size, used = queue.size, used_index(memory, queue)
    entries = _read(memory, queue.used + RING, 8 * size)
    heads = unpack(f"<{size}H", _read(memory, queue.avail + RING, 2 * size))
    (available,) = unpack("<H", _read(memory, queue.avail + INDEX, 2))  # last: the driver goes on
    left = available - used & 0xFFFF
    waiting = [heads[used + ahead & size - 1] for ahead in range(left)]
    if len(set(waiting)) < left:
        return False  # a head is with one end at a time
    if left in (0, size):
        return True  # none, or all that there are
    ids = [ident for ident, _ in iter_unpack("<II", entries)]
    if used <= available < size and not any(heads[available:]) and not any(entries[8 * used :]):
        return sorted(ids[:used]) == sorted(heads[:used])  # it is all there: rings begin as zeros (4.1.5.1.3)
    slots = [used - 1 - back & size - 1 for back in range(size)]  # the latest first
    done = [ids[slot] for slot in slots]
    made = [heads[slot] for slot in slots[: size - left]]
    return not _overtaken(waiting, done) or _settled(waiting, done[: size - left], made)


def _overtaken(waiting: list[int], done: list[int]) -> bool:
    """Whether one of the heads that wait may have been given back already: it is among the last in `done`.

    At most `size` chains are with the device, so one that is `ahead` of the first to wait cannot have been
    used longer ago than this.  If none was, those that wait are what is left.
    """
    latest: dict[int, int] = {}
    for back, head in enumerate(done):
        latest.setdefault(head, back)
    last = len(done) - 2
    return any(latest.get(head, last + 1) <= last - ahead for ahead, head in enumerate(waiting))


def _settled(waiting: list[int], done: list[int], made: list[int]) -> bool:
    """Whether all that was `made` available in the visible places was used; the latest first in both lists.

    A head is made available again only once it was used.  So each use of it in a place, or after that,
    is of the chain in that place, or of a later one.  The driver may be writing over the last place: it
    may speak against the others, but is no evidence by itself, unless requests come one at a time.
    """
    if len(made) == 1 < len(waiting) or done[-1] != made[-1] or sorted(done) != sorted(made):
        return False
    owed: dict[int, int] = {}
    settled = set(waiting)
    for head, place in zip(done, made, strict=True):
        owed[head] = owed.get(head, 0) - 1
        owed[place] = owed.get(place, 0) + 1
        if owed[place] <= 0:
            settled.add(place)
    return settled.issuperset(made)


def _read(memory: MemoryTable, address: int, length: int) -> bytes:
    return os.pread(memory.fd, length, memory.file_offset(address))
