"""The bzImage: its setup header, where its parts lie, and loading it for the 64-bit entry.

It owns the layout of Documentation/arch/x86/boot.rst.  Unpacking the payload is payload.py's
part; what the zero page holds besides the header is linux64.py's.
"""

from __future__ import annotations

import os
from struct import unpack_from

from .. import layout
from ..errors import ConfigError
from ..record import Record
from . import elf
from .linux64 import SETUP_HEADER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .ram import GuestRam

_MIN_VERSION = 0x0208  # the first with payload_offset
_MIN_VERSION_64 = 0x020C  # the first with xloadflags
_XLF_KERNEL_64 = 0x01
_ENTRY_64 = 0x200  # from the start of the protected-mode code
_SECTOR = 512


class BzImage(Record):
    """What the setup header says.  `header` is the header itself, as the zero page wants it."""

    version: int
    code_offset: int  # of the protected-mode code, in the file
    code_size: int
    payload_offset: int  # of the compressed kernel, in the file
    payload_size: int
    entry64: bool
    relocatable: bool
    alignment: int
    pref_address: int
    init_size: int
    initrd_max: int
    header: bytes


def parse(fd: int, name: str) -> BzImage:
    """Read the setup header of the file `fd`; raises ConfigError."""
    page = os.pread(fd, layout.PAGE_SIZE, 0)
    if len(page) < layout.PAGE_SIZE:
        raise _cut_off(name)
    (version,) = unpack_from("<H", page, 0x206)
    if version < _MIN_VERSION:
        raise ConfigError(
            f"kernel {name}: boot protocol {version >> 8}.{version & 0xFF:02} is too old; 2.08 is needed"
        )
    sectors = page[0x1F1] or 4
    (paragraphs,) = unpack_from("<I", page, 0x1F4)
    initrd_max, alignment, relocatable = unpack_from("<IIB", page, 0x22C)
    (xloadflags,) = unpack_from("<H", page, 0x236)
    payload_offset, payload_size = unpack_from("<II", page, 0x248)
    pref_address, init_size = unpack_from("<QI", page, 0x258)
    code = (sectors + 1) * _SECTOR
    image = BzImage(
        version, code, paragraphs * 16, code + payload_offset, payload_size,
        version >= _MIN_VERSION_64 and bool(xloadflags & _XLF_KERNEL_64),
        bool(relocatable), alignment, pref_address, init_size, initrd_max,
        page[SETUP_HEADER : 0x202 + page[0x201]],
    )  # fmt: skip
    if os.fstat(fd).st_size < max(code + 1, image.payload_offset + payload_size):
        raise _cut_off(name)
    return image


def load(fd: int, image: BzImage, ram: GuestRam, name: str) -> tuple[int, int]:
    """Read the protected-mode code into `ram`; return its 64-bit entry and the end of what it uses."""
    if not image.entry64:
        raise ConfigError(
            f"kernel {name}: has no 64-bit entry; protocol=auto unpacks it instead, or take a 64-bit kernel"
        )
    address = _address(image, ram, name)
    size = min(image.code_size, os.fstat(fd).st_size - image.code_offset)
    need = max(size, image.init_size)
    if ram.window(address, need) is None:
        raise elf.does_not_fit(name, address + need, ram)
    ram.fill(address, size, fd, image.code_offset, f"kernel {name}")
    return address + _ENTRY_64, address + need


def _address(image: BzImage, ram: GuestRam, name: str) -> int:
    """The preferred load address, or a lower one for a relocatable kernel that does not fit there."""
    if image.pref_address >= layout.HIMEM and ram.window(image.pref_address, image.init_size) is not None:
        return image.pref_address
    step = image.alignment
    if not image.relocatable or step & (step - 1) or not layout.PAGE_SIZE <= step <= layout.GIB:
        raise elf.does_not_fit(name, image.pref_address + image.init_size, ram)
    return max(step, layout.HIMEM)


def _cut_off(name: str) -> ConfigError:
    return ConfigError(f"kernel {name}: the bzImage is cut off; is the file complete?")
