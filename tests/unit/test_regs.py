"""Register tables: widths, halves, and what a guest gets for everything else."""

from __future__ import annotations

import pytest

from pyvmm.regs import Register, RegisterFile

TABLE = (Register(0, 2, "word"), Register(2, 1, "byte", "ro"), Register(8, 8, "wide"))


class Device:
    word, byte, wide = 0x1234, 0x56, 0x1122_3344_5566_7788

    def read_word(self) -> int:
        return self.word

    def write_word(self, value: int) -> None:
        self.word = value

    def read_byte(self) -> int:
        return self.byte

    def read_wide(self) -> int:
        return self.wide

    def write_wide(self, value: int) -> None:
        self.wide = value


@pytest.fixture
def device():
    return Device()


@pytest.fixture
def registers(device, request):
    return RegisterFile(TABLE, device, request.node.name)


@pytest.mark.parametrize(
    ("offset", "width", "value"),
    [(0, 2, 0x1234), (2, 1, 0x56), (8, 8, 0x1122_3344_5566_7788), (8, 4, 0x5566_7788), (12, 4, 0x1122_3344)],
)
def test_reads(registers, offset, width, value):
    assert registers.read(offset, width) == value


def test_halves_are_written_apart(registers, device):
    registers.write(8, 4, 0xAAAA_AAAA)
    assert device.wide == 0x1122_3344_AAAA_AAAA
    registers.write(12, 4, 0xBBBB_BBBB)
    assert device.wide == 0xBBBB_BBBB_AAAA_AAAA
    registers.write(8, 8, 1)
    assert device.wide == 1


def test_read_only(registers, device):
    registers.write(2, 1, 0xFF)
    assert device.byte == 0x56


@pytest.mark.parametrize(("offset", "width"), [(0, 1), (0, 4), (1, 2), (8, 2), (10, 4), (16, 4), (9, 8)])
def test_misfits_are_said_once(registers, device, capfd, offset, width):
    before = dict(vars(device))
    assert registers.read(offset, width) == registers.read(offset, width) == 0
    registers.write(offset, width, 0xFF)
    registers.write(offset, width, 0xFF)
    assert vars(device) == before
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert f"{8 * width}-bit read at {offset:#x}" in lines[0]


def test_missing_handlers_are_found_at_once():
    with pytest.raises(AttributeError, match="read_absent"):
        RegisterFile((Register(0, 2, "absent", "ro"),), Device(), "x")
    with pytest.raises(AttributeError, match="write_byte"):
        RegisterFile((Register(0, 1, "byte"),), Device(), "x")


@pytest.mark.parametrize(
    "table", [(Register(1, 2, "word"),), (Register(0, 2, "word"), Register(0, 2, "byte", "ro"))]
)
def test_bad_tables(table):
    with pytest.raises(ValueError, match="bad register table"):
        RegisterFile(table, Device(), "x")
