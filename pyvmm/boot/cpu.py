"""Registers and MSRs that a virtual CPU starts with, per boot protocol, as plain dicts.

Keys are the fields of struct kvm_regs, kvm_sregs and kvm_segment.  Sources: Intel SDM
volume 3 chapters 3 and 10, AMD APM volume 2 section 15.5 (what VMRUN checks), the PVH and
Linux boot protocols.  It owns the GDT at layout.BOOT_GDT; it does not know KVM's calls.
Only the first CPU gets such a state: KVM starts the others from the guest's SIPI.
"""

from __future__ import annotations

from struct import pack

from .. import layout
from ..record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from .ram import GuestRam

CR0_PE, CR0_ET, CR0_PG = 1 << 0, 1 << 4, 1 << 31
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
RFLAGS_RESERVED = 1 << 1
SEL_CODE, SEL_DATA, SEL_TSS = 0x10, 0x18, 0x20  # boot.rst wants __BOOT_CS and __BOOT_DS so

MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING = 0x1A0, 1
MSR_MTRR_DEF_TYPE = 0x2FF
MTRR_ENABLE, MTRR_WRITE_BACK = 1 << 11, 6

PVH, LINUX64 = "pvh", "linux64"


class BootState(Record):
    """What the loader made: how the first CPU must start.

    `argument` is the guest address of hvm_start_info (PVH) or of the zero page (LINUX64);
    `vmlinux` is the path of the ELF file that was loaded, if one stays on disk.
    """

    protocol: str
    entry: int
    argument: int
    vmlinux: str = ""


def _segment(selector: int, kind: int, **changes: int) -> dict[str, int]:
    """A flat, present, page-granular code or data segment of type `kind` (SDM 3.4.5)."""
    flat = {
        "base": 0, "limit": 0xFFFF_FFFF, "selector": selector, "type": kind, "present": 1,
        "dpl": 0, "db": 1, "s": 1, "l": 0, "g": 1, "avl": 0, "unusable": 0,
    }  # fmt: skip
    return {**flat, **changes}


_CODE32 = _segment(SEL_CODE, 0xB)
_CODE64 = _segment(SEL_CODE, 0xB, db=0, l=1)
_DATA = _segment(SEL_DATA, 0x3)
# Both vendors refuse entry without a busy TSS in TR; an LDTR may be marked unusable.
_TSS = _segment(SEL_TSS, 0xB, limit=0x67, db=0, s=0, g=0)
_LDT = _segment(0, 0x2, limit=0, db=0, s=0, g=0, present=0, unusable=1)
_DATA_SEGMENTS = ("ds", "es", "fs", "gs", "ss")

_CONTROL = {
    PVH: {"cr0": CR0_PE | CR0_ET, "cr3": 0, "cr4": 0, "efer": 0},
    LINUX64: {
        "cr0": CR0_PE | CR0_ET | CR0_PG, "cr3": layout.BOOT_PML4, "cr4": CR4_PAE, "efer": EFER_LME | EFER_LMA,
    },
}  # fmt: skip
_CODE = {PVH: _CODE32, LINUX64: _CODE64}


def boot_regs(state: BootState) -> dict[str, int]:
    """struct kvm_regs of the first CPU; what is not named is 0."""
    registers = {"rip": state.entry, "rflags": RFLAGS_RESERVED, "rsp": layout.BOOT_STACK}
    registers["rbx" if state.protocol == PVH else "rsi"] = state.argument
    return registers


def boot_sregs(state: BootState, current: Mapping[str, Any]) -> dict[str, Any]:
    """struct kvm_sregs of the first CPU: `current`, read from KVM, with the boot state put in.

    KVM's own values of apic_base, cr8 and the interrupt bitmap stay.
    """
    segments = {name: dict(_DATA) for name in _DATA_SEGMENTS}
    return {
        **current,
        **segments,
        "cs": dict(_CODE[state.protocol]),
        "tr": dict(_TSS),
        "ldt": dict(_LDT),
        "gdt": {"base": layout.BOOT_GDT, "limit": len(gdt(state)) - 1},
        "idt": {"base": 0, "limit": 0},
        "cr2": 0,
        **_CONTROL[state.protocol],
    }


def boot_msrs() -> tuple[tuple[int, int], ...]:
    """(index, value) of the MSRs that firmware would have set, for every CPU.

    MTRRs on with write-back as default: Linux disables PAT where they are off.
    """
    return (
        (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
    )


def write_gdt(ram: GuestRam, state: BootState) -> None:
    """Put the descriptors behind the start state's selectors into guest RAM."""
    ram.write(layout.BOOT_GDT, gdt(state))


def gdt(state: BootState) -> bytes:
    """Six 8-byte descriptors: two null, code, data, and a TSS that in long mode takes two."""
    return bytes(16) + _descriptor(_CODE[state.protocol]) + _descriptor(_DATA) + _descriptor(_TSS) + bytes(8)


def _descriptor(segment: Mapping[str, int]) -> bytes:
    """Encode a segment as in SDM volume 3 figure 3-8."""
    base = segment["base"]
    limit = segment["limit"] >> 12 if segment["g"] else segment["limit"]
    access = segment["type"] | segment["s"] << 4 | segment["dpl"] << 5 | segment["present"] << 7
    flags = segment["avl"] | segment["l"] << 1 | segment["db"] << 2 | segment["g"] << 3
    return pack(
        "<HHBBBB",
        limit & 0xFFFF,
        base & 0xFFFF,
        base >> 16 & 0xFF,
        access,
        limit >> 16 | flags << 4,
        base >> 24,
    )
