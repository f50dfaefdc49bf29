"""MSI-X: the vector table, the pending bits, and an eventfd for each vector.

It owns the eventfds, made early so that they can be given to a backend at once, and decides
which of them KVM turns into interrupts.  A vector is *live* while MSI-X is enabled and neither
the function mask nor its own mask is set: then its irqfd is assigned and its eventfd never
keeps a count.  While it is not live the irqfd is not assigned, so that events gather in the eventfd:
its counter is the pending bit (PCI 3.0, 6.8.2.9 to 6.8.3.5).  It must not know who signals.

A guest's mistakes and KVM's refusals cost interrupts of this function, never more.
"""

from __future__ import annotations

import os
import select
import struct
from _thread import allocate_lock as Lock

from .. import log
from ..eventfd import create, drain, signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..irq import InterruptRouter

CAPABILITY_ID = 0x11
MAX_VECTORS = 2048
ENABLE, FUNCTION_MASK = 0x8000, 0x4000  # message control
VECTOR_MASK = 1  # vector control
ENTRY_WORDS = 4
CONTROL_WORD = 3
FRESH = (0, 0, 0, VECTOR_MASK)  # address low, address high, data, vector control
WORD = 0xFFFF_FFFF


class Vector:
    """One table entry."""

    __slots__ = ("fd", "gsi", "live", "words")

    def __init__(self) -> None:
        self.fd = create()
        self.gsi: int | None = None
        self.live = False
        self.words = [*FRESH]


class MsixTable:
    """`count` vectors; as a bus device it is the table, `pending` is the pending bit array."""

    def __init__(self, router: InterruptRouter, count: int, name: str) -> None:
        if not 1 <= count <= MAX_VECTORS:
            raise ValueError(f"{name}: {count} MSI-X vectors; 1 to {MAX_VECTORS} are possible")
        self._router = router
        self._name = name
        self._lock = Lock()
        self._vectors = [Vector() for _ in range(count)]
        self._masked = False
        self.enabled = False
        self.pending = PendingBits(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)

    def capability(self, bar: int, table: int, pending: int) -> bytes:
        """The capability's bytes after identifier and link; offsets in `bar`, 8-byte aligned."""
        control = len(self._vectors) - 1
        return struct.pack("<HII", control, table | bar, pending | bar)

    def fd(self, vector: int) -> int:
        """The eventfd that raises `vector`."""
        return self._vectors[vector].fd

    def set_control(self, control: int) -> None:
        """The guest wrote message control."""
        with self._lock:
            self.enabled = bool(control & ENABLE)
            self._masked = bool(control & FUNCTION_MASK)
            for vector in self._vectors:
                self._update(vector)

    def trigger(self, vector: int) -> None:
        """Raise `vector` from this process."""
        signal(self._vectors[vector].fd)

    def drain(self, vectors: Sequence[int]) -> None:
        """Drop pending events of `vectors`: whoever caused them was reset."""
        for vector in vectors:
            drain(self._vectors[vector].fd)

    def close(self) -> None:
        """Take every vector from KVM and close its eventfd."""
        with self._lock:
            self.enabled = False
            for vector in self._vectors:
                self._update(vector)
                os.close(vector.fd)
            self._vectors.clear()

    # -- the table as a bus device: aligned 32- and 64-bit accesses (PCI 3.0, 6.8.2) -----
    def read(self, offset: int, width: int) -> int:
        """Read one or two words of the table."""
        vector, word = self._find(offset, width)
        if vector is None:
            return 0
        value = vector.words[word]
        return value if width == 4 else value | vector.words[word + 1] << 32

    def write(self, offset: int, width: int, value: int) -> None:
        """Write one or two words of the table."""
        with self._lock:
            vector, word = self._find(offset, width)
            if vector is None:
                return
            vector.words[word] = value & WORD
            if width == 8:
                vector.words[word + 1] = value >> 32 & WORD
            vector.words[CONTROL_WORD] &= VECTOR_MASK
            self._update(vector, moved=word < CONTROL_WORD)

    def _find(self, offset: int, width: int) -> tuple[Vector | None, int]:
        index, word = divmod(offset >> 2, ENTRY_WORDS)
        if width not in (4, 8) or offset % width:
            log.once((self._name, "msix"), f"{self._name}: the guest made a bad access to the MSI-X table")
        elif index < len(self._vectors):
            return self._vectors[index], word
        return None, 0

    # -- live vectors --------------------------------------------------------------------
    def _update(self, vector: Vector, moved: bool = False) -> None:
        live = self.enabled and not self._masked and not vector.words[CONTROL_WORD] & VECTOR_MASK
        try:
            if live and not vector.live:
                self._connect(vector)
            elif vector.live and not live:
                self._disconnect(vector)
            elif live and moved:
                self._route(vector)
            if not self.enabled:
                self._forget_route(vector)
        except OSError as error:
            log.once((self._name, "irqfd"), f"{self._name}: KVM refused an interrupt route: {error}")

    def _route(self, vector: Vector) -> int:
        if vector.gsi is None:
            vector.gsi = self._router.allocate_gsi()
        low, high, data, _ = vector.words
        self._router.set_msi(vector.gsi, high << 32 | low, data)
        return vector.gsi

    def _connect(self, vector: Vector) -> None:
        gsi = self._route(vector)
        # KVM injects a count that it finds but leaves it standing, where it would later look like
        # a pending bit; so it is taken out before and signalled again after.
        pending = drain(vector.fd)
        try:
            self._router.assign(vector.fd, gsi)
            vector.live = True
        finally:
            if pending:
                signal(vector.fd)

    def _disconnect(self, vector: Vector) -> None:
        """Only the irqfd goes; the route stays until MSI-X is disabled, as masks come and go."""
        vector.live = False
        if vector.gsi is not None:
            self._router.deassign(vector.fd, vector.gsi)

    def _forget_route(self, vector: Vector) -> None:
        """After the irqfd: KVM must never see an irqfd whose route is gone."""
        if vector.gsi is not None and not vector.live:
            gsi, vector.gsi = vector.gsi, None
            self._router.free_gsi(gsi)


class PendingBits:
    """The pending bit array as a bus device: read-only, one bit a vector, 64 to a quadword."""

    def __init__(self, vectors: list[Vector]) -> None:
        self._vectors = vectors

    def read(self, offset: int, width: int) -> int:
        """Bits of the vectors whose events wait."""
        poll = select.poll()
        vectors = self._vectors[8 * offset : 8 * (offset + width)]
        wanted = {vector.fd: bit for bit, vector in enumerate(vectors)}
        for fd in wanted:
            poll.register(fd, select.POLLIN)
        return sum(1 << wanted[fd] for fd, _ in poll.poll(0)) if wanted else 0

    def write(self, offset: int, width: int, value: int) -> None:
        """Read-only: nothing happens."""
