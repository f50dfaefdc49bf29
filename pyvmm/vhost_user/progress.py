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
    "requests were completed out of order and the lost backend tracked none: repeating any could do harm"
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
    """Whether the chains used so far are those that were made available first.

    Only then does the used index say which ones are left.  What can be seen is what lies in both
    rings still: of the last `size` chains made available those that precede the used index.
    Drivers start with rings of zeros (virtio 1.2, 4.1.5.1.3), so what was never used compares as equal.
    """
    used = used_index(memory, queue)
    entries = _read(memory, queue.used + RING, 8 * queue.size)
    heads = _read(memory, queue.avail + RING, 2 * queue.size)
    (available,) = unpack("<H", _read(memory, queue.avail + INDEX, 2))  # last: the driver goes on
    outstanding = available - used & 0xFFFF
    visible = queue.size - outstanding - 1  # one less: the driver may be writing the next
    slots = [used - 1 - back & queue.size - 1 for back in range(visible)]
    done = [ident for ident, _ in iter_unpack("<II", entries)]
    made = [head for (head,) in iter_unpack("<H", heads)]
    return not outstanding or sorted(done[slot] for slot in slots) == sorted(made[slot] for slot in slots)


def _read(memory: MemoryTable, address: int, length: int) -> bytes:
    return os.pread(memory.fd, length, memory.file_offset(address))
