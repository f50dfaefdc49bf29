"""Guests of a few bytes on the real KVM: 64-bit ring 0 with paging, an IDT and a handler.

It owns the layout below and a recorder of accesses.  Machine code is written as hex of the
instructions in `Code`, so that a test reads as what its guest does.
"""

from __future__ import annotations

import struct

from pyvmm._native import kvm, memory

RAM_SIZE = 2 << 20
CODE, HANDLER, DATA = 0x1000, 0x2000, 0x4000
PML4, PDPT, LOW_PAGES, HIGH_PAGES = 0x10000, 0x11000, 0x12000, 0x13000
GDT, IDT, TSS, STACK = 0x14000, 0x15000, 0x16000, 0x80000
MMIO = 0xC000_0000  # mapped by the page tables, no memory behind it
LAPIC = 0xFEE0_0000
LAPIC_SVR, LAPIC_EOI = 0xF0, 0xB0
VECTOR = 0x41
ACCESS_BYTES = {1: "{:02x}", 2: "66{:02x}", 4: "{:02x}", 8: "48{:02x}"}


class Code:
    """Instructions as bytes; addresses and values in registers as their names say."""

    HLT, STI, CLI, IRETQ, SPIN, CLD, UD2 = (
        bytes.fromhex(text) for text in ("f4", "fb", "fa", "48cf", "ebfe", "fc", "0f0b")
    )
    JUMP_RBX = bytes.fromhex("ffe3")
    COUNT_RSI = bytes.fromhex("f0ff06")  # lock inc dword [rsi]
    EOI = bytes.fromhex("c70700000000")  # mov dword [rdi], 0; rdi = the APIC's EOI register

    @staticmethod
    def store(width):
        """mov [rbx], al / ax / eax / rax"""
        return bytes.fromhex(ACCESS_BYTES[width].format(0x88 if width == 1 else 0x89) + "03")

    @staticmethod
    def load(width):
        """mov al / ax / eax / rax, [rbx]"""
        return bytes.fromhex(ACCESS_BYTES[width].format(0x8A if width == 1 else 0x8B) + "03")

    @staticmethod
    def out(width):
        """out dx, al / ax / eax"""
        return bytes.fromhex(ACCESS_BYTES[width].format(0xEE if width == 1 else 0xEF))

    @staticmethod
    def inp(width):
        """in al / ax / eax, dx"""
        return bytes.fromhex(ACCESS_BYTES[width].format(0xEC if width == 1 else 0xED))

    @staticmethod
    def outs(width):
        """rep outsb / outsw / outsd: rcx elements from [rsi] to port dx"""
        return b"\xf3" + bytes.fromhex(ACCESS_BYTES[width].format(0x6E if width == 1 else 0x6F))

    @staticmethod
    def ins(width):
        """rep insb / insw / insd: rcx elements from port dx to [rdi]"""
        return b"\xf3" + bytes.fromhex(ACCESS_BYTES[width].format(0x6C if width == 1 else 0x6D))

    @staticmethod
    def repeat(body):
        """body; dec ecx; jnz body"""
        return body + b"\xff\xc9\x75" + struct.pack("b", -(len(body) + 4))


class Recorder:
    """Notes every access as (kind, address, width[, value]); `answers` are given out in order."""

    def __init__(self, answers=()):
        self.seen = []
        self.answers = list(answers)
        self.on_access = None

    def _note(self, *access):
        self.seen.append(access)
        if self.on_access:
            self.on_access(*access)

    def mmio_read(self, address, width):
        self._note("read", address, width)
        return self.answers.pop(0)

    def mmio_write(self, address, width, value):
        self._note("write", address, width, value)

    def io_read(self, port, width):
        self._note("in", port, width)
        return self.answers.pop(0)

    def io_write(self, port, width, value):
        self._note("out", port, width, value)


class TinyGuest:
    """A VM with `RAM_SIZE` bytes of RAM at 0 and vCPUs in 64-bit ring 0 at `CODE`."""

    def __init__(self, irqchip=False):
        self._open = []
        try:
            self.kvm = self._own(kvm.Kvm())
            self.ram = self._own(memory.GuestRegion(RAM_SIZE))
            self.vm = self._own(self.kvm.create_vm())
            self.vm.set_tss_addr(0xFFFB_D000)
            if irqchip:
                self.vm.create_irqchip()
            self.vm.set_memory_region(0, 0, self.ram.size, self.ram.address)
            self._write_tables()
        except BaseException:
            self.close()
            raise

    def _own(self, thing):
        self._open.append(thing)
        return thing

    def write(self, address, data):
        with memoryview(self.ram) as view:
            view[address : address + len(data)] = data

    def read(self, address, length):
        with memoryview(self.ram) as view:
            return bytes(view[address : address + length])

    def vcpu(self, code=b"", *, number=0, at=CODE, **registers):
        """A new vCPU about to run `code` (with `registers`) at `at`."""
        vcpu = self._own(self.vm.create_vcpu(number))
        self.write(at, code)
        vcpu.set_cpuid(self.kvm.supported_cpuid())
        vcpu.set_sregs(long_mode())
        vcpu.set_regs({"rip": at, "rflags": 2, "rsp": STACK - 0x1000 * number, **registers})
        return vcpu

    def interrupt_vcpu(self, code, handler, **registers):
        """A vCPU whose local APIC is on and whose `VECTOR` leads to `handler`."""
        self.write(HANDLER, handler)
        self.write(IDT + 16 * VECTOR, struct.pack("<HHBBHIxxxx", HANDLER, 8, 0, 0x8E, 0, 0))
        vcpu = self.vcpu(code, **registers)
        page = bytearray(vcpu.get_lapic())
        struct.pack_into("<I", page, LAPIC_SVR, 0x1FF)
        vcpu.set_lapic(bytes(page))
        return vcpu

    def _write_tables(self):
        self.write(PML4, struct.pack("<Q", PDPT | 3))
        self.write(PDPT, struct.pack("<4Q", LOW_PAGES | 3, 0, 0, HIGH_PAGES | 3))
        self.write(LOW_PAGES, struct.pack("<Q", 0x83))
        self.write(HIGH_PAGES, struct.pack("<512Q", *((3 << 30 | i << 21) | 0x9B for i in range(512))))
        tss = TSS << 16 | 0x8B << 40 | 0x67
        self.write(GDT, struct.pack("<5Q", 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, tss, 0))
        self.write(TSS + 4, struct.pack("<Q", STACK))

    def close(self):
        while self._open:
            self._open.pop().close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def long_mode():
    """The sregs of 64-bit ring 0 on this module's tables."""
    flat = {"base": 0, "limit": 0xFFFF_FFFF, "present": 1, "dpl": 0, "s": 1, "g": 1}
    data = {**flat, "type": 3, "db": 1, "l": 0}
    code = {**flat, "selector": 8, "type": 11, "db": 0, "l": 1}
    segments = {name: {**data, "selector": 16} for name in ("ds", "es", "fs", "gs", "ss")}
    return {
        "cs": code,
        **segments,
        "tr": {"base": TSS, "limit": 0x67, "selector": 24, "type": 11, "present": 1, "s": 0, "g": 0},
        "gdt": {"base": GDT, "limit": 0x27},
        "idt": {"base": IDT, "limit": 0xFFF},
        "cr0": 0x8000_0033,
        "cr3": PML4,
        "cr4": 0x620,
        "efer": 0x500,
    }
