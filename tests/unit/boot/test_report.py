"""The crash report: what it says for each way in which a virtual CPU can end."""

from __future__ import annotations

from typing import Any

import pytest

from pyvmm import layout
from pyvmm.boot import cpu, linux64
from pyvmm.boot.ram import GuestRam
from pyvmm.boot.report import crash_report
from pyvmm.boot.symbols import KERNEL_MAP, Symbols

SIZE = 8 << 20
RIP = 0x20_0010
SYMBOLS = Symbols(
    [(KERNEL_MAP + 0x20_0000, "start"), (KERNEL_MAP + 0x20_0100, "helper"), (KERNEL_MAP + 0x20_0200, "end")]
)
NAMES = (
    "rax",
    "rbx",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "rsp",
    "rbp",
    "rip",
    "rflags",
    *(f"r{n}" for n in range(8, 16)),
)


class Guest:
    """A guest in 64-bit mode with code at RIP and two return addresses on its stack."""

    def __init__(self) -> None:
        memory = bytearray(SIZE)
        ram = GuestRam(memoryview(memory), layout.ram_ranges(SIZE))
        linux64.write(ram, linux64.default_header(), layout.CMDLINE, (0, 0), 0)
        ram.write(RIP - 2, b"\x90\x90\x0f\x01\xca\xc3")
        ram.write(0x30_0008, (KERNEL_MAP + 0x20_0123).to_bytes(8, "little"))
        ram.write(0x30_0010, (0x20_0155).to_bytes(8, "little"))  # a number, no return address
        self.read = ram.read
        self.regs = dict.fromkeys(NAMES, 0) | {"rip": RIP, "rsp": 0x30_0000, "rbx": 0x1234}
        self.sregs: dict[str, Any] = cpu.boot_sregs(cpu.BootState(cpu.LINUX64, 0, 0), {})

    def report(self, number: int, details: dict[str, Any] | None = None, **options: Any) -> list[str]:
        return crash_report(
            0, (number, details or {}), self.regs, self.sregs, self.read, **options
        ).splitlines()


@pytest.fixture
def guest() -> Guest:
    return Guest()


@pytest.mark.parametrize(
    ("number", "details", "told"),
    [
        (8, {}, "triple fault (KVM_EXIT_SHUTDOWN)"),
        (
            17,
            {"suberror": 1, "data": (1, 2)},
            "an instruction that KVM cannot emulate (KVM_EXIT_INTERNAL_ERROR, suberror 1)",
        ),
        (17, {"suberror": 3, "data": (0x80000B0E, 0x31)}, "suberror 3, 0x80000b0e, 0x31)"),
        (17, {"suberror": 77, "data": ()}, "an internal error of KVM"),
        (
            9,
            {"hardware_entry_failure_reason": 0x80000021, "cpu": 1},
            "refused to enter the guest (KVM_EXIT_FAIL_ENTRY, 0x80000021)",
        ),
        (24, {"type": 3, "data": ()}, "system event crash"),
        (0, {"hardware_exit_reason": 0x44}, "0x44"),
        (5, {}, "KVM_EXIT_HLT"),
        (4, {}, "KVM exit reason 4"),
    ],
)
def test_the_first_line_names_reason_and_place(
    guest: Guest, number: int, details: dict[str, Any], told: str
) -> None:
    first = guest.report(number, details, symbols=SYMBOLS)[0]
    assert first.startswith("virtual CPU 0: ")
    assert told in first
    assert first.endswith(f"at {RIP:#x} (start+0x10/0x100)")


def test_code_registers_and_stack(guest: Guest) -> None:
    text = "\n".join(guest.report(8, symbols=SYMBOLS))
    assert "90 90 <0f> 01 ca c3 00" in text
    assert "rbx 0000000000001234" in text
    assert f"cr3 {layout.BOOT_PML4:x}" in text
    assert "cs 10:0/ffffffff type b dpl 0" in text
    assert "ldt -" in text
    assert "  on the stack: helper+0x23/0x100\n" in text + "\n"


def test_what_kvm_saw_is_shown(guest: Guest) -> None:
    lines = guest.report(17, {"suberror": 1, "data": (), "instruction": b"\x0f\xc7\x0f"})
    assert "  instruction as KVM saw it: 0f c7 0f" in lines


def test_a_host_that_emulates_ring_0_is_named(guest: Guest) -> None:
    assert not any("interprets kernel mode" in line for line in guest.report(8))
    (note,) = (line for line in guest.report(8, ring0_emulated=True) if "interprets kernel mode" in line)
    assert "that is why, unless the guest is at fault itself" in note, "one may crash by itself there, too"
    assert "pyvmm lab -- pyvmm ..." in note and "--accel" not in note, "pyvmm boot has no --accel"


def test_registers_lost_to_a_reset_are_told(guest: Guest) -> None:
    guest.regs["rip"] = 0xFFF0
    guest.sregs["cs"] = {**guest.sregs["cs"], "selector": 0xF000, "base": 0xFFFF_0000, "l": 0}
    guest.sregs.update(cr0=0x10, efer=0, cr4=0)
    lines = guest.report(8)
    assert "at 0xfffffff0" in lines[0]
    assert "  code: not readable" in lines
    assert any("those after a reset" in line for line in lines)


def test_unmapped_code_and_wild_registers_are_no_error(guest: Guest) -> None:
    for value in (0, 1, (1 << 64) - 1, 1 << 47, 0xFFFF_FFFF):
        guest.regs.update(rip=value, rsp=value)
        assert guest.report(8, symbols=SYMBOLS)
        guest.sregs["cr3"] = value
        assert guest.report(8, symbols=SYMBOLS)
