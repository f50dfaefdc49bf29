"""Put a kernel, its command line and its initramfs into guest RAM, ready to run.

It owns the choice of boot protocol and the places of command line and initramfs.  Formats and
protocols are its neighbours' (elf, bzimage, payload, pvh, linux64), of which those for other than
ELF files and PVH are loaded when needed; it does not know KVM.
"""

from __future__ import annotations

import os

from .. import layout
from ..errors import ConfigError
from ..files import open_file
from ..record import Record
from . import cpu, elf, firmware, image, pvh
from .cpu import LINUX64, PVH, BootState
from .ram import GuestRam

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..config import PayloadConfig
    from ..layout import RamRange
    from .bzimage import BzImage

CMDLINE_LIMIT = 2047  # COMMAND_LINE_SIZE - 1 in Linux, which cuts longer ones silently
_NOWHERE = (0, 0)
_4GIB = 1 << 32


class _Job(Record):
    """One load: what is wanted, where it goes, and the guest addresses that are known already."""

    config: PayloadConfig
    ram: GuestRam
    cmdline: int
    rsdp: int


def load(
    config: PayloadConfig, view: memoryview, ranges: Sequence[RamRange], rsdp: int, ram_fd: int = -1
) -> BootState:
    """Load what `config` names into the RAM `view` and say how the first CPU starts.

    `rsdp` is the guest address of the ACPI root pointer, `ram_fd` the RAM's file if it has
    one.  Raises ConfigError for whatever is wrong with the files, OSError never.
    """
    ram = GuestRam(view, ranges, ram_fd)
    job = _Job(config, ram, _place_cmdline(ram, config.cmdline), rsdp)
    fd = _open("kernel", config.kernel)
    try:
        state = _load_kernel(fd, job)
    except OSError as error:
        raise ConfigError(f"kernel {config.kernel}: {error.strerror}") from error
    finally:
        os.close(fd)
    cpu.write_gdt(ram, state)
    firmware.write(ram)
    return state


def _load_kernel(fd: int, job: _Job) -> BootState:
    name, protocol = job.config.kernel, job.config.protocol
    kind = image.identify(os.pread(fd, image.HEAD, 0), name)
    if kind == image.ELF:
        if protocol == "bzimage":
            raise ConfigError(f"kernel {name}: is an ELF file, so protocol=bzimage cannot be; use auto")
        return _load_elf(fd, job, name)
    from . import bzimage, payload

    boot = bzimage.parse(fd, name)
    if protocol == "bzimage":
        return _load_bzimage(fd, boot, job)
    unpacked, path = payload.open_vmlinux(fd, boot, name)
    try:
        return _load_elf(unpacked, job, path)
    finally:
        os.close(unpacked)


def _load_elf(fd: int, job: _Job, vmlinux: str) -> BootState:
    name, ram = job.config.kernel, job.ram
    kernel = elf.parse(fd, name)
    protocol = _choose(kernel, job.config.protocol, name)
    elf.load(fd, kernel, ram, layout.HIMEM, name)
    entry = kernel.pvh_entry if protocol == PVH and kernel.pvh_entry is not None else kernel.entry
    if not any(segment.paddr <= entry < segment.end for segment in kernel.loads):
        raise ConfigError(f"kernel {name}: its entry {entry:#x} lies outside its segments; is it a vmlinux?")
    initramfs = _load_initramfs(job.config.initramfs, ram, kernel.end, _4GIB)
    if protocol == PVH:
        argument = pvh.write(ram, job.cmdline, initramfs, job.rsdp)
    else:
        from . import linux64

        argument = linux64.write(ram, linux64.default_header(), job.cmdline, initramfs, job.rsdp)
    return BootState(protocol, entry, argument, vmlinux)


def _load_bzimage(fd: int, boot: BzImage, job: _Job) -> BootState:
    from . import bzimage, linux64

    entry, end = bzimage.load(fd, boot, job.ram, job.config.kernel)
    initramfs = _load_initramfs(job.config.initramfs, job.ram, end, boot.initrd_max + 1)
    argument = linux64.write(job.ram, boot.header, job.cmdline, initramfs, job.rsdp)
    return BootState(LINUX64, entry, argument)


def _choose(kernel: elf.Elf, wanted: str, name: str) -> str:
    """The entry to use: PVH where the kernel has it, since it needs the least around it."""
    if wanted in ("auto", PVH) and kernel.pvh_entry is not None:
        return PVH
    if wanted == PVH:
        raise ConfigError(
            f"kernel {name}: has no PVH entry note; build it with CONFIG_PVH=y or use protocol=auto"
        )
    if kernel.bits != 64:
        raise ConfigError(
            f"kernel {name}: is 32-bit and has no PVH entry, so no known entry; build it with CONFIG_PVH=y"
        )
    return LINUX64


def _place_cmdline(ram: GuestRam, text: str) -> int:
    data = text.encode("utf-8", "surrogateescape")
    if len(data) > CMDLINE_LIMIT:
        raise ConfigError(f"--cmdline: {len(data)} bytes; Linux takes at most {CMDLINE_LIMIT}")
    if b"\0" in data:
        raise ConfigError("--cmdline: contains a NUL character; remove it")
    ram.write(layout.CMDLINE, data + b"\0")
    return layout.CMDLINE


def _load_initramfs(path: str, ram: GuestRam, lowest: int, limit: int) -> tuple[int, int]:
    """Read the initramfs to the top of low RAM; return its guest address and size in bytes.

    It must lie between `lowest`, the kernel's end, and `limit`.
    """
    if not path:
        return _NOWHERE
    fd = _open("initramfs", path)
    try:
        size = os.fstat(fd).st_size
        if size == 0:
            raise ConfigError(f"initramfs {path}: is empty; leave the option out or give a cpio archive")
        address = (min(ram.low_top, limit) - size) // layout.PAGE_SIZE * layout.PAGE_SIZE
        if address < lowest or ram.window(address, size) is None:
            top, wanted = min(ram.low_top, limit), (lowest + size >> 20) + 32
            raise ConfigError(
                f"initramfs {path}: its {size} bytes do not fit between the kernel's end, {lowest:#x}, "
                f"and the end of RAM, {top:#x}; give at least --memory size={wanted}M"
            )
        ram.fill(address, size, fd, 0, f"initramfs {path}")
    except OSError as error:
        raise ConfigError(f"initramfs {path}: {error.strerror}") from error
    finally:
        os.close(fd)
    return address, size


def _open(what: str, path: str) -> int:
    return open_file(f"{what} {path}", path, "a readable file is needed")
