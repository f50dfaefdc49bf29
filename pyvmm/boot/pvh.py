"""The PVH boot protocol: struct hvm_start_info with its memory map and module list.

It owns the layout of the structures (xen/include/public/arch-x86/hvm/start_info.h) at
layout.PVH_INFO.  It does not know where kernel and initramfs come from.
"""

from __future__ import annotations

from struct import pack

from .. import layout
from .ram import memory_map

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .ram import GuestRam

MAGIC = 0x336E_C578  # "xEn3" with the top bit of E set
VERSION = 1  # the first version with a memory map
_MODLIST = layout.PVH_INFO + 0x40
_MEMMAP = layout.PVH_INFO + 0x80


def write(ram: GuestRam, cmdline_address: int, initramfs: tuple[int, int], rsdp: int) -> int:
    """Put the start info into `ram`; return its address, which the guest wants in EBX.

    `initramfs` is (guest address, bytes), with 0 bytes for none.
    """
    rows = memory_map(ram.ranges)
    modules = 1 if initramfs[1] else 0
    info = pack(
        "<IIIIQQQQII", MAGIC, VERSION, 0, modules, _MODLIST if modules else 0,
        cmdline_address, rsdp, _MEMMAP, len(rows), 0,
    )  # fmt: skip
    ram.write(layout.PVH_INFO, info)
    if modules:
        ram.write(_MODLIST, pack("<QQQQ", *initramfs, 0, 0))
    ram.write(_MEMMAP, b"".join(pack("<QQII", *row, 0) for row in rows))
    return layout.PVH_INFO
