"""The newc cpio format, as the kernel unpacks it into its first file system.

Pure: entries in, bytes out.  It does not know what an initramfs holds.  The format is in
Linux's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat

from ..record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_TRAILER = "TRAILER!!!"


class Entry(Record):
    """One file: `mode` with its type bits, `device` (major, minor) for device nodes."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str, mode: int = 0o755) -> Entry:
    """A directory; parents must come before their children."""
    return Entry(name, stat.S_IFDIR | mode)


def regular(name: str, data: bytes, mode: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(name, stat.S_IFREG | mode, data)


def character(name: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    """A character device node."""
    return Entry(name, stat.S_IFCHR | mode, device=(major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """All of `entries`, owned by root, with no times: the same input gives the same bytes."""
    parts: list[bytes] = []
    for number, entry in enumerate(entries, 1):
        parts += _member(entry, number)
    parts += _member(Entry(_TRAILER, 0), 0)
    return b"".join(parts)


def _member(entry: Entry, inode: int) -> list[bytes]:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return [_padded(header + name), _padded(entry.data)]


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
