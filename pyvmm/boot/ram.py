"""Guest RAM as the loader sees it: guest addresses over one flat buffer, and the memory map.

It owns the translation of a guest-physical address to a place in the RAM buffer and the
map that every boot protocol hands to the guest.  It does not know what is placed there.
"""

from __future__ import annotations

import errno
import os

from .. import layout
from ..errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..layout import RamRange

# E820 types (ACPI 6.4, table 15.4); hvm_start_info uses the same numbers.
E820_RAM, E820_RESERVED = 1, 2


class GuestRam:
    """All guest RAM: `view` is the RAM file's bytes, `ranges` say where they appear.

    `fd` is the RAM file, -1 when there is none.
    """

    def __init__(self, view: memoryview, ranges: Sequence[RamRange], fd: int = -1) -> None:
        self.view = view
        self.ranges = tuple(ranges)
        self._fd = fd

    def window(self, address: int, size: int) -> memoryview | None:
        """`size` bytes at a guest address, or None unless all of them are one run of RAM."""
        start = self._place(address, size)
        return None if start is None else self.view[start : start + size]

    def read(self, address: int, size: int) -> bytes | None:
        """A copy of `size` bytes at a guest address, or None where that is not RAM."""
        window = self.window(address, size)
        return None if window is None else bytes(window)

    def write(self, address: int, data: bytes) -> None:
        """Put `data` at a guest address that must be RAM; layout.py's addresses all are."""
        window = self.window(address, len(data))
        if window is None:
            raise ValueError(f"{len(data)} bytes at {address:#x} are not in guest RAM")
        window[:] = data

    def fill(self, address: int, size: int, file: int, offset: int, name: str) -> None:
        """Copy `size` bytes of `file` from `offset` to a guest address that must be RAM.

        A shorter file is a ConfigError that begins with `name`.
        """
        place = self._place(address, size)
        if place is None:
            raise ValueError(f"{size} bytes at {address:#x} are not in guest RAM")
        done = 0
        while done < size:
            count = self._copy(place + done, size - done, file, offset + done)
            if count == 0:
                raise ConfigError(f"{name}: the file ended while it was read; is something writing it?")
            done += count

    def _copy(self, place: int, size: int, file: int, offset: int) -> int:
        """Written to the RAM file, fresh pages are neither cleared nor mapped: half the time."""
        if self._fd >= 0:
            try:
                os.lseek(self._fd, place, os.SEEK_SET)
                return os.sendfile(self._fd, file, offset, size)
            except OSError as error:
                if error.errno != errno.EINVAL:  # huge pages cannot be written, some files not spliced
                    raise
                self._fd = -1
        return os.preadv(file, [self.view[place : place + size]], offset)

    def _place(self, address: int, size: int) -> int | None:
        """Where in the RAM file a run of guest addresses lies; None unless all of it is RAM."""
        for run in self.ranges:
            if run.address <= address and address + size <= run.end:
                return run.offset + address - run.address
        return None

    @property
    def low_top(self) -> int:
        """First address after the RAM that starts at address 0."""
        return self.ranges[0].end


def memory_map(ranges: Sequence[RamRange]) -> tuple[tuple[int, int, int], ...]:
    """(address, size, E820 type) of every run that the guest must know, ascending.

    The ECAM window is listed as reserved since Linux looks there before it has the ACPI
    namespace, and otherwise refuses extended configuration space until late in its boot
    (pci_mmcfg_reserved in arch/x86/pci/mmconfig-shared.c).
    """
    low = ranges[0]
    rows = [
        (0, layout.LOW_RAM_TOP, E820_RAM),
        (layout.LOW_RAM_TOP, 0xA_0000 - layout.LOW_RAM_TOP, E820_RESERVED),
        (layout.ACPI_TABLES, layout.ACPI_TABLES_END - layout.ACPI_TABLES, E820_RESERVED),
        (layout.HIMEM, low.end - layout.HIMEM, E820_RAM),
        (layout.ECAM_BASE, layout.ECAM_SIZE, E820_RESERVED),
    ]
    rows += [(run.address, run.size, E820_RAM) for run in ranges[1:]]
    return tuple(rows)
