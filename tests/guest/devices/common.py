"""What both sides of the device tests do alike: checksums of what passes, files, input devices.

It must stay cheap to load: a guest imports it on an emulated machine.
"""

from __future__ import annotations

import hashlib
import os
import socket
import zlib
from pathlib import Path
from typing import Any

MIB = BLOCK = 1 << 20
STEP = 1021  # coprime to the size of a page, and 1024 of them fit a block


def digest(chunks: Any) -> str:
    """A checksum of an iterable of bytes."""
    total = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        total.update(chunk)
    return total.hexdigest()


def checksum(chunks: Any) -> str:
    """A CRC of an iterable of bytes: four times as fast as `digest` on an emulated machine."""
    total = 0
    for chunk in chunks:
        total = zlib.crc32(chunk, total)
    return f"{total:08x}"


def blocks(path: str | Path, size: int = -1, offset: int = 0) -> Any:
    """The bytes of a file or device, in blocks."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while size and (chunk := file.read(BLOCK if size < 0 else min(size, BLOCK))):
            size -= len(chunk) if size > 0 else 0
            yield chunk


def numbered(megabytes: int, block: bytes | None = None) -> Any:
    """Random blocks that all differ, cheap to make."""
    block = block or os.urandom(BLOCK - 8)
    for number in range(megabytes):
        yield number.to_bytes(8, "little") + block


def distinct(megabytes: int) -> Any:
    """Up to 1024 random blocks of which no two pages are alike, at no cost: windows on two MiB.

    Pages in the wrong order change a checksum, as blocks in the wrong order do.
    """
    base = memoryview(os.urandom(2 * BLOCK))
    for start in range(0, megabytes * STEP, STEP):
        yield base[start : start + BLOCK]


def received(sock: socket.socket, size: int) -> Any:
    """Exactly `size` bytes of a stream, as they arrive."""
    while size:
        chunk = sock.recv(min(size, BLOCK))
        if not chunk:
            raise EOFError(f"{size} bytes are missing")
        size -= len(chunk)
        yield chunk


def sent(sock: socket.socket, chunks: Any) -> Any:
    """Send what passes through."""
    for chunk in chunks:
        sock.sendall(chunk)
        yield chunk


def written(file: Any, chunks: Any) -> Any:
    """Write what passes through."""
    for chunk in chunks:
        assert file.write(chunk) == len(chunk)
        yield chunk


def listing(folder: str | Path) -> list[str]:
    """Names, modes, sizes, link counts and targets."""
    rows = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        status = entry.stat(follow_symlinks=False)
        target = os.readlink(entry.path) if entry.is_symlink() else ""
        rows.append(f"{entry.name} {status.st_mode:o} {status.st_size} {status.st_nlink} {target}")
    return rows


def find_event(device: str) -> str:
    """The event node of an input device."""
    for path in Path("/sys/class/input").glob("event*"):
        if (path / "device/name").read_text().strip() == device:
            return path.name
    raise FileNotFoundError(f"no input device {device}")
