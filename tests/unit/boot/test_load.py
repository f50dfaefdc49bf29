"""Whole loads into a small RAM: what the guest finds, and what bad input gets."""

from __future__ import annotations

from pathlib import Path
from struct import unpack_from

import pytest
from fakes import kernels

from pyvmm import layout
from pyvmm.boot.cpu import LINUX64, PVH, BootState
from pyvmm.boot.load import load
from pyvmm.boot.ram import GuestRam
from pyvmm.config import PayloadConfig
from pyvmm.errors import ConfigError

MIB = 1 << 20
RAM_SIZE = 32 * MIB
RSDP = layout.ACPI_TABLES


class Machine:
    """RAM, a directory for files, and `boot`."""

    def __init__(self, directory: Path, size: int = RAM_SIZE) -> None:
        self.directory = directory
        self.memory = bytearray(size)
        self.ranges = layout.ram_ranges(size)
        self.ram = GuestRam(memoryview(self.memory), self.ranges)

    def file(self, name: str, data: bytes) -> str:
        path = self.directory / name
        path.write_bytes(data)
        return str(path)

    def boot(self, kernel: bytes, **options: str) -> BootState:
        config = PayloadConfig(self.file("kernel", kernel), **options)
        return load(config, memoryview(self.memory), self.ranges, RSDP)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Machine(tmp_path)


def start_info(machine: Machine, state: BootState) -> tuple[int, ...]:
    return unpack_from("<IIIIQQQQII", machine.memory, state.argument)


def test_pvh(machine: Machine) -> None:
    initramfs = machine.file("initramfs", b"070701" * 1000)
    state = machine.boot(kernels.elf(notes=kernels.pvh_note()), cmdline="console=hvc0", initramfs=initramfs)
    assert (state.protocol, state.entry) == (PVH, kernels.PVH_ENTRY)
    assert machine.memory[kernels.ENTRY : kernels.ENTRY + len(kernels.CODE)] == kernels.CODE
    magic, version, flags, modules, modlist, cmdline, rsdp, memmap, count, reserved = start_info(
        machine, state
    )
    assert (magic, version, flags, modules, rsdp, reserved) == (0x336EC578, 1, 0, 1, RSDP, 0)
    assert machine.memory[cmdline:].split(b"\0", 1)[0] == b"console=hvc0"
    address, size, arguments, _ = unpack_from("<QQQQ", machine.memory, modlist)
    assert (size, arguments, address % 4096) == (6000, 0, 0)
    assert machine.memory[address : address + size] == b"070701" * 1000
    rows = [unpack_from("<QQII", machine.memory, memmap + 24 * index) for index in range(count)]
    assert (0, 0x9FC00, 1, 0) in rows
    assert (MIB, RAM_SIZE - MIB, 1, 0) in rows
    assert (layout.ECAM_BASE, layout.ECAM_SIZE, 2, 0) in rows


def test_no_initramfs_means_no_module(machine: Machine) -> None:
    state = machine.boot(kernels.elf(notes=kernels.pvh_note()))
    assert start_info(machine, state)[3:5] == (0, 0)


@pytest.mark.parametrize(
    ("notes", "protocol"), [(b"", "auto"), (kernels.pvh_note(), "linux64")], ids=["only", "chosen"]
)
def test_linux64(machine: Machine, notes: bytes, protocol: str) -> None:
    initramfs = machine.file("initramfs", b"x" * 5000)
    state = machine.boot(kernels.elf(notes=notes), cmdline="quiet", initramfs=initramfs, protocol=protocol)
    assert (state.protocol, state.entry, state.argument) == (LINUX64, kernels.ENTRY, layout.ZERO_PAGE)
    page = bytes(machine.memory[state.argument : state.argument + 4096])
    assert page[0x202:0x206] == b"HdrS"
    assert page[0x210] == 0xFF
    assert unpack_from("<Q", page, 0x70) == (RSDP,)
    (cmdline,) = unpack_from("<I", page, 0x228)
    assert machine.memory[cmdline:].split(b"\0", 1)[0] == b"quiet"
    address, size = unpack_from("<II", page, 0x218)
    assert machine.memory[address : address + size] == b"x" * 5000
    assert unpack_from("<III", page, 0xC0) == (0, 0, 0)
    rows = [unpack_from("<QQI", page, 0x2D0 + 20 * index) for index in range(page[0x1E8])]
    assert (MIB, RAM_SIZE - MIB, 1) in rows
    assert rows == sorted(rows)


def test_identity_map_covers_4_gib(machine: Machine) -> None:
    machine.boot(kernels.elf())
    entry = lambda table, index: unpack_from("<Q", machine.memory, table + 8 * index)[0]  # noqa: E731
    for address in (0, MIB, 5 * MIB, 1 << 30, (3 << 30) + 12345, (4 << 30) - 1):
        pdpt = entry(layout.BOOT_PML4, address >> 39) & ~0xFFF
        directory = entry(pdpt, address >> 30 & 511) & ~0xFFF
        page = entry(directory, address >> 21 & 511)
        assert page & 0x83 == 0x83
        assert (page & ~0x1FFFFF) + (address & 0x1FFFFF) == address


