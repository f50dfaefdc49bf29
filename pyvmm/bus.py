"""An address bus: which device answers at which guest address.

It owns the table of occupied ranges of one address space (memory-mapped or port I/O)
and hands every access to the device there.  Devices get offsets into their own range
and never learn where it lies.  It must not know what a device is: anything with `read`
and `write` will do.

The table is replaced as a whole when it changes, so that virtual CPUs look addresses up
without a lock while another one moves a BAR.  A device serialises its own state.
"""

from __future__ import annotations

from _bisect import bisect_right  # not `bisect`: only its C half is needed
from _thread import allocate_lock as Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Protocol

    class BusDevice(Protocol):
        """What a bus needs of a device; widths are bytes (1, 2, 4 or 8), values unsigned."""

        def read(self, offset: int, width: int) -> int: ...
        def write(self, offset: int, width: int, value: int) -> None: ...

    Read = Callable[[int, int], int]
    Write = Callable[[int, int, int], None]
    Entry = tuple[int, int, Read, Write, str]  # first address, first address after, handlers, name


class BusConflict(ValueError):
    """The range asked for is empty, or something else is there already."""


class Bus:
    """One address space.  Reads where nothing answers give all ones, writes there are lost."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = Lock()
        self._table: tuple[list[int], list[Entry]] = ([], [])

    def insert(self, base: int, size: int, device: BusDevice, name: str) -> None:
        """Let `device` answer at `base` .. `base + size - 1`.

        Raises `BusConflict` when the range is empty or touches another device's.
        """
        with self._lock:
            bases, entries = self._table
            index = bisect_right(bases, base)
            self._check_free(base, size, name, entries[max(index - 1, 0) : index + 1])
            entry = (base, base + size, device.read, device.write, name)
            self._table = (
                [*bases[:index], base, *bases[index:]],
                [*entries[:index], entry, *entries[index:]],
            )

    def remove(self, base: int) -> None:
        """Take away the device whose range starts at `base`; KeyError when there is none."""
        with self._lock:
            bases, entries = self._table
            if base not in bases:
                raise KeyError(base)
            kept = [entry for entry in entries if entry[0] != base]
            self._table = ([entry[0] for entry in kept], kept)

    def read(self, address: int, width: int) -> int:
        """Value of `width` bytes at `address`."""
        bases, entries = self._table
        index = bisect_right(bases, address)
        if index:
            base, end, read, _, _ = entries[index - 1]
            if address + width <= end:
                return read(address - base, width)
        return (1 << 8 * width) - 1

    def write(self, address: int, width: int, value: int) -> None:
        """Store `width` bytes of `value` at `address`."""
        bases, entries = self._table
        index = bisect_right(bases, address)
        if index:
            base, end, _, write, _ = entries[index - 1]
            if address + width <= end:
                write(address - base, width, value)

    def ranges(self) -> Iterator[tuple[int, int, str]]:
        """Each occupied range in order: first address, size, name."""
        for base, end, _, _, name in self._table[1]:
            yield base, end - base, name

    def _check_free(self, base: int, size: int, name: str, neighbours: list[Entry]) -> None:
        if size <= 0 or base < 0:
            raise BusConflict(f"{self.name}: {name} has no range: {size:#x} bytes at {base:#x}")
        for first, end, _, _, other in neighbours:
            if base < end and first < base + size:
                raise BusConflict(
                    f"{self.name}: {name} at {base:#x}..{base + size - 1:#x} overlaps {other} "
                    f"at {first:#x}..{end - 1:#x}"
                )
