"""Names for kernel addresses, for messages about guests that crashed.

It owns reading a vmlinux's symbol table and System.map.  Only the crash path uses it, so
it may take its time; whatever it cannot read is simply unnamed.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from struct import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from .cpu import BootState

KERNEL_MAP = 0xFFFF_FFFF_8000_0000  # __START_KERNEL_map: where Linux maps physical address 0
_KERNEL_MAP_SIZE = 1 << 30
_SHT_SYMTAB = 2
_STT_NOTYPE, _STT_FUNC = 0, 2
_SHDR, _SYM = Struct("<IIQQQQIIQQ"), Struct("<IBBHQQ")
_MAX_TABLE = 256 << 20


class Symbols:
    """A sorted table of (address, name).  An empty one names nothing."""

    def __init__(self, pairs: Iterable[tuple[int, str]] = ()) -> None:
        table = sorted(pairs)
        self._addresses = [address for address, _ in table]
        self._names = [name for _, name in table]

    def __len__(self) -> int:
        return len(self._names)

    def name(self, address: int) -> str:
        """``name+0xoffset/0xsize`` as Linux prints it, or an empty text.

        Size is the distance to the next symbol.  A physical address in the kernel's own
        mapping, where it runs before paging is on, is named as if it were mapped.
        """
        found = self._find(address)
        if not found and address < _KERNEL_MAP_SIZE:
            found = self._find(address + KERNEL_MAP)
        return found

    def _find(self, address: int) -> str:
        index = bisect_right(self._addresses, address)
        if index == 0 or index == len(self._addresses):
            return ""  # outside of the kernel; after the last symbol anything could be
        start, end = self._addresses[index - 1], self._addresses[index]
        return f"{self._names[index - 1]}+{address - start:#x}/{end - start:#x}"


def find(kernel: str, boot: BootState) -> Symbols:
    """The symbols for a kernel that `load` started from the file `kernel`.

    From the ELF file that was loaded, or System.map beside the kernel under its usual names.
    A bzImage that unpacked itself has none, since it may have moved itself (KASLR).
    """
    if not boot.vmlinux and boot.protocol != "pvh":
        return Symbols()
    for read, path in ((from_elf, boot.vmlinux), *((from_system_map, path) for path in _map_paths(kernel))):
        try:
            symbols = read(path)
        except (OSError, ValueError, ArithmeticError):
            continue
        if symbols:
            return symbols
    return Symbols()


def from_elf(path: str) -> Symbols:
    """Functions and labels of a 64-bit ELF file's symbol table; empty when it is stripped."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = os.pread(fd, 64, 0)
        if header[:5] != b"\x7fELF\x02":
            return Symbols()
        at, count = int.from_bytes(header[40:48], "little"), int.from_bytes(header[60:62], "little")
        table = os.pread(fd, _SHDR.size * count, at)
        sections = [_SHDR.unpack_from(table, offset) for offset in range(0, len(table) - 63, _SHDR.size)]
        for section in sections:
            if section[1] == _SHT_SYMTAB and section[6] < len(sections):
                return Symbols(_symbols(_contents(fd, section), _contents(fd, sections[section[6]])))
    finally:
        os.close(fd)
    return Symbols()


def from_system_map(path: str) -> Symbols:
    """The text symbols of a System.map: lines of address, type letter, name."""
    pairs = []
    with open(path, "rb") as lines:
        for line in lines:
            address, kind, name = line.split(None, 2)
            if kind in b"tTwW":
                pairs.append((int(address, 16), name.strip().decode("ascii", "replace")))
    return Symbols(pairs)


def _contents(fd: int, section: tuple[int, ...]) -> bytes:
    return os.pread(fd, min(section[5], _MAX_TABLE), section[4])


def _symbols(table: bytes, names: bytes) -> Iterable[tuple[int, str]]:
    for name, info, _, shndx, value, _ in _SYM.iter_unpack(table[: len(table) // _SYM.size * _SYM.size]):
        if value and shndx and info & 0xF in (_STT_NOTYPE, _STT_FUNC):
            yield value, names[name : names.find(b"\0", name)].decode("ascii", "replace")


def _map_paths(kernel: str) -> list[str]:
    """Where distributions and kernel builds leave System.map, seen from the kernel."""
    directory, name = os.path.split(kernel)
    prefix, _, version = name.partition("-")
    paths = [os.path.join(directory, f"System.map-{version}")] if version and prefix else []
    return [*paths, os.path.join(directory, "System.map")]
