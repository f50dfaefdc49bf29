"""ELF executables: program headers, the PVH note, and loading segments into guest RAM.

It owns the ELF format (System V gABI chapters 4 and 5) as far as booting needs it.  File
contents go from the file straight into guest RAM.  It does not know boot protocols.
"""

from __future__ import annotations

import os
from struct import Struct, unpack_from

from ..errors import ConfigError
from ..record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .ram import GuestRam

EM_386, EM_X86_64 = 3, 62
ET_EXEC, ET_DYN = 2, 3
PT_LOAD, PT_NOTE = 1, 4
XEN_ELFNOTE_PHYS32_ENTRY = 18  # xen/include/public/elfnote.h
_MACHINES = {
    2: "SPARC", 8: "MIPS", 20: "PowerPC", 21: "PowerPC64", 22: "s390", 40: "ARM", 50: "IA-64",
    183: "AArch64", 243: "RISC-V", 258: "LoongArch",
}  # fmt: skip

# By ELFCLASS: e_entry e_phoff e_shoff e_flags e_ehsize e_phentsize e_phnum, then one program
# header, whose fields stand in another order in each class.
_EHDR = {1: Struct("<24xIIIIHHH"), 2: Struct("<24xQQQIHHH")}
_PHDR = {1: Struct("<8I"), 2: Struct("<2I6Q")}
_ORDER = {1: (0, 1, 3, 4, 5, 7), 2: (0, 2, 4, 5, 6, 7)}  # type offset paddr filesz memsz align
_MACHINE_OF_CLASS = {1: EM_386, 2: EM_X86_64}
_MAX_NOTES = 1 << 20


class Segment(Record):
    """One program header: where in the file, where in guest-physical memory; bytes."""

    type: int
    offset: int
    paddr: int
    filesz: int
    memsz: int
    align: int

    @property
    def end(self) -> int:
        """First guest address after the segment in memory."""
        return self.paddr + self.memsz


class Elf(Record):
    """A parsed executable.  `pvh_entry` is None when no note names one; `bits` is 32 or 64."""

    entry: int
    bits: int
    loads: tuple[Segment, ...]
    pvh_entry: int | None = None

    @property
    def start(self) -> int:
        """Lowest guest address that a segment occupies."""
        return min(segment.paddr for segment in self.loads)

    @property
    def end(self) -> int:
        """First guest address after all segments, BSS included."""
        return max(segment.end for segment in self.loads)


def parse(fd: int, name: str) -> Elf:
    """Read headers and notes of the ELF file `fd`; `name` is for messages.  Raises ConfigError."""
    size = os.fstat(fd).st_size
    header = os.pread(fd, 64, 0)
    elf_class = _check_header(header, name)
    entry, phoff, _, _, _, phentsize, phnum = _EHDR[elf_class].unpack_from(header)
    shape = _PHDR[elf_class]
    table = os.pread(fd, shape.size * phnum, min(phoff, size))
    if phentsize != shape.size or len(table) < shape.size * phnum:
        raise _broken(name, "its program headers are cut off or malformed")
    segments = []
    for fields in shape.iter_unpack(table):
        segment = Segment(*(fields[index] for index in _ORDER[elf_class]))
        if segment.type in (PT_LOAD, PT_NOTE) and segment.offset + segment.filesz > size:
            raise _broken(name, f"a segment ends at byte {segment.offset + segment.filesz} of {size}")
        segments.append(segment)
    loads = tuple(s for s in segments if s.type == PT_LOAD and s.memsz)
    if not loads:
        raise ConfigError(f"kernel {name}: the ELF file has nothing to load; a vmlinux executable is needed")
    return Elf(entry, 32 * elf_class, loads, _pvh_entry(fd, segments))


def load(fd: int, elf: Elf, ram: GuestRam, lowest: int, name: str) -> None:
    """Read all segments into `ram`, none of which may begin below `lowest`.

    The rest of each segment (BSS) must be zero and is, since guest RAM is fresh.  Raises ConfigError.
    """
    for segment in elf.loads:
        _check_place(segment, ram, lowest, name)
        ram.fill(segment.paddr, segment.filesz, fd, segment.offset, name)


def _check_header(header: bytes, name: str) -> int:
    """Return the ELFCLASS of a header that an x86 machine can run."""
    if len(header) < 64 or header[:4] != b"\x7fELF":
        raise _broken(name, "the ELF header is cut off")
    elf_class, endian = header[4], header[5]
    kind, machine = unpack_from("<HH" if endian != 2 else ">HH", header, 16)
    if machine not in (EM_386, EM_X86_64) or endian != 1:
        told = _MACHINES.get(machine, f"machine {machine}")
        raise ConfigError(f"kernel {name}: is for {told}; this host needs one for x86-64")
    if _MACHINE_OF_CLASS.get(elf_class) != machine:
        raise _broken(name, "ELF class and machine do not fit each other")
    if kind not in (ET_EXEC, ET_DYN):
        raise ConfigError(
            f"kernel {name}: ELF type {kind} is no executable; vmlinux itself is needed, not a part of it"
        )
    return elf_class


def _check_place(segment: Segment, ram: GuestRam, lowest: int, name: str) -> None:
    if segment.filesz > segment.memsz:
        raise _broken(name, "a segment is larger in the file than in memory")
    if segment.paddr < lowest:
        raise ConfigError(
            f"kernel {name}: wants to lie at {segment.paddr:#x}; below {lowest:#x} are boot data and tables"
        )
    if ram.window(segment.paddr, segment.memsz) is None:
        raise does_not_fit(name, segment.end, ram)


def does_not_fit(name: str, end: int, ram: GuestRam) -> ConfigError:
    """The error for a kernel that needs RAM up to `end`."""
    return ConfigError(
        f"kernel {name}: needs RAM up to {end:#x}, but RAM ends at {ram.low_top:#x}; "
        f"give at least --memory size={-(-end >> 20) + 16}M"
        if ram.low_top < end < 1 << 31
        else f"kernel {name}: wants memory up to {end:#x}, where no RAM can be"
    )


def _pvh_entry(fd: int, segments: list[Segment]) -> int | None:
    for segment in segments:
        if segment.type == PT_NOTE and segment.filesz <= _MAX_NOTES:
            data = os.pread(fd, segment.filesz, segment.offset)
            for owner, kind, desc in notes(data, 8 if segment.align == 8 else 4):
                if owner == b"Xen" and kind == XEN_ELFNOTE_PHYS32_ENTRY and len(desc) in (4, 8):
                    return int.from_bytes(desc, "little")
    return None


def notes(data: bytes, align: int) -> Iterator[tuple[bytes, int, bytes]]:
    """Owner, type and descriptor of each note (gABI, Note Section); stops where they make no sense."""
    at = 0
    while at + 12 <= len(data):
        namesz, descsz, kind = unpack_from("<III", data, at)
        name_at = at + 12
        desc_at = -(-(name_at + namesz) // align) * align
        if desc_at + descsz > len(data):
            return
        yield data[name_at : name_at + namesz].rstrip(b"\0"), kind, data[desc_at : desc_at + descsz]
        at = -(-(desc_at + descsz) // align) * align


def _broken(name: str, why: str) -> ConfigError:
    return ConfigError(f"kernel {name}: {why}; is the file complete?")
