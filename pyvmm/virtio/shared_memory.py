"""The BAR in which a guest finds a device's shared memory (virtio 4.1.4.7): files, mapped piecewise.

It owns where each region lies in the BAR, the host addresses reserved for them, and one memory slot
for each mapping.  What is not mapped has no slot, so KVM hands accesses there to the bus: they read
zeros, and what is written is lost, as is what goes to a mapping that is read-only.  The VMM itself
never touches a mapping: its file is the backend's, who may cut it short at any time.  It must not
know who may map what.  The lock guards the pieces, and nothing but the host's kernel is called
under it.
"""

from __future__ import annotations

from _thread import allocate_lock as Lock

from .. import log
from ..errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    class Space(Protocol):
        """What is used of `_native.memory.AddressSpace`."""

        @property
        def address(self) -> int: ...
        def map(self, offset: int, fd: int, fd_offset: int, length: int, writable: bool) -> None: ...
        def unmap(self, offset: int, length: int) -> None: ...
        def intact(self, offset: int, length: int) -> bool: ...
        def close(self) -> None: ...

    class Slots(Protocol):
        """What is used of `slots.MemorySlots`."""

        def add(self, guest_address: int, size: int, host_address: int, *, readonly: bool) -> int: ...
        def remove(self, slot: int) -> None: ...


PAGE = 0x1000


class Piece:
    """One mapping: its length, and the slot in which the guest sees it, if it does."""

    __slots__ = ("length", "slot", "writable")

    def __init__(self, length: int, writable: bool) -> None:
        self.length = length
        self.writable = writable
        self.slot: int | None = None


class SharedMemoryBar:
    """A bus device, and what maps files into the BAR.  `sizes` is (shmid, size) for each region.

    `size` is the BAR's, `regions` has offset and size of each region in it.  Nothing can be mapped
    before `open`.
    """

    def __init__(self, name: str, sizes: Sequence[tuple[int, int]]) -> None:
        self.regions = place(sizes)
        total = max((offset + size for offset, size in self.regions.values()), default=0)
        self.size = 1 << (total - 1).bit_length() if total else 0
        self._name = name
        self._lock = Lock()
        self._base: int | None = None
        self._pieces: dict[int, Piece] = {}
        self._space: Space | None = None
        self._slots: Slots

    def open(self, reserve: Callable[[int], Space], slots: Slots) -> None:
        """Take host addresses with `reserve`, which gets a number of bytes; `slots` are the machine's.

        ConfigError when there are not enough.
        """
        try:
            self._space, self._slots = reserve(self.size), slots
        except OSError as error:
            raise ConfigError(
                f"{self._name}: no room for {self.size:#x} bytes of shared memory: {error}; raise ulimit -v"
            ) from None

    @property
    def is_open(self) -> bool:
        """Whether things can be mapped."""
        return self._space is not None

    def close(self) -> None:
        """Take everything away from the guest, and give the addresses back; harmless when repeated."""
        with self._lock:
            self._hide_all()
            self._pieces.clear()
            space, self._space = self._space, None
        if space is not None:
            space.close()

    def read(self, offset: int, width: int) -> int:
        """Nothing is mapped here."""
        return 0

    def write(self, offset: int, width: int, value: int) -> None:
        """Nothing is mapped here, or nothing that can be written."""

    # -- mappings --------------------------------------------------------------------------
    def map(self, shmid: int, offset: int, fd: int, fd_offset: int, length: int, writable: bool) -> None:
        """Show part of a file at `offset` of a region, where nothing is.  OSError when the host refuses."""
        start = self.regions[shmid][0] + offset
        piece = Piece(length, writable)
        with self._lock:
            if self._space is None:
                raise OSError("the machine ends")
            self._space.map(start, fd, fd_offset, length, writable)
            try:
                self._show(start, piece)
            except OSError:
                self._space.unmap(start, length)
                raise
            self._pieces[start] = piece

    def unmap(self, shmid: int, offset: int) -> None:
        """Take away the mapping that begins at `offset` of a region."""
        start = self.regions[shmid][0] + offset
        with self._lock:
            piece = self._pieces.pop(start, None)
            if piece is not None and self._space is not None:
                self._hide(piece)
                self._space.unmap(start, piece.length)

    def intact(self, shmid: int, offset: int) -> bool:
        """Whether the mapping that begins at `offset` of a region still has memory behind all of it."""
        start = self.regions[shmid][0] + offset
        with self._lock:
            piece = self._pieces.get(start)
            return piece is None or self._space is None or self._space.intact(start, piece.length)

    def moved(self, address: int | None) -> None:
        """The guest sees the BAR at `address` now, or nowhere."""
        with self._lock:
            self._hide_all()
            self._base = address
            for start, piece in self._pieces.items():
                try:
                    self._show(start, piece)
                except OSError as error:
                    log.once((self._name, "slots"), f"{self._name}: shared memory reads zeros: {error}")

    # -- slots -----------------------------------------------------------------------------
    def _show(self, start: int, piece: Piece) -> None:
        if self._base is not None and self._space is not None:
            host = self._space.address + start
            piece.slot = self._slots.add(self._base + start, piece.length, host, readonly=not piece.writable)

    def _hide(self, piece: Piece) -> None:
        if piece.slot is not None:
            self._slots.remove(piece.slot)
            piece.slot = None

    def _hide_all(self) -> None:
        for piece in self._pieces.values():
            self._hide(piece)


def place(sizes: Sequence[tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Offset and size of each shared memory region in its BAR, by id; each naturally aligned."""
    placed = {}
    end = 0
    for shmid, size in sorted(sizes, key=lambda region: -region[1]):
        align = 1 << max(size - 1, PAGE - 1).bit_length()
        start = -(-end // align) * align
        placed[shmid] = (start, size)
        end = start + size
    return placed
