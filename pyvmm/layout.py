"""The guest-physical memory map: where RAM, windows, tables and registers lie.

Every fixed guest address has its name here and nowhere else.  Sizes and addresses
are bytes.  This module does not know what is put at the addresses.
"""

from __future__ import annotations

from .record import Record

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE_SIZE = 4 * KIB

# -- below 1 MiB: what the boot protocols and ACPI need ----------------------------
BOOT_GDT = 0x500
PVH_INFO = 0x6000  # struct hvm_start_info, its memory map and module list
ZERO_PAGE = 0x7000  # struct boot_params (Linux Documentation/arch/x86/zero-page.rst)
BOOT_STACK = 0x8FF0
BOOT_PML4 = 0x9000  # PML4, PDPT and four page directories: 0x9000..0xEFFF
CMDLINE = 0x2_0000
LOW_RAM_TOP = 0x9_FC00  # where a BIOS would put its EBDA; RAM ends here for the guest
ACPI_TABLES = 0xE_0000  # RSDP first; reserved in the memory map up to 1 MiB
ACPI_TABLES_END = 0x10_0000
HIMEM = 0x10_0000  # kernels are loaded from here up

# -- the 32-bit hole ---------------------------------------------------------------
RAM_HOLE = 3 * GIB  # RAM below 4 GiB ends here at the latest
MMIO32_BASE, MMIO32_SIZE = 0xC000_0000, 0x2000_0000
ECAM_BASE, ECAM_SIZE = 0xE000_0000, 1 * MIB  # one bus
IOAPIC_BASE = 0xFEC0_0000
LAPIC_BASE = 0xFEE0_0000
KVM_IDENTITY_MAP = 0xFFFB_C000
KVM_TSS = 0xFFFB_D000  # three pages
HIGH_RAM = 4 * GIB

# -- above RAM ---------------------------------------------------------------------
MMIO64_SIZE = 64 * GIB
MMIO64_ALIGN = 4 * GIB

# -- ports -------------------------------------------------------------------------
PORT_COM1, IRQ_COM1 = 0x3F8, 4
PORT_PCI_ADDRESS, PORT_PCI_DATA = 0xCF8, 0xCFC
PORT_SLEEP, PORT_RESET = 0x600, 0x604  # ACPI sleep control / status, reset register
PCI_INTX_IRQS = (16, 17, 18, 19)  # IOAPIC pins of INTA..INTD after swizzling
GSI_COUNT = 24  # IOAPIC pins; MSI routes are numbered from here up


class RamRange(Record):
    """One run of guest RAM: guest address, size, and its offset in the RAM file."""

    address: int
    size: int
    offset: int

    @property
    def end(self) -> int:
        """First address after the range."""
        return self.address + self.size


def ram_ranges(size: int) -> tuple[RamRange, ...]:
    """Split `size` bytes of RAM around the 32-bit hole."""
    low = min(size, RAM_HOLE)
    ranges = [RamRange(0, low, 0)]
    if size > low:
        ranges.append(RamRange(HIGH_RAM, size - low, low))
    return tuple(ranges)


def mmio64_base(ram_size: int) -> int:
    """First address of the 64-bit PCI window: above all RAM."""
    top = max(ram_ranges(ram_size)[-1].end, HIGH_RAM)
    return -(-top // MMIO64_ALIGN) * MMIO64_ALIGN
