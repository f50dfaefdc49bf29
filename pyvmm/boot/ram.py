"""Guest RAM as the loader sees it: guest addresses over one flat buffer, and the memory map.

It owns the translation of a guest-physical address to a place in the RAM buffer and the
map that every boot protocol hands to the guest.  It does not know what is placed there.
"""

from __future__ import annotations

from .. import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..layout import RamRange

# E820 types (ACPI 6.4, table 15.4); hvm_start_info uses the same numbers.
E820_RAM, E820_RESERVED = 1, 2


class GuestRam:
    """All guest RAM: `view` is the RAM file's bytes, `ranges` say where they appear."""

    def __init__(self, view: memoryview, ranges: Sequence[RamRange]) -> None:
        self.view = view
        self.ranges = tuple(ranges)

    def window(self, address: int, size: int) -> memoryview | None:
        """`size` bytes at a guest address, or None unless all of them are one run of RAM."""
        for run in self.ranges:
            if run.address <= address and address + size <= run.end:
                start = run.offset + address - run.address
                return self.view[start : start + size]
        return None

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
