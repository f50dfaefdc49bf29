"""Recognise a kernel file by its first bytes, and say what a foreign one is.

It owns the table of magic numbers.  It reads nothing beyond what it is given and does not
load anything.
"""

from __future__ import annotations

from ..errors import ConfigError

HEAD = 0x1000  # bytes of the file that `identify` wants
ELF, BZIMAGE = "elf", "bzimage"

_ARM_HINT = "is an ARM kernel; this host needs one for x86-64"
_UNPACK = "is compressed by itself; unpack it ({} -d) and give the result"
# Offset, magic, what to say.  The first row that matches decides.
_FOREIGN = (
    (0x38, b"ARM\x64", "is an AArch64 Image; this host needs a kernel for x86-64"),
    (0x38, b"RSC\x05", "is a RISC-V Image; this host needs a kernel for x86-64"),
    (0x24, b"\x18\x28\x6f\x01", _ARM_HINT),
    (0, b"\x27\x05\x19\x56", "is a U-Boot image; a vmlinux or bzImage is needed"),
    (0, b"MZ", "is an EFI program, no kernel with a boot protocol; a vmlinux or bzImage is needed"),
    (0, b"\x1f\x8b", _UNPACK.format("gzip")),
    (0, b"\xfd7zXZ\x00", _UNPACK.format("xz")),
    (0, b"\x28\xb5\x2f\xfd", _UNPACK.format("zstd")),
    (0, b"BZh", _UNPACK.format("bzip2")),
    (0, b"\x04\x22\x4d\x18", _UNPACK.format("lz4")),
    (0, b"\x02\x21\x4c\x18", _UNPACK.format("lz4")),
    (0, b"0707", "is a cpio archive; give it as initramfs, and a vmlinux or bzImage as kernel"),
    (0, b"QFI\xfb", "is a qcow2 disk image; a vmlinux or bzImage is needed"),
    (0, b"!<arch>\n", "is an archive (a Debian package?); unpack it and give the vmlinux or vmlinuz in it"),
    (0, b"#!", "is a script; a vmlinux or bzImage is needed"),
)


def identify(head: bytes, name: str) -> str:
    """ELF or BZIMAGE from a file's first HEAD bytes; ConfigError names anything else."""
    if head[:4] == b"\x7fELF":
        return ELF
    if head[0x202:0x206] == b"HdrS" and head[0x1FE:0x200] == b"\x55\xaa":
        return BZIMAGE
    if not head:
        raise ConfigError(f"kernel {name}: is empty; a vmlinux or bzImage is needed")
    for offset, magic, told in _FOREIGN:
        if head[offset : offset + len(magic)] == magic:
            raise ConfigError(f"kernel {name}: {told}")
    raise ConfigError(f"kernel {name}: is no kernel that is known here; a vmlinux (ELF) or bzImage is needed")
