"""The code at the reset vector, decoded byte by byte."""

from __future__ import annotations

from struct import unpack_from

from pyvmm import layout
from pyvmm.boot import firmware
from pyvmm.boot.ram import GuestRam
from pyvmm.legacy.power import ResetRegister


def test_the_code_writes_the_reset_value_to_the_reset_register() -> None:
    calls: list[str] = []
    code = firmware.reset_code()
    assert (code[0], code[3], code[5]) == (0xBA, 0xB0, 0xEE)  # mov dx, imm16; mov al, imm8; out dx, al
    (port,) = unpack_from("<H", code, 1)
    assert port == layout.PORT_RESET
    ResetRegister(lambda: calls.append("reset")).write(0, 1, code[4])
    assert calls == ["reset"]
    assert code[6:] == b"\xf4\xeb\xfd"  # hlt, and back to it


def test_it_lies_where_the_real_mode_jump_ends() -> None:
    size = 16 << 20
    memory = bytearray(size)
    firmware.write(GuestRam(memoryview(memory), layout.ram_ranges(size)))
    at = (0xF000 << 4) + 0xFFF0
    assert memory[at : at + 9] == firmware.reset_code()
    assert at + 9 <= layout.ACPI_TABLES_END
