"""Rings of the proxy's own between a driver and the backend behind: available and used, per virtqueue.

The descriptor table stays the guest's, so that chains keep their heads and nothing is translated;
what lies in between is which chains the backend sees, and what comes back to the driver.  It owns the
memory of these rings and the driver's side of them (virtio 1.3, section 2.7).  It must not know
messages, nor what is done to a chain on its way.

The rings are little-endian and so is this host (KVM guests are x86 here): each index is one
aligned store, and x86 keeps the order of stores and of loads.  Both ends always notify, so no load has
to wait for a store.
"""

from __future__ import annotations

import mmap
import os
from fcntl import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, fcntl

from ..errors import RemoteProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

QUEUES = 64
MAX_SIZE = 1024
USED_AT = 4096  # in a slot: the available ring first, 6 + 2 * MAX_SIZE bytes at most
SLOT_BYTES = 16384  # the used ring takes 6 + 8 * MAX_SIZE
BYTES = QUEUES * SLOT_BYTES
# Where the backend finds it: above what guests have and where frontends map.
GUEST_ADDRESS = 1 << 45
USER_ADDRESS = 1 << 61


class ShadowMemory:
    """The file with the rings of all virtqueues; `fd` is what the backend gets."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("pyvmm-shadow", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, BYTES)
        fcntl(self.fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)  # the backend has it, too
        self._mapping = mmap.mmap(self.fd, BYTES)
        self.view = memoryview(self._mapping)

    def close(self) -> None:
        """Unmap and close the file; each ring was closed before."""
        if self.fd >= 0:
            self.view.release()
            self._mapping.close()
            os.close(self.fd)
            self.fd = -1


class ShadowRing:
    """One virtqueue's available and used ring, from the driver's side."""

    def __init__(self, memory: ShadowMemory, index: int) -> None:
        self.index = index
        at = index * SLOT_BYTES
        self.avail_address, self.used_address = USER_ADDRESS + at, USER_ADDRESS + at + USED_AT
        self._avail = memory.view[at : at + USED_AT].cast("H")
        used = memory.view[at + USED_AT : at + SLOT_BYTES]
        self._used_index = used[:4].cast("H")
        self._used = used[4:].cast("I")
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._next = self._seen = 0

    def restart(self, base: int) -> None:
        """Empty both rings; they count on from `base`, as the driver's do."""
        self._next = self._seen = base & 0xFFFF
        self._avail[0] = 0
        self._avail[1] = self._used_index[1] = self._next
        self._used_index[0] = 0

    def put(self, head: int, size: int) -> None:
        """Make a chain available to the backend, in a ring of `size` entries."""
        self._avail[2 + self._next % size] = head
        self._next = (self._next + 1) & 0xFFFF
        self._avail[1] = self._next

    def taken(self, size: int) -> Iterator[tuple[int, int]]:
        """Head and used length of each chain that came back since the last call."""
        end = self._used_index[1]
        if (end - self._seen) & 0xFFFF > size:
            raise RemoteProtocolError(f"virtqueue {self.index}: the used index jumped to {end}")
        while self._seen != end:
            at = 2 * (self._seen % size)
            self._seen = (self._seen + 1) & 0xFFFF
            yield self._used[at], self._used[at + 1]

    def close(self) -> None:
        """Close both eventfds, and leave the memory."""
        for view in (self._avail, self._used_index, self._used):
            view.release()
        os.close(self.kick_fd)
        os.close(self.call_fd)
