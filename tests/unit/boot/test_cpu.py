"""Start states: what the boot protocols demand and what VMRUN and VM entry check."""

from __future__ import annotations

from typing import Any

import pytest

from pyvmm import layout
from pyvmm.boot import cpu
from pyvmm.boot.cpu import LINUX64, PVH, BootState

STATES = {
    PVH: BootState(PVH, 0x100_0040, layout.PVH_INFO),
    LINUX64: BootState(LINUX64, 0x100_0000, layout.ZERO_PAGE),
}
CURRENT = {"apic_base": 0xFEE0_0900, "cr8": 3, "interrupt_bitmap": (0, 0, 0, 0), "cr4": 1}


@pytest.fixture(params=[PVH, LINUX64])
def state(request: pytest.FixtureRequest) -> BootState:
    return STATES[request.param]


def sregs_of(state: BootState) -> dict[str, Any]:
    return cpu.boot_sregs(state, CURRENT)


def test_pvh_start() -> None:
    """xen/include/public/arch-x86/hvm/start_info.h and docs/misc/pvh: PE alone, 32-bit flat segments."""
    regs, sregs = cpu.boot_regs(STATES[PVH]), sregs_of(STATES[PVH])
    assert (regs["rip"], regs["rbx"]) == (0x100_0040, layout.PVH_INFO)
    assert regs["rflags"] & (1 << 17 | 1 << 9 | 1 << 8) == 0
    assert sregs["cr0"] & ~(1 << 4) == 1
    assert (sregs["cr4"], sregs["efer"]) == (0, 0)
    assert (sregs["cs"]["db"], sregs["cs"]["l"]) == (1, 0)
    assert (sregs["tr"]["base"], sregs["tr"]["limit"], sregs["tr"]["type"]) == (0, 0x67, 0xB)


def test_linux64_start() -> None:
    """Documentation/arch/x86/boot.rst, 64-bit boot protocol."""
    regs, sregs = cpu.boot_regs(STATES[LINUX64]), sregs_of(STATES[LINUX64])
    assert (regs["rip"], regs["rsi"]) == (0x100_0000, layout.ZERO_PAGE)
    assert regs["rflags"] & 1 << 9 == 0
    assert sregs["cr0"] & 0x8000_0001 == 0x8000_0001
    assert sregs["cr4"] & 1 << 5
    assert sregs["efer"] == 0x500
    assert (sregs["cs"]["selector"], sregs["ds"]["selector"], sregs["ss"]["selector"]) == (0x10, 0x18, 0x18)
    assert (sregs["cs"]["db"], sregs["cs"]["l"]) == (0, 1)


def test_flat_segments(state: BootState) -> None:
    sregs = sregs_of(state)
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = sregs[name]
        assert (segment["base"], segment["limit"], segment["g"], segment["s"]) == (0, 0xFFFF_FFFF, 1, 1), name
        assert segment["present"], name


def test_descriptors_agree_with_the_segment_registers(state: BootState) -> None:
    """A guest that reloads a selector must get what it has."""
    sregs = sregs_of(state)
    table = cpu.gdt(state)
    assert sregs["gdt"] == {"base": layout.BOOT_GDT, "limit": len(table) - 1}
    for name in ("cs", "ds", "tr"):
        segment = sregs[name]
        raw = int.from_bytes(table[segment["selector"] : segment["selector"] + 8], "little")
        limit = raw & 0xFFFF | raw >> 32 & 0xF0000
        assert (limit << 12 | 0xFFF if raw >> 55 & 1 else limit) == segment["limit"], name
        assert raw >> 40 & 0xF == segment["type"], name
        fields = [raw >> bit & 1 for bit in (44, 47, 53, 54, 55)]
        assert fields == [segment[key] for key in ("s", "present", "l", "db", "g")], name


def test_entry_checks(state: BootState) -> None:
    """AMD APM volume 2, 15.5.1, and Intel SDM volume 3, 27.3.1: what makes a state illegal."""
    sregs = sregs_of(state)
    assert sregs["tr"]["present"]
    assert not sregs["tr"]["s"]
    assert not sregs["tr"]["unusable"]
    assert sregs["ldt"]["unusable"]
    assert not (sregs["cs"]["l"] and sregs["cs"]["db"])
    if sregs["efer"] & 1 << 8 and sregs["cr0"] >> 31:
        assert sregs["cr4"] & 1 << 5
        assert sregs["efer"] & 1 << 10
    assert sregs["cs"]["dpl"] == sregs["ss"]["dpl"] == 0


def test_kvms_own_state_stays(state: BootState) -> None:
    sregs = sregs_of(state)
    assert (sregs["apic_base"], sregs["cr8"], sregs["interrupt_bitmap"]) == (0xFEE0_0900, 3, (0, 0, 0, 0))


def test_states_are_not_shared(state: BootState) -> None:
    sregs_of(state)["ds"]["base"] = 1
    assert sregs_of(state)["ds"]["base"] == 0


def test_mtrrs_are_on_with_write_back() -> None:
    assert dict(cpu.boot_msrs())[0x2FF] == 0x806
