"""The tables as a guest reads them, and what the ACPI compiler says of them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from struct import unpack_from

import pytest

from pyvmm import layout
from pyvmm.acpi import dsdt
from pyvmm.acpi.tables import build_tables
from pyvmm.legacy.power import RESET_VALUE
from pyvmm.pci.host import intx_gsi

MMIO32 = (layout.MMIO32_BASE, layout.MMIO32_SIZE)
MMIO64 = (0x2_0000_0000, layout.MMIO64_SIZE)


def walk(image: bytes) -> dict[str, bytes]:
    """Follow the pointers from the RSDP as an operating system does."""

    def table(address: int) -> bytes:
        start = address - layout.ACPI_TABLES
        (length,) = unpack_from("<I", image, start + 4)
        found = image[start : start + length]
        assert len(found) == length
        return found

    assert image[:8] == b"RSD PTR "
    xsdt = table(unpack_from("<Q", image, 24)[0])
    found = {"XSDT": xsdt}
    for (address,) in (unpack_from("<Q", xsdt, at) for at in range(36, len(xsdt), 8)):
        entry = table(address)
        found[entry[:4].decode()] = entry
    found["DSDT"] = table(unpack_from("<Q", found["FACP"], 140)[0])
    return found


def madt_entries(madt: bytes) -> list[bytes]:
    entries, at = [], 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    return entries


@pytest.fixture(scope="module")
def tables() -> dict[str, bytes]:
    return walk(build_tables(4, True, MMIO32, MMIO64))


def test_checksums(tables: dict[str, bytes]) -> None:
    assert set(tables) == {"XSDT", "FACP", "APIC", "MCFG", "DSDT"}
    for name, table in tables.items():
        assert sum(table) & 0xFF == 0, name
    rsdp = build_tables(1, False, MMIO32, MMIO64)[:36]
    assert sum(rsdp[:20]) & 0xFF == 0
    assert sum(rsdp) & 0xFF == 0


def test_fadt_leaves_nothing_to_probe(tables: dict[str, bytes]) -> None:
    fadt = tables["FACP"]
    boot_arch, flags = unpack_from("<HxI", fadt, 109)
    assert boot_arch & 0b11 == 0  # no legacy devices, no 8042
    assert boot_arch & 0b100100 == 0b100100  # no VGA, no CMOS clock
    assert flags >> 20 & 1  # hardware-reduced
    assert flags >> 10 & 1  # the reset register is there
    assert not any(fadt[46:104])  # no SCI, no PM blocks


def test_fadt_registers(tables: dict[str, bytes]) -> None:
    fadt = tables["FACP"]
    for offset, port in ((116, layout.PORT_RESET), (244, layout.PORT_SLEEP), (256, layout.PORT_SLEEP + 1)):
        assert unpack_from("<BBBBQ", fadt, offset) == (1, 8, 0, 1, port)
    assert fadt[128] == RESET_VALUE


@pytest.mark.parametrize("cpus", [1, 2, 32, 255, 300])
def test_madt_lists_every_cpu_once(cpus: int) -> None:
    entries = madt_entries(walk(build_tables(cpus, False, MMIO32, MMIO64))["APIC"])
    xapic = [entry for entry in entries if entry[0] == 0]
    x2apic = [entry for entry in entries if entry[0] == 9]
    ids = [entry[3] for entry in xapic] + [unpack_from("<I", entry, 4)[0] for entry in x2apic]
    assert ids == list(range(cpus))
    assert all(entry[3] < 255 for entry in xapic)
    assert all(unpack_from("<I", entry, 4)[0] & 1 for entry in xapic)
    assert all(unpack_from("<I", entry, 8)[0] & 1 for entry in x2apic)


def test_madt_interrupt_controllers(tables: dict[str, bytes]) -> None:
    entries = {entry[0]: entry for entry in madt_entries(tables["APIC"])}
    assert unpack_from("<II", entries[1], 4) == (layout.IOAPIC_BASE, 0)
    assert unpack_from("<BBIH", entries[2], 2) == (0, 4, 4, 0b0101)  # COM1: edge, high
    assert unpack_from("<II", tables["APIC"], 36) == (layout.LAPIC_BASE, 0)


def test_without_com1_nothing_speaks_of_it() -> None:
    found = walk(build_tables(1, False, MMIO32, MMIO64))
    assert b"COM1" not in found["DSDT"]
    assert 2 not in {entry[0] for entry in madt_entries(found["APIC"])}


def test_mcfg_covers_the_window(tables: dict[str, bytes]) -> None:
    base, segment, first, last = unpack_from("<QHBB", tables["MCFG"], 44)
    assert (base, segment, first) == (layout.ECAM_BASE, 0, 0)
    assert (last + 1) << 20 == layout.ECAM_SIZE


def test_pins_are_swizzled_over_the_four_lines() -> None:
    assert [dsdt.interrupt_pin(slot, 0) for slot in range(1, 6)] == [17, 18, 19, 16, 17]
    assert [dsdt.interrupt_pin(1, pin) for pin in range(4)] == [17, 18, 19, 16]


def test_pins_agree_with_the_pci_host() -> None:
    for slot in dsdt.SLOTS:
        for pin in dsdt.PINS:
            assert intx_gsi(slot, pin + 1) == dsdt.interrupt_pin(slot, pin)


def iasl(directory: Path, *arguments: str) -> str:
    program = shutil.which("iasl")
    if program is None:
        pytest.skip("iasl is not installed (Debian package acpica-tools)")
    result = subprocess.run(
        [program, *arguments], cwd=directory, capture_output=True, text=True, check=False, timeout=60
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    return output


@pytest.mark.parametrize("name", ["FACP", "APIC", "MCFG", "XSDT", "DSDT"])
@pytest.mark.parametrize("com1", [False, True])
def test_iasl_reads_and_recompiles_without_a_word(tmp_path: Path, name: str, com1: bool) -> None:
    """-we makes warnings errors; -oa keeps iasl from shortening what it reads."""
    table = walk(build_tables(32, com1, MMIO32, MMIO64))[name]
    (tmp_path / "table.dat").write_bytes(table)
    read = iasl(tmp_path, "-d", "table.dat")
    compiled = iasl(tmp_path, "-we", "-oa", "table.dsl")
    for output in (read, compiled):
        lines = [
            line for line in output.splitlines() if any(word in line for word in ("Warn", "Error", "Remark"))
        ]
        assert all("0 Errors, 0 Warnings, 0 Remarks" in line for line in lines), output
    again = (tmp_path / "table.aml").read_bytes()
    # The compiler puts its own name and version into the header, which moves the checksum.
    assert again[:9] + again[10:28] + again[36:] == table[:9] + table[10:28] + table[36:]


def test_namespace(tmp_path: Path) -> None:
    (tmp_path / "dsdt.dat").write_bytes(walk(build_tables(1, True, MMIO32, MMIO64))["DSDT"])
    iasl(tmp_path, "-d", "dsdt.dat")
    source = " ".join((tmp_path / "dsdt.dsl").read_text().split())
    for text in (
        "Name (\\_S5, Package (0x04) // _S5_: S5 System State { 0x05,",
        'Name (_HID, EisaId ("PNP0A08")',
        'Name (_CID, EisaId ("PNP0A03")',
        "Memory32Fixed (ReadWrite, 0xE0000000, // Address Base 0x00100000,",
        "0xC0000000, // Range Minimum 0xDFFFFFFF, // Range Maximum",
        "0x0000000200000000, // Range Minimum 0x00000011FFFFFFFF, // Range Maximum",
        "IO (Decode16, 0x0CF8,",
        "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x00000004,",
        "Method (_OSC, 4, Serialized)",
    ):
        assert text in source, text
    assert source.count("FFFF,") >= len(dsdt.SLOTS) * 4
