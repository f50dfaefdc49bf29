"""Guest-virtual addresses: walk the guest's page tables as its CPU would.

It owns the formats of x86 page tables (Intel SDM volume 3, chapter 4) for reading.  It needs
control registers and a way to read guest-physical memory, and knows nothing else of the guest.
"""

from __future__ import annotations

from ..record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    Read = Callable[[int, int], bytes | None]

_CR0_PG, _CR4_PAE, _CR4_LA57, _EFER_LMA = 1 << 31, 1 << 5, 1 << 12, 1 << 10
_PRESENT, _LARGE = 1 << 0, 1 << 7
_ADDRESS = (1 << 52) - 1
_PAGE = 4096


class Mode(Record):
    """A paging mode: bytes an entry, index bits from the top level down."""

    entry: int
    levels: tuple[int, ...]


_LONG = Mode(8, (9, 9, 9, 9))
_LA57 = Mode(8, (9, 9, 9, 9, 9))
_PAE = Mode(8, (2, 9, 9))
_LEGACY = Mode(4, (10, 10))


def translate(address: int, sregs: Mapping[str, Any], read: Read) -> int | None:
    """Guest-physical address behind a linear one, or None where nothing is mapped.

    `sregs` has cr0, cr3, cr4 and efer; `read(address, size)` gives guest-physical bytes or None.
    """
    if not sregs["cr0"] & _CR0_PG:
        return address
    mode = _mode(sregs)
    table: int = sregs["cr3"] & _ADDRESS & (~0x1F if mode is _PAE else ~(_PAGE - 1))
    shift = 12 + sum(mode.levels)
    for bits in mode.levels:
        shift -= bits
        index = address >> shift & (1 << bits) - 1
        data = read(table + index * mode.entry, mode.entry)
        entry = int.from_bytes(data or b"", "little")
        if not entry & _PRESENT:
            return None
        table = entry & _ADDRESS & -_PAGE
        if shift > 12 and entry & _LARGE:  # reserved, so never set, where no page can be
            break
    offset = (1 << shift) - 1
    return table & ~offset | address & offset


def read_linear(address: int, size: int, sregs: Mapping[str, Any], read: Read) -> bytes:
    """Up to `size` bytes at a linear address: fewer where a page is not mapped."""
    found = b""
    while len(found) < size:
        at = address + len(found)
        step = min(size - len(found), _PAGE - at % _PAGE)
        place = translate(at, sregs, read)
        piece = None if place is None else read(place, step)
        if piece is None:
            break
        found += piece
    return found


def _mode(sregs: Mapping[str, Any]) -> Mode:
    if sregs["efer"] & _EFER_LMA:
        return _LA57 if sregs["cr4"] & _CR4_LA57 else _LONG
    return _PAE if sregs["cr4"] & _CR4_PAE else _LEGACY
