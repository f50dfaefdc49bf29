"""The text that tells why a virtual CPU cannot go on.

It owns wording and layout of the crash report.  Everything it says comes from its arguments:
an exit of the native run loop, the register dicts, a reader of guest-physical memory, symbols.
"""

from __future__ import annotations

from .paging import read_linear
from .symbols import KERNEL_MAP, Symbols

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from .paging import Read

# linux/kvm.h, enum of exit reasons and of KVM_INTERNAL_ERROR_*.
UNKNOWN, HLT, SHUTDOWN, FAIL_ENTRY, INTERNAL_ERROR, SYSTEM_EVENT = 0, 5, 8, 9, 17, 24
EMULATION = 1
_SUBERRORS = {
    EMULATION: "an instruction that KVM cannot emulate",
    2: "an exception while another was being delivered",
    3: "an exit while an event was being delivered",
    4: "an exit that KVM does not know",
}
_EVENTS = {1: "shutdown", 2: "reset", 3: "crash", 4: "wakeup", 5: "suspend", 6: "SEV termination"}
_REASONS = {
    SHUTDOWN: "triple fault (KVM_EXIT_SHUTDOWN)",
    HLT: "halted for ever (KVM_EXIT_HLT)",
}
_EMULATED = (
    "this host's KVM interprets kernel mode in software and incompletely: that is why, unless the guest "
    "is at fault itself. To know, do the same on a machine that runs it: pyvmm lab -- pyvmm ..."
)
_RESET = (
    "registers are those after a reset: this KVM forgets the others at a triple fault; "
    "the serial console (--serial tty, earlyprintk=ttyS0) may show the guest's last words"
)
_REGISTERS = (
    ("rip", "rsp", "rbp", "rflags"),
    ("rax", "rbx", "rcx", "rdx"),
    ("rsi", "rdi", "r8", "r9"),
    ("r10", "r11", "r12", "r13"),
    ("r14", "r15"),
)
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "efer")
_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt")
_CODE_BEFORE, _CODE_AFTER = 16, 32
_STACK_WORDS, _STACK_NAMES = 128, 8
_RESET_RIP, _RESET_CS = 0xFFF0, 0xF000


def crash_report(
    cpu: int,
    ended: tuple[int, Mapping[str, Any]],
    regs: Mapping[str, int],
    sregs: Mapping[str, Any],
    read: Read,
    symbols: Symbols | None = None,
    ring0_emulated: bool = False,
) -> str:
    """Several lines, the first of which says it all.

    `ended` is what Vcpu.run returned; `read(address, size)` gives guest-physical bytes or None
    (GuestRam.read); `ring0_emulated` is what probing this host's KVM said.
    """
    symbols = symbols or Symbols()
    rip = _linear(regs["rip"], sregs)
    name = symbols.name(rip)
    place = f"{rip:#x}" + (f" ({name})" if name else "")
    lines = [f"virtual CPU {cpu}: {reason(*ended)} at {place}"]
    lines.append(f"  code: {_code(rip, sregs, read) or 'not readable'}")
    known = ended[1].get("instruction", b"")
    if known:
        lines.append(f"  instruction as KVM saw it: {known.hex(' ')}")
    lines += [f"  {line}" for line in _register_lines(regs, sregs)]
    trace = list(_stack(regs, sregs, read, symbols))
    if trace:
        lines.append(f"  on the stack: {', '.join(trace)}")
    lines += [f"  note: {note}" for note in _notes(ended[0], regs, sregs, ring0_emulated)]
    return "\n".join(lines)


def reason(number: int, details: Mapping[str, Any]) -> str:
    """An exit in words, with KVM's name and numbers for it."""
    if number == INTERNAL_ERROR:
        suberror = details.get("suberror", 0)
        told = _SUBERRORS.get(suberror, "an internal error of KVM")
        data = "".join(f", {value:#x}" for value in details.get("data", ()) if suberror != EMULATION)
        return f"{told} (KVM_EXIT_INTERNAL_ERROR, suberror {suberror}{data})"
    if number == FAIL_ENTRY:
        hardware = details.get("hardware_entry_failure_reason", 0)
        return f"the processor refused to enter the guest (KVM_EXIT_FAIL_ENTRY, {hardware:#x})"
    if number == SYSTEM_EVENT:
        event = details.get("type", 0)
        return f"system event {_EVENTS.get(event, event)} (KVM_EXIT_SYSTEM_EVENT)"
    if number == UNKNOWN:
        return f"an exit for a reason unknown to KVM ({details.get('hardware_exit_reason', 0):#x})"
    return _REASONS.get(number, f"an exit that is not handled (KVM exit reason {number})")


def _linear(rip: int, sregs: Mapping[str, Any]) -> int:
    """RIP as a linear address; in 64-bit code the base of CS does not count."""
    if sregs["cs"]["l"]:
        return rip
    base: int = sregs["cs"]["base"]
    return base + rip & 0xFFFF_FFFF


def _code(rip: int, sregs: Mapping[str, Any], read: Read) -> str:
    """Bytes around `rip` as Linux prints them, the one at `rip` in angle brackets."""
    after = read_linear(rip, _CODE_AFTER, sregs, read)
    if not after:
        return ""
    start = max(0, rip - _CODE_BEFORE)
    before = read_linear(start, rip - start, sregs, read)
    shown = before if len(before) == rip - start else b""  # its page may not be mapped
    return f"{shown.hex(' ')} <{after[0]:02x}> {after[1:].hex(' ')}".strip()


def _register_lines(regs: Mapping[str, int], sregs: Mapping[str, Any]) -> Iterator[str]:
    for names in _REGISTERS:
        yield "  ".join(f"{name:>6} {regs[name]:016x}" for name in names)
    yield "  ".join(f"{name} {sregs[name]:x}" for name in _CONTROL)
    for half in (_SEGMENTS[:4], _SEGMENTS[4:]):
        yield "  ".join(f"{name} {_segment(sregs[name])}" for name in half)
    yield "  ".join(f"{name} {sregs[name]['base']:x}/{sregs[name]['limit']:x}" for name in ("gdt", "idt"))


def _segment(segment: Mapping[str, int]) -> str:
    """selector:base/limit type and privilege; `-` for one that is not usable."""
    if segment["unusable"] or not segment["present"]:
        return "-"
    text = f"{segment['selector']:x}:{segment['base']:x}/{segment['limit']:x}"
    return f"{text} type {segment['type']:x} dpl {segment['dpl']}"


def _stack(regs: Mapping[str, int], sregs: Mapping[str, Any], read: Read, symbols: Symbols) -> Iterator[str]:
    """Names of what looks like return addresses, innermost first; some may be left-overs."""
    width = 8 if sregs["cs"]["l"] else 4
    data = read_linear(regs["rsp"], _STACK_WORDS * width, sregs, read) if len(symbols) else b""
    found = 0
    for at in range(0, len(data) - width + 1, width):
        word = int.from_bytes(data[at : at + width], "little")
        name = symbols.name(word) if word >= KERNEL_MAP else ""
        if name and found < _STACK_NAMES:
            found += 1
            yield name


def _notes(
    number: int, regs: Mapping[str, int], sregs: Mapping[str, Any], ring0_emulated: bool
) -> Iterator[str]:
    if number == SHUTDOWN and regs["rip"] == _RESET_RIP and sregs["cs"]["selector"] == _RESET_CS:
        yield _RESET
    if ring0_emulated:
        yield _EMULATED
