"""Names from ELF files and System.map, good and broken."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import kernels

from pyvmm.boot.cpu import BootState
from pyvmm.boot.symbols import KERNEL_MAP, Symbols, find, from_elf, from_system_map

START = KERNEL_MAP + 0x100_0000
TABLE = [("startup_64", START, 0x40), ("panic", START + 0x100, 0x80), ("_etext", START + 0x1000, 0)]
MAP = (
    f"{START:016x} T startup_64\n{START + 0x80:016x} D some_data\n"
    f"{START + 0x100:016x} t panic\n{START + 0x1000:016x} T _etext\n"
)
BARE = "ffffffffffffffff B The real System.map is in the linux-image-<version>-dbg package\n"


@pytest.fixture(params=["elf", "map"])
def symbols(request: pytest.FixtureRequest, tmp_path: Path) -> Symbols:
    path = tmp_path / "file"
    if request.param == "elf":
        path.write_bytes(kernels.elf(symbols=TABLE))
        return from_elf(str(path))
    path.write_text(MAP)
    return from_system_map(str(path))


def test_names(symbols: Symbols) -> None:
    assert symbols.name(START) == "startup_64+0x0/0x100"
    assert symbols.name(START + 0x123) == "panic+0x23/0xf00"
    assert symbols.name(0x100_0123) == "panic+0x23/0xf00"
    assert symbols.name(START - 1) == ""
    assert symbols.name(START + 0x1000) == ""
    assert symbols.name(0) == ""


def test_a_stripped_file_has_none(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(kernels.elf())
    assert not len(from_elf(str(path)))


def test_find_prefers_the_elf_file_and_falls_back_to_the_map(tmp_path: Path) -> None:
    kernel, vmlinux = tmp_path / "vmlinuz-6.1-x", tmp_path / "cached"
    state = BootState("pvh", 0, 0, str(vmlinux))
    assert not len(find(str(kernel), state))
    (tmp_path / "System.map-6.1-x").write_text(MAP.replace("panic", "oops"))
    assert find(str(kernel), state).name(START + 0x100).startswith("oops")
    vmlinux.write_bytes(kernels.elf(symbols=TABLE))
    assert find(str(kernel), state).name(START + 0x100).startswith("panic")
    (tmp_path / "System.map").write_text(MAP)
    assert find(str(tmp_path / "vmlinux"), BootState("pvh", 0, 0)).name(START + 0x100).startswith("panic")


def test_a_kernel_that_moved_itself_has_no_names(tmp_path: Path) -> None:
    (tmp_path / "System.map").write_text(MAP)
    assert not len(find(str(tmp_path / "bzImage"), BootState("linux64", 0, 0)))


@pytest.mark.parametrize("text", [BARE, "", "garbage\n", "zzzz T name\n", "\0\0\0"])
def test_useless_maps_are_no_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "System.map").write_text(text)
    assert find(str(tmp_path / "vmlinux"), BootState("pvh", 0, 0)).name(START) == ""


def test_a_damaged_symbol_table_is_no_error(tmp_path: Path) -> None:
    data = kernels.elf(symbols=TABLE)
    path = tmp_path / "vmlinux"
    for at in range(0, 64, 2):
        path.write_bytes(data[:at] + b"\xff\xff" + data[at + 2 :])
        find(str(path), BootState("pvh", 0, 0, str(path)))
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        find(str(path), BootState("pvh", 0, 0, str(path)))
