"""A small AML assembler: each function returns the bytes of one term.

It owns the encodings of ACPI 6.4 chapter 20 (AML) and section 6.4 (resource descriptors)
that the DSDT needs; names are ASL's, in lower case.  It does not know what is described.
"""

from __future__ import annotations

from struct import pack

ARG0, ARG3 = b"\x68", b"\x6b"
ONES = b"\xff"
MEMORY, IO, BUS = 0, 1, 2  # resource types of address space descriptors
_PRODUCER_FIXED = 0x0C  # ResourceProducer, PosDecode, MinFixed, MaxFixed
_TYPE_FLAGS = {MEMORY: 0x01, IO: 0x03, BUS: 0x00}  # read-write uncached; entire range; none
_ADDRESS_SPACE = {2: (0x88, "<5H"), 4: (0x87, "<5I"), 8: (0x8A, "<5Q")}  # tag and fields by width


def integer(value: int) -> bytes:
    """The shortest constant for `value` (20.2.3)."""
    if value < 2:
        return bytes([value])
    for prefix, width in ((0x0A, 1), (0x0B, 2), (0x0C, 4)):
        if value < 1 << 8 * width:
            return bytes([prefix]) + value.to_bytes(width, "little")
    return b"\x0e" + value.to_bytes(8, "little")


def string(text: str) -> bytes:
    """A string constant."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def path(text: str) -> bytes:
    r"""A name path such as ``\_SB.PCI0`` or ``CDW1`` (20.2.2); short names are padded with ``_``."""
    root = b"\\" if text.startswith("\\") else b""
    names = [name.ljust(4, "_").encode("ascii") for name in text.lstrip("\\").split(".")]
    if any(len(name) != 4 for name in names):
        raise ValueError(f"{text}: a name has at most four characters")
    if len(names) == 1:
        return root + names[0]
    prefix = b"\x2e" if len(names) == 2 else bytes([0x2F, len(names)])
    return root + prefix + b"".join(names)


def package_length(size: int) -> bytes:
    """PkgLength of a package whose other bytes are `size` long; it counts itself (20.2.4)."""
    if size + 1 < 1 << 6:
        return bytes([size + 1])
    for extra in (1, 2, 3):
        total = size + 1 + extra
        if total < 1 << 4 + 8 * extra:
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"a package of {size} bytes is too long for AML")


def _packaged(opcode: bytes, body: bytes) -> bytes:
    return opcode + package_length(len(body)) + body


def scope(where: str, *terms: bytes) -> bytes:
    """Scope (where) { terms }."""
    return _packaged(b"\x10", path(where) + b"".join(terms))


def device(name: str, *terms: bytes) -> bytes:
    """Device (name) { terms }."""
    return _packaged(b"\x5b\x82", path(name) + b"".join(terms))


def name(what: str, value: bytes) -> bytes:
    """Name (what, value)."""
    return b"\x08" + path(what) + value


def method(what: str, arguments: int, *terms: bytes) -> bytes:
    """Method (what, arguments, Serialized) { terms }; serialised since it may create names."""
    return _packaged(b"\x14", path(what) + bytes([arguments | 1 << 3]) + b"".join(terms))


def package(*elements: bytes) -> bytes:
    """Package () { elements }, at most 255."""
    return _packaged(b"\x12", bytes([len(elements)]) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    """Buffer () { data }."""
    return _packaged(b"\x11", integer(len(data)) + data)


def if_(condition: bytes, *terms: bytes) -> bytes:
    """If (condition) { terms }."""
    return _packaged(b"\xa0", condition + b"".join(terms))


def else_(*terms: bytes) -> bytes:
    """Else { terms }, right after an If."""
    return _packaged(b"\xa1", b"".join(terms))


def equal(left: bytes, right: bytes) -> bytes:
    """LEqual (left, right)."""
    return b"\x93" + left + right


def or_(left: bytes, right: bytes, target: bytes) -> bytes:
    """Or (left, right, target)."""
    return b"\x7d" + left + right + target


def create_dword_field(source: bytes, offset: int, what: str) -> bytes:
    """CreateDWordField (source, offset, what); the offset is in bytes."""
    return b"\x8a" + source + integer(offset) + path(what)


def return_(value: bytes) -> bytes:
    """Return (value)."""
    return b"\xa4" + value


def eisa_id(text: str) -> bytes:
    """EisaId ("PNP0A08"): three letters of five bits each and four hexadecimal digits, big-endian."""
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    return integer(int.from_bytes(pack(">HH", letters, int(text[3:], 16)), "little"))


def uuid(text: str) -> bytes:
    """ToUUID (text): a buffer whose first three fields are little-endian (19.6.142)."""
    first, second, third, fourth, fifth = (bytes.fromhex(part) for part in text.split("-"))
    return buffer(first[::-1] + second[::-1] + third[::-1] + fourth + fifth)


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate () { descriptors }; a zero checksum in the end tag means unchecked."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io(base: int, size: int) -> bytes:
    """IO (Decode16, ...) of fixed ports (6.4.2.5)."""
    return pack("<BBHHBB", 0x47, 1, base, base, 1, size)


def memory32_fixed(base: int, size: int) -> bytes:
    """Memory32Fixed (ReadWrite, ...) (6.4.3.4)."""
    return pack("<BHBII", 0x86, 9, 1, base, size)


def interrupt_edge_high(gsi: int) -> bytes:
    """Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) { gsi } (6.4.3.6)."""
    return pack("<BHBBI", 0x89, 6, 0x03, 1, gsi)


def window(kind: int, base: int, size: int, width: int) -> bytes:
    """WordBusNumber, WordIO, DWordMemory or QWordMemory that a bridge passes on (6.4.3.5).

    `width` is that of the fields in bytes: 2, 4 or 8.
    """
    tag, fields = _ADDRESS_SPACE[width]
    body = pack(fields, 0, base, base + size - 1, 0, size)
    return pack("<BHBBB", tag, 3 + len(body), kind, _PRODUCER_FIXED, _TYPE_FLAGS[kind]) + body
