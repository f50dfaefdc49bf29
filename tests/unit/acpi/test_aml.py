"""Encodings against the bytes that ACPI 6.4 chapter 20 and section 6.4 give."""

from __future__ import annotations

import pytest

from pyvmm.acpi import aml


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0xFFFF, "0bffff"),
        (0x1_0000, "0c00000100"),
        (1 << 32, "0e0000000001000000"),
    ],
)
def test_integers_take_the_shortest_form(value: int, data: str) -> None:
    assert aml.integer(value).hex() == data


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("_SB", b"_SB_"),
        ("\\_S5", b"\\_S5_"),
        ("_SB.PCI0", b"\x2e_SB_PCI0"),
        ("\\A.B.C", b"\\\x2f\x03A___B___C___"),
    ],
)
def test_name_paths(text: str, data: bytes) -> None:
    assert aml.path(text) == data


def test_long_names_are_refused() -> None:
    with pytest.raises(ValueError, match="TOOLONG"):
        aml.path("TOOLONG")


@pytest.mark.parametrize(
    "size", [0, 1, 61, 62, 63, 64, 4092, 4093, 4094, 1 << 16, (1 << 20) - 5, 1 << 20, 1 << 24]
)
def test_package_length_counts_itself(size: int) -> None:
    data = aml.package_length(size)
    extra = data[0] >> 6
    assert len(data) == 1 + extra
    total = data[0] & 0x3F
    if extra:
        assert data[0] & 0x30 == 0
        total = data[0] & 0xF | int.from_bytes(data[1:], "little") << 4
    assert total == size + len(data)


def test_a_package_beyond_28_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        aml.package_length(1 << 28)


def test_eisa_id() -> None:
    assert aml.eisa_id("PNP0A08").hex() == "0c41d00a08"
    assert aml.eisa_id("PNP0501").hex() == "0c41d00501"


def test_uuid_has_little_endian_fields() -> None:
    data = aml.uuid("33DB4D5B-1FF7-401C-9657-7441C03DD766")
    assert data[-16:].hex() == "5b4ddb33f71f1c4096577441c03dd766"


def test_resource_template_ends_with_an_end_tag() -> None:
    assert aml.resources(aml.io(0x3F8, 8)).hex() == "110d0a0a" + "4701f803f8030108" + "7900"


def test_window_lengths() -> None:
    for width, size in ((2, 16), (4, 26), (8, 46)):
        data = aml.window(aml.MEMORY, 0x1000, 0x100, width)
        assert len(data) == size
        assert int.from_bytes(data[1:3], "little") == size - 3
        fields = [int.from_bytes(data[6 + width * i : 6 + width * (i + 1)], "little") for i in range(5)]
        assert fields == [0, 0x1000, 0x10FF, 0, 0x100]
