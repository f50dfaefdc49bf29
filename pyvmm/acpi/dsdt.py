"""The DSDT: what the guest cannot probe - the PCI root, the serial port, fixed ports, power off.

It owns the ACPI namespace.  Table headers are tables.py's, encodings aml.py's.  Addresses
come from layout.py or as arguments.
"""

from __future__ import annotations

from .. import layout
from ..legacy.power import SLEEP_TYPE_S5
from . import aml

SLOTS = range(1, 32)  # PCI device numbers that may have a pin; 0 is the host bridge
PINS = range(4)
_OSC_PCI = "33DB4D5B-1FF7-401C-9657-7441C03DD766"  # PCI Firmware Specification 3.0, 4.5.1
_OSC_UNRECOGNIZED_UUID = 1 << 2
_POWER_PORTS = (layout.PORT_SLEEP, layout.PORT_RESET - layout.PORT_SLEEP + 1)


def interrupt_pin(slot: int, pin: int) -> int:
    """GSI of a device's pin (0 is INTA): the usual swizzle over four lines."""
    return layout.PCI_INTX_IRQS[(slot + pin) % 4]


def body(com1: bool, mmio32: tuple[int, int], mmio64: tuple[int, int]) -> bytes:
    """AML of the whole table; windows are (base, size), a size of 0 leaves one out."""
    devices = [_motherboard(), _pci_root(mmio32, mmio64)]
    if com1:
        devices.append(_com1())
    soft_off = aml.name("\\_S5", aml.package(aml.integer(SLEEP_TYPE_S5), *[aml.integer(0)] * 3))
    return soft_off + aml.scope("\\_SB", *devices)


def _motherboard() -> bytes:
    """Resources of no other device.

    Linux uses the ECAM window only if it is reserved here (is_acpi_reserved in
    arch/x86/pci/mmconfig-shared.c); the memory map alone satisfies it early in the boot.
    """
    return aml.device(
        "MBRD",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_UID", aml.integer(0)),
        aml.name(
            "_CRS",
            aml.resources(
                aml.memory32_fixed(layout.ECAM_BASE, layout.ECAM_SIZE),
                aml.io(*_POWER_PORTS),
            ),
        ),
    )


def _com1() -> bytes:
    return aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_DDN", aml.string("COM1")),
        aml.name(
            "_CRS",
            # The extended interrupt descriptor says edge and high itself, so that no MADT
            # override needs to; Linux has no legacy IRQs on hardware-reduced machines.
            aml.resources(aml.io(layout.PORT_COM1, 8), aml.interrupt_edge_high(layout.IRQ_COM1)),
        ),
    )


def _pci_root(mmio32: tuple[int, int], mmio64: tuple[int, int]) -> bytes:
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_SEG", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resources(*_windows(mmio32, mmio64))),
        aml.name("_PRT", _routing()),
        _osc(),
    )


def _windows(mmio32: tuple[int, int], mmio64: tuple[int, int]) -> list[bytes]:
    """What the root passes on: buses, ports around those of the CF8 mechanism, memory."""
    address = layout.PORT_PCI_ADDRESS
    windows = [
        aml.window(aml.BUS, 0, layout.ECAM_SIZE >> 20, 2),
        aml.io(address, 8),
        aml.window(aml.IO, 0, address, 2),
        aml.window(aml.IO, address + 8, 0x1_0000 - address - 8, 2),
    ]
    if mmio32[1]:
        windows.append(aml.window(aml.MEMORY, *mmio32, 4))
    if mmio64[1]:
        windows.append(aml.window(aml.MEMORY, *mmio64, 8))
    return windows


def _routing() -> bytes:
    """_PRT: without a link device the interrupts are level-triggered and active-low (6.2.13)."""
    return aml.package(
        *(
            aml.package(
                aml.integer(slot << 16 | 0xFFFF),
                aml.integer(pin),
                aml.integer(0),
                aml.integer(interrupt_pin(slot, pin)),
            )
            for slot in SLOTS
            for pin in PINS
        )
    )


def _osc() -> bytes:
    """_OSC: the operating system may control everything that it asks for; nothing here competes."""
    first = aml.path("CDW1")
    return aml.method(
        "_OSC",
        4,
        aml.create_dword_field(aml.ARG3, 0, "CDW1"),
        aml.if_(aml.equal(aml.ARG0, aml.uuid(_OSC_PCI)), aml.return_(aml.ARG3)),
        aml.or_(first, aml.integer(_OSC_UNRECOGNIZED_UUID), first),
        aml.return_(aml.ARG3),
    )
