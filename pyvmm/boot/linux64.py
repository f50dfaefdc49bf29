"""Linux's 64-bit boot protocol: the zero page, and the GDT and page tables it starts with.

It owns struct boot_params (Documentation/arch/x86/zero-page.rst), the setup header in it
(Documentation/arch/x86/boot.rst) and the tables behind CR3 and GDTR.  It does not know CPU
registers (cpu.py), nor where kernel and initramfs come from.
"""

from __future__ import annotations

from struct import pack, pack_into

from .. import layout
from .ram import memory_map

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .ram import GuestRam

SETUP_HEADER = 0x1F1
# Offsets in struct boot_params.
_ACPI_RSDP_ADDR = 0x070
_EXT_RAMDISK_IMAGE, _EXT_RAMDISK_SIZE, _EXT_CMD_LINE_PTR = 0x0C0, 0x0C4, 0x0C8
_E820_ENTRIES, _E820_TABLE = 0x1E8, 0x2D0
_BOOT_FLAG, _HEADER, _VERSION = 0x1FE, 0x202, 0x206
_TYPE_OF_LOADER, _LOADFLAGS = 0x210, 0x211
_RAMDISK_IMAGE, _RAMDISK_SIZE = 0x218, 0x21C
_CMD_LINE_PTR, _KERNEL_ALIGNMENT, _CMDLINE_SIZE = 0x228, 0x230, 0x238
_LOADED_HIGH = 0x01
_UNDEFINED_LOADER = 0xFF
_PRESENT_WRITABLE, _LARGE = 0x03, 0x80
_GIB_MAPPED = 4


def default_header() -> bytes:
    """The setup header, from offset 0x1F1, of a kernel that comes as ELF and has none."""
    page = bytearray(0x268)
    pack_into("<H", page, _BOOT_FLAG, 0xAA55)
    pack_into("<4sH", page, _HEADER, b"HdrS", 0x020F)
    pack_into("<B", page, _LOADFLAGS, _LOADED_HIGH)
    pack_into("<I", page, _KERNEL_ALIGNMENT, 0x20_0000)
    pack_into("<I", page, _CMDLINE_SIZE, 2047)
    return bytes(page[SETUP_HEADER:])


def write(ram: GuestRam, header: bytes, cmdline: int, initramfs: tuple[int, int], rsdp: int) -> int:
    """Put zero page, GDT and page tables into `ram`; return the zero page's address for RSI.

    `header` is the setup header from offset 0x1F1 on; `initramfs` is (guest address, bytes).
    """
    page = bytearray(layout.PAGE_SIZE)
    page[SETUP_HEADER : SETUP_HEADER + len(header)] = header
    address, size = initramfs
    for at, width, value in (
        (_ACPI_RSDP_ADDR, "<Q", rsdp),
        (_TYPE_OF_LOADER, "<B", _UNDEFINED_LOADER),
        (_RAMDISK_IMAGE, "<I", address & 0xFFFF_FFFF),
        (_RAMDISK_SIZE, "<I", size & 0xFFFF_FFFF),
        (_EXT_RAMDISK_IMAGE, "<I", address >> 32),
        (_EXT_RAMDISK_SIZE, "<I", size >> 32),
        (_CMD_LINE_PTR, "<I", cmdline & 0xFFFF_FFFF),
        (_EXT_CMD_LINE_PTR, "<I", cmdline >> 32),
    ):
        pack_into(width, page, at, value)
    rows = memory_map(ram.ranges)
    page[_E820_ENTRIES] = len(rows)
    for index, row in enumerate(rows):
        pack_into("<QQI", page, _E820_TABLE + 20 * index, *row)
    ram.write(layout.ZERO_PAGE, bytes(page))
    ram.write(layout.BOOT_PML4, _page_tables())
    return layout.ZERO_PAGE


def _page_tables() -> bytes:
    """PML4, PDPT and four page directories: the low 4 GiB mapped to themselves by 2 MiB pages."""
    pdpt = layout.BOOT_PML4 + layout.PAGE_SIZE
    directories = [pdpt + layout.PAGE_SIZE * (1 + index) for index in range(_GIB_MAPPED)]
    tables = bytearray(layout.PAGE_SIZE * (2 + _GIB_MAPPED))
    pack_into("<Q", tables, 0, pdpt | _PRESENT_WRITABLE)
    pack_into(f"<{_GIB_MAPPED}Q", tables, layout.PAGE_SIZE, *(at | _PRESENT_WRITABLE for at in directories))
    entries = 512 * _GIB_MAPPED
    flags = _PRESENT_WRITABLE | _LARGE
    pages = pack(f"<{entries}Q", *(index << 21 | flags for index in range(entries)))
    tables[2 * layout.PAGE_SIZE :] = pages
    return bytes(tables)
