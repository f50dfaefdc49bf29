"""ACPI tables of a hardware-reduced machine: RSDP, XSDT, FADT, MADT, MCFG, DSDT.

It owns the tables' layouts (ACPI 6.4 section 5.2, PCI Firmware Specification 4.1.2) and
their place at layout.ACPI_TABLES.  A hardware-reduced machine has no PM timer, no SCI, no
8259 and no CMOS clock, so the guest probes none of them.
"""

from __future__ import annotations

from struct import pack

from .. import layout
from ..legacy.power import RESET_VALUE
from . import dsdt

_RESET_CODE = 16  # bytes below 1 MiB that boot/firmware.py has
_OEM_ID, _OEM_TABLE = b"PYVMM ", b"PYVMM   "
_CREATOR, _REVISION = b"PYVM", 1
_HEADER_SIZE = 36
_SYSTEM_IO = 1

# FADT (table 5.9): offsets, boot architecture flags, feature flags.
_FADT_SIZE = 276
_DSDT, _BOOT_ARCH, _FLAGS, _RESET_REG, _RESET_VALUE = 40, 109, 112, 116, 128
_MINOR, _X_DSDT, _SLEEP_CONTROL, _SLEEP_STATUS, _HYPERVISOR = 131, 140, 244, 256, 268
VGA_NOT_PRESENT, CMOS_RTC_NOT_PRESENT = 1 << 2, 1 << 5
WBINVD, PWR_BUTTON, SLP_BUTTON, RESET_REG_SUP, HW_REDUCED_ACPI = 1 << 0, 1 << 4, 1 << 5, 1 << 10, 1 << 20

# MADT (5.2.12): interrupt controller structures.
_LOCAL_APIC, _IO_APIC, _OVERRIDE, _LOCAL_APIC_NMI, _LOCAL_X2APIC = 0, 1, 2, 4, 9
_ENABLED = 1
_EDGE_HIGH = 0b0101  # MPS INTI flags: polarity high, trigger edge
_LAST_XAPIC_ID = 254


def build_tables(cpus: int, com1: bool, mmio32: tuple[int, int], mmio64: tuple[int, int]) -> bytes:
    """All tables, RSDP first, to be placed at layout.ACPI_TABLES.

    `cpus` counts virtual CPUs, whose APIC ids are 0 upwards; `com1` tells of the serial port;
    the PCI windows are (base, size) in bytes.
    """
    image = _Image(layout.ACPI_TABLES)
    rsdp = image.add(bytes(36))
    at_dsdt = image.add(_table(b"DSDT", 2, dsdt.body(com1, mmio32, mmio64)))
    at = [image.add(_fadt(at_dsdt)), image.add(_madt(cpus, com1)), image.add(_mcfg())]
    at_xsdt = image.add(_table(b"XSDT", 1, pack(f"<{len(at)}Q", *at)))
    image.replace(rsdp, _rsdp(at_xsdt))
    if len(image.data) > layout.ACPI_TABLES_END - layout.ACPI_TABLES - _RESET_CODE:
        raise ValueError(f"{len(image.data)} bytes of ACPI tables do not fit")
    return bytes(image.data)


class _Image:
    """Tables one after another, each aligned to 16 bytes, from guest address `base` on."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.data = bytearray()

    def add(self, table: bytes) -> int:
        self.data += bytes(-len(self.data) % 16)
        address = self.base + len(self.data)
        self.data += table
        return address

    def replace(self, address: int, table: bytes) -> None:
        start = address - self.base
        self.data[start : start + len(table)] = table


def _checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of all bytes 0 modulo 256."""
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """System description table header (5.2.6) and body."""
    table = bytearray(
        pack(
            "<4sIBB6s8sI4sI", signature, _HEADER_SIZE + len(body), revision, 0,
            _OEM_ID, _OEM_TABLE, _REVISION, _CREATOR, _REVISION,
        )
        + body
    )  # fmt: skip
    table[9] = _checksum(table)
    return bytes(table)


def _rsdp(xsdt: int) -> bytes:
    """Root System Description Pointer, revision 2 (5.2.5.3), without an RSDT."""
    table = bytearray(pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM_ID, 2, 0, 36, xsdt, 0))
    table[8] = _checksum(table[:20])
    table[32] = _checksum(table)
    return bytes(table)


def _port(address: int) -> bytes:
    """Generic Address Structure (5.2.3.2) of one byte-wide port."""
    return pack("<BBBBQ", _SYSTEM_IO, 8, 0, 1, address)


def _fadt(at_dsdt: int) -> bytes:
    """Fixed ACPI Description Table (5.2.9), hardware-reduced: only sleep and reset registers."""
    table = bytearray(_FADT_SIZE)
    flags = WBINVD | PWR_BUTTON | SLP_BUTTON | RESET_REG_SUP | HW_REDUCED_ACPI
    for offset, value in (
        (_DSDT, pack("<I", at_dsdt)),
        (_BOOT_ARCH, pack("<H", VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT)),
        (_FLAGS, pack("<I", flags)),
        (_RESET_REG, _port(layout.PORT_RESET)),
        (_RESET_VALUE, bytes([RESET_VALUE])),
        (_MINOR, b"\x03"),
        (_X_DSDT, pack("<Q", at_dsdt)),
        (_SLEEP_CONTROL, _port(layout.PORT_SLEEP)),
        (_SLEEP_STATUS, _port(layout.PORT_SLEEP + 1)),
        (_HYPERVISOR, b"PYVMM".ljust(8)),
    ):
        table[offset : offset + len(value)] = value
    return _table(b"FACP", 6, bytes(table[_HEADER_SIZE:]))


def _madt(cpus: int, com1: bool) -> bytes:
    """Multiple APIC Description Table: every CPU, one IOAPIC, NMI on LINT1 of all CPUs."""
    entries = [_local_apic(apic_id) for apic_id in range(cpus)]
    entries.append(pack("<BBBxII", _IO_APIC, 12, 0, layout.IOAPIC_BASE, 0))
    if com1:
        entries.append(pack("<BBBBIH", _OVERRIDE, 10, 0, layout.IRQ_COM1, layout.IRQ_COM1, _EDGE_HIGH))
    entries.append(pack("<BBBHB", _LOCAL_APIC_NMI, 6, 0xFF, 0, 1))
    return _table(b"APIC", 5, pack("<II", layout.LAPIC_BASE, 0) + b"".join(entries))


def _local_apic(apic_id: int) -> bytes:
    """Processor structure; an id above 254 needs the x2APIC form (5.2.12.12)."""
    if apic_id <= _LAST_XAPIC_ID:
        return pack("<BBBBI", _LOCAL_APIC, 8, apic_id, apic_id, _ENABLED)
    return pack("<BBHIII", _LOCAL_X2APIC, 16, 0, apic_id, _ENABLED, apic_id)


def _mcfg() -> bytes:
    """PCI Express memory-mapped configuration space: segment 0, as many buses as fit."""
    last_bus = (layout.ECAM_SIZE >> 20) - 1
    return _table(b"MCFG", 1, bytes(8) + pack("<QHBB4x", layout.ECAM_BASE, 0, 0, last_bus))