def test_boot_data_do_not_overlap(machine: Machine) -> None:
    """Everything below 1 MiB that a load writes lies where layout.py says, apart from each other."""
    long = "x" * 2047
    machine.boot(kernels.elf(), cmdline=long, protocol="linux64")
    written = [at for at in range(0, MIB, 16) if any(machine.memory[at : at + 16])]
    allowed = (
        range(layout.BOOT_GDT, layout.BOOT_GDT + 48),
        range(layout.ZERO_PAGE, layout.ZERO_PAGE + 4096),
        range(layout.BOOT_PML4, layout.BOOT_PML4 + 6 * 4096),
        range(layout.CMDLINE, layout.CMDLINE + 2048),
        range(0xFFFF0, 0x100000),
    )
    assert all(any(at in run for run in allowed) for at in written)


@pytest.mark.parametrize("compression", kernels.COMPRESSORS)
def test_bzimage_is_unpacked_by_default(machine: Machine, compression: str) -> None:
    kernel = kernels.elf(notes=kernels.pvh_note())
    state = machine.boot(kernels.bzimage(kernels.payload(kernel, compression)))
    assert (state.protocol, state.entry) == (PVH, kernels.PVH_ENTRY)
    assert machine.memory[kernels.ENTRY : kernels.ENTRY + len(kernels.CODE)] == kernels.CODE
    assert Path(state.vmlinux).read_bytes() == kernel


def test_bzimage_by_its_own_entry(machine: Machine) -> None:
    image = kernels.bzimage(b"payload!" * 100)
    state = machine.boot(image, protocol="bzimage", cmdline="ro")
    assert (state.protocol, state.entry, state.vmlinux) == (LINUX64, 0x100_0000 + 0x200, "")
    assert machine.memory[0x100_0000:0x100_0400] == b"\xf4" * 0x400
    page = machine.memory[layout.ZERO_PAGE : layout.ZERO_PAGE + 4096]
    assert page[0x1F1:0x20F] == image[0x1F1:0x20F]
    assert unpack_from("<QI", page, 0x258) == (0x100_0000, 0x20_0000)


def test_bzimage_moves_down_when_it_does_not_fit_where_it_wants(tmp_path: Path) -> None:
    small = Machine(tmp_path, 16 * MIB)
    state = small.boot(kernels.bzimage(b"p" * 100), protocol="bzimage")
    assert state.entry == 0x20_0000 + 0x200


def test_initramfs_stays_below_the_limit_of_the_header(machine: Machine) -> None:
    initramfs = machine.file("initramfs", b"i" * 9000)
    image = kernels.bzimage(b"p", initrd_max=0x17F_FFFF)
    machine.boot(image, protocol="bzimage", initramfs=initramfs)
    address, size = unpack_from("<II", machine.memory, layout.ZERO_PAGE + 0x218)
    assert address + size <= 0x180_0000
    assert address >= 0x120_0000


def test_32_bit_kernel_with_pvh(machine: Machine) -> None:
    state = machine.boot(kernels.elf(notes=kernels.pvh_note(width=4), bits=32))
    assert (state.protocol, state.entry) == (PVH, kernels.PVH_ENTRY)


def test_note_alignment_of_8(machine: Machine) -> None:
    owner = kernels.note(b"GNU\0", 5, b"\1" * 12, 8) + kernels.note(
        b"Xen\0", 18, kernels.PVH_ENTRY.to_bytes(8, "little"), 8
    )
    data = bytearray(kernels.elf(notes=owner))
    data[64 + 56 + 48] = 8  # p_align of the second program header
    assert machine.boot(bytes(data)).protocol == PVH


GOOD = kernels.elf(notes=kernels.pvh_note())
PAGE = b"\0" * 4096

