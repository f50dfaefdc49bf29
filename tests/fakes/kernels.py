"""Kernel files made of a few bytes: ELF executables and bzImages with any part out of order."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from struct import pack, pack_into

import lz4.block
import zstandard

ENTRY = 0x10_0000
PVH_ENTRY = 0x10_0040
CODE = bytes(range(256)) * 4


def note(owner: bytes, kind: int, desc: bytes, align: int = 4) -> bytes:
    """One ELF note."""
    data = pack("<III", len(owner), len(desc), kind) + owner
    data += bytes(-len(data) % align) + desc
    return data + bytes(-len(data) % align)


def pvh_note(entry: int = PVH_ENTRY, width: int = 8) -> bytes:
    return note(b"Linux\0", 0x101, b"\0") + note(b"Xen\0", 18, entry.to_bytes(width, "little"))


def elf(
    segments: list[tuple[int, bytes, int]] | None = None,
    notes: bytes = b"",
    *,
    entry: int = ENTRY,
    bits: int = 64,
    machine: int | None = None,
    kind: int = 2,
    symbols: list[tuple[str, int, int]] | None = None,
) -> bytes:
    """An ELF executable of (guest address, contents, bytes in memory) segments.

    `symbols` are (name, address, size), all of them functions.
    """
    segments = [(ENTRY, CODE, 0x2000)] if segments is None else segments
    machine = (62 if bits == 64 else 3) if machine is None else machine
    rows = [(1, *segment) for segment in segments] + ([(4, 0, notes, len(notes))] if notes else [])
    ehsize, phsize = (64, 56) if bits == 64 else (52, 32)
    body = bytearray()
    table = b""
    for p_type, paddr, data, memsz in rows:
        offset = 0x1000 + len(body)
        body += data
        if bits == 64:
            table += pack("<IIQQQQQQ", p_type, 5, offset, paddr, paddr, len(data), memsz, 4)
        else:
            table += pack("<IIIIIIII", p_type, offset, paddr, paddr, len(data), memsz, 5, 4)
    sections, shoff, count = b"", 0, 0
    if symbols is not None:
        sections, shoff, count = _sections(symbols, 0x1000 + len(body))
    ident = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1, 1]) + bytes(9)
    shape = "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH"
    header = ident + pack(
        shape, kind, machine, 1, entry, ehsize, shoff, 0, ehsize, phsize, len(rows), 64, count, 0
    )
    return (header + table).ljust(0x1000, b"\0") + bytes(body) + sections


def _sections(symbols: list[tuple[str, int, int]], at: int) -> tuple[bytes, int, int]:
    names, table = bytearray(b"\0"), bytearray(24)
    for name, address, size in symbols:
        table += pack("<IBBHQQ", len(names), 2, 0, 1, address, size)
        names += name.encode() + b"\0"
    data = bytes(table) + bytes(names)
    headers = bytes(64)
    headers += pack("<IIQQQQIIQQ", 0, 2, 0, 0, at, len(table), 2, 1, 8, 24)
    headers += pack("<IIQQQQIIQQ", 0, 3, 0, 0, at + len(table), len(names), 0, 0, 1, 0)
    return data + headers, at + len(data), 3


def lz4_legacy(data: bytes) -> bytes:
    """What `lz4 -l` writes."""
    step = 8 << 20
    blocks = (lz4.block.compress(data[at : at + step], store_size=False) for at in range(0, len(data), step))
    return b"\x02\x21\x4c\x18" + b"".join(pack("<I", len(block)) + block for block in blocks)


def xz_as_linux(data: bytes) -> bytes:
    """What scripts/xz_wrap.sh makes: the x86 branch filter and CRC32."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}]
    return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters)


def zstd_as_linux(data: bytes) -> bytes:
    """A frame without content size, but with a checksum, as `cat | zstd` makes it."""
    return zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress(data)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": xz_as_linux,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "lz4": lz4_legacy,
    "zstd": zstd_as_linux,
}


def payload(data: bytes, compression: str) -> bytes:
    """A payload as the kernel build makes it: all but gzip are followed by the unpacked size."""
    packed = COMPRESSORS[compression](data)
    return packed if compression == "gzip" else packed + pack("<I", len(data))


def bzimage(
    compressed: bytes,
    *,
    version: int = 0x020F,
    xloadflags: int = 1,
    pref_address: int = 0x100_0000,
    init_size: int = 0x20_0000,
    relocatable: int = 1,
    alignment: int = 0x20_0000,
    initrd_max: int = 0x7FFF_FFFF,
) -> bytes:
    """A bzImage with one setup sector more than the boot sector and a stub of 0x400 bytes."""
    sectors = 7
    head = bytearray((sectors + 1) * 512)
    stub = b"\xf4" * 0x400
    code = stub + compressed
    code += bytes(-len(code) % 16)
    head[0x1F1] = sectors
    pack_into("<I", head, 0x1F4, len(code) // 16)
    pack_into("<HH4sH", head, 0x1FE, 0xAA55, 0x66EB, b"HdrS", version)
    head[0x201] = 0x6A
    pack_into("<IIB", head, 0x22C, initrd_max, alignment, relocatable)
    pack_into("<H", head, 0x236, xloadflags)
    pack_into("<II", head, 0x248, len(stub), len(compressed))
    pack_into("<QI", head, 0x258, pref_address, init_size)
    return bytes(head) + code