BAD = {
    "empty": (b"", {}, "is empty"),
    "text": (b"hello, this is a file of text\n" * 10, {}, "no kernel that is known"),
    "script": (b"#!/bin/sh\n", {}, "script"),
    "gzip": (b"\x1f\x8b\x08" + PAGE, {}, "gzip -d"),
    "arm64": (PAGE[:0x38] + b"ARM\x64" + PAGE, {}, "AArch64"),
    "arm": (PAGE[:0x24] + b"\x18\x28\x6f\x01" + PAGE, {}, "ARM"),
    "efi": (b"MZ" + PAGE, {}, "EFI program"),
    "cpio": (b"070701" + PAGE, {}, "give it as initramfs"),
    "qcow2": (b"QFI\xfb" + PAGE, {}, "disk image"),
    "elf-aarch64": (kernels.elf(machine=183), {}, "is for AArch64"),
    "elf-unknown": (kernels.elf(machine=12345), {}, "machine 12345"),
    "elf-x32": (kernels.elf(bits=32, machine=62), {}, "do not fit each other"),
    "elf-object": (kernels.elf(kind=1), {}, "no executable"),
    "elf-header-cut": (GOOD[:40], {}, "header is cut off"),
    "elf-table-cut": (GOOD[:100], {}, "program headers are cut off"),
    "elf-segment-cut": (GOOD[:0x1200], {}, "a segment ends at byte"),
    "elf-nothing": (kernels.elf([]), {}, "nothing to load"),
    "elf-low": (kernels.elf([(0x8000, b"x", 1)], entry=0x8000), {}, "wants to lie at 0x8000"),
    "elf-big": (kernels.elf([(MIB, b"x", 64 * MIB)]), {}, "--memory size=81M"),
    "elf-high": (kernels.elf([(1 << 40, b"x", 1)]), {}, "where no RAM can be"),
    "elf-wrapping": (kernels.elf([((1 << 64) - 4096, b"x", 4096)]), {}, "where no RAM can be"),
    "elf-inverted": (kernels.elf([(MIB, b"x" * 100, 10)]), {}, "larger in the file"),
    "elf-entry": (kernels.elf(entry=0x50_0000), {}, "lies outside its segments"),
    "elf-pvh-entry": (kernels.elf(notes=kernels.pvh_note(0x50_0000)), {}, "lies outside its segments"),
    "elf-no-pvh": (kernels.elf(), {"protocol": "pvh"}, "no PVH entry note"),
    "elf-32": (kernels.elf(bits=32), {}, "no known entry"),
    "elf-as-bzimage": (GOOD, {"protocol": "bzimage"}, "use auto"),
    "bz-cut": (kernels.bzimage(kernels.payload(GOOD, "gzip"))[:-400], {}, "cut off"),
    "bz-header-cut": (kernels.bzimage(b"")[:0x300], {}, "cut off"),
    "bz-old": (kernels.bzimage(b"", version=0x0204), {}, "2.04 is too old"),
    "bz-unknown": (kernels.bzimage(b"WHATISIT" * 50), {}, "no compression that is known"),
    "bz-size": (kernels.bzimage(kernels.payload(GOOD, "xz")[:-1] + b"\x7f"), {}, "claims to unpack"),
    "bz-short": (
        kernels.bzimage(kernels.lz4_legacy(GOOD) + b"\0\1\0\0"),
        {},
        "does not unpack to 256 bytes",
    ),
    "bz-32": (kernels.bzimage(b"p", xloadflags=0), {"protocol": "bzimage"}, "no 64-bit entry"),
    "bz-big": (
        kernels.bzimage(b"p", init_size=64 * MIB, relocatable=0),
        {"protocol": "bzimage"},
        "--memory size=96M",
    ),
    "bz-no-elf": (kernels.bzimage(kernels.payload(b"not an ELF file" * 9, "gzip")), {}, "ELF header"),
    "cmdline-long": (GOOD, {"cmdline": "x" * 2048}, "at most 2047"),
    "cmdline-nul": (GOOD, {"cmdline": "a\0b"}, "NUL"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_in_one_line(machine: Machine, case: str) -> None:
    data, options, told = BAD[case]
    with pytest.raises(ConfigError) as caught:
        machine.boot(data, **options)
    message = str(caught.value)
    assert told in message
    assert "\n" not in message
    assert message.startswith(("--cmdline", f"kernel {machine.directory}"))


@pytest.mark.parametrize("compression", kernels.COMPRESSORS)
@pytest.mark.parametrize("harm", ["cut", "flipped"])
def test_damaged_payload(machine: Machine, compression: str, harm: str) -> None:
    data = bytearray(kernels.payload(kernels.elf([(MIB, bytes(range(251)) * 400, 100400)]), compression))
    middle = len(data) // 2
    if harm == "cut":
        del data[middle:-4]
    else:
        data[middle : middle + 8] = bytes(byte ^ 0xFF for byte in data[middle : middle + 8])
    with pytest.raises(ConfigError, match=r"damaged|does not unpack|nothing to load|cut off|segment"):
        machine.boot(kernels.bzimage(bytes(data)))
    assert not list((machine.directory / "cache").rglob("*-*"))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(bytes(40 * MIB)), "do not fit.*--memory size="),
        (lambda path: path.write_bytes(bytes(RAM_SIZE - MIB)), "do not fit.*--memory size="),
    ],
)
def test_bad_initramfs(machine: Machine, make: object, told: str) -> None:
    path = machine.directory / "initramfs"
    make(path)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=told):
        machine.boot(GOOD, initramfs=str(path))


def test_bad_kernel_paths(machine: Machine) -> None:
    for path, told in (
        (str(machine.directory), "is a directory"),
        ("/nonexistent", "No such"),
        ("a\0b", "null"),
    ):
        with pytest.raises(ConfigError, match=told):
            load(PayloadConfig(path), memoryview(machine.memory), machine.ranges, RSDP)


def test_no_descriptor_is_left(machine: Machine) -> None:
    count = lambda: len(list(Path("/proc/self/fd").iterdir()))  # noqa: E731
    before = count()
    for data in (
        GOOD,
        kernels.elf(machine=8),
        kernels.bzimage(kernels.payload(GOOD, "xz")),
        kernels.bzimage(b"x" * 99),
    ):
        try:
            machine.boot(data)
        except ConfigError:
            continue
    assert count() == before
