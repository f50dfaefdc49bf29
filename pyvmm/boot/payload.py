"""The compressed kernel inside a bzImage: unpack it on the host, once.

It owns the compression formats of Linux's scripts/Makefile.lib and the cache of unpacked
files.  A guest that starts from the unpacked ELF skips its own decompressor, which is most
of an emulated boot and a good part of a fast one.

A cache entry is named by the kernel's file name, size, modification time, inode and the CRC
of its first 64 KiB, where the setup header holds version and build date.  Hashing all of
the file would say no more and costs seconds on an emulated host.  Device numbers and
directories are left out, since the same file seen through virtio-fs has others.  Entries appear
by rename, so a reader never sees half of one, and only the newest few are kept.
"""

from __future__ import annotations

import os
from struct import unpack_from
from time import time

from .. import cache, log
from ..ending import give_way, waiting
from ..errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Protocol

    from .bzimage import BzImage

    _Method = Callable[[memoryview], Iterator[bytes]]

    class _Engine(Protocol):
        """The part of their interface that all decompressor objects share."""

        @property
        def eof(self) -> bool: ...
        def decompress(self, data: memoryview, /) -> bytes: ...


CACHE_ENTRIES = 4
MAX_UNPACKED = 1 << 30
_LZ4_BLOCK = 8 << 20  # lz4 -l writes blocks of this size (lib/decompress_unlz4.c)
_STEP = 1 << 20
_CRC_BYTES = 64 << 10
_STALE_SECONDS = 3600
_TEMPORARY = ".unpacking-"


def unpack(data: memoryview) -> Iterator[bytes]:
    """Pieces of the kernel in `data`, a whole payload.  Raises ConfigError with the cause alone.

    All formats but gzip, which has it already, are followed by the unpacked size in four
    bytes (size_append in scripts/Makefile.lib); decompressors must not see those.
    """
    name, method = _format(data)
    body = data if method is _gzip else data[:-4]
    try:
        yield from method(body)
    except ImportError as error:
        raise ConfigError(
            f"its payload is {name} data, and Python's module {error.name} for that is not installed"
        ) from error
    except Exception as error:  # each decompressor has its own class, most derive from Exception only
        raise ConfigError(f"its {name} payload is damaged: {error}") from error


def open_vmlinux(fd: int, image: BzImage, path: str, directory: str | None = None) -> tuple[int, str]:
    """Return a descriptor of the unpacked kernel and its path ("" when it could not be kept).

    `fd` and `path` are the bzImage.  The caller closes the descriptor.  Raises ConfigError.
    """
    where = cache.directory("vmlinux") if directory is None else directory
    entry = os.path.join(where, _key(fd, path))
    (size,) = unpack_from(
        "<I", os.pread(fd, 4, image.payload_offset + image.payload_size - 4).ljust(4, b"\0")
    )
    cached = _open_cached(entry, size)
    if cached is not None:
        return cached, entry
    log.info(f"unpacking {path}")
    target, temporary = _create(where)
    try:
        with waiting():
            _unpack_into(target, fd, image, path, size)
        os.lseek(target, 0, os.SEEK_SET)
        if temporary:
            os.rename(temporary, entry)
            _prune(where, entry)
    except BaseException:
        os.close(target)
        if temporary:
            os.unlink(temporary)
        raise
    return target, entry if temporary else ""


def _unpack_into(target: int, fd: int, image: BzImage, path: str, size: int) -> None:
    done = 0
    data = memoryview(os.pread(fd, image.payload_size, image.payload_offset))
    try:
        name, _ = _format(data)
        if not 0 < size <= MAX_UNPACKED:
            raise ConfigError(f"its {name} payload claims to unpack to {size} bytes; is the file complete?")
        for piece in unpack(data):
            give_way()
            done += len(piece)
            if done > size:
                break
            _write_all(target, piece)
        if done != size:
            raise ConfigError(f"its {name} payload does not unpack to {size} bytes; is the file complete?")
    except ConfigError as error:
        raise ConfigError(f"kernel {path}: {error}") from error.__cause__


def _format(data: memoryview) -> tuple[str, _Method]:
    """Name and decompressor of a payload by its first bytes."""
    for magic, name, method in _FORMATS:
        if data[: len(magic)] == magic:
            return name, method
    start = bytes(data[:4]).hex(" ")
    raise ConfigError(f"its payload begins with {start}, which is no compression that is known here")


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _key(fd: int, path: str) -> str:
    from zlib import crc32

    facts = os.fstat(fd)
    crc = crc32(os.pread(fd, _CRC_BYTES, 0))
    return f"{os.path.basename(path)[:80]}-{facts.st_size:x}-{facts.st_mtime_ns:x}-{facts.st_ino:x}-{crc:08x}"


def _open_cached(entry: str, size: int) -> int | None:
    try:
        fd = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(fd).st_size == size:
        try:
            os.utime(fd)  # entries are thrown away by age of use
        except OSError:
            log.debug(f"{entry}: its time of use cannot be set")
        return fd
    os.close(fd)
    return None


def _create(directory: str) -> tuple[int, str]:
    """A new file in the cache, or an anonymous one with an empty name where that cannot be."""
    name = os.path.join(directory, f"{_TEMPORARY}{os.getpid()}-{os.urandom(4).hex()}")
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), name
    except OSError as error:
        log.info(f"unpacked kernels are not kept: {directory}: {error.strerror}")
        return os.memfd_create("vmlinux", os.MFD_CLOEXEC), ""


def _prune(directory: str, keep: str) -> None:
    """Remove all but the newest entries, and what interrupted runs left behind.

    Another process may be doing the same; what this one leaves, the next one removes.
    """
    now = time()
    try:
        with os.scandir(directory) as found:
            files = [
                (entry.stat(follow_symlinks=False).st_mtime, entry.path, entry.name)
                for entry in found
                if entry.is_file()
            ]
        finished = sorted((item for item in files if not item[2].startswith(_TEMPORARY)), reverse=True)
        stale = [item for item in files if item[2].startswith(_TEMPORARY) and now - item[0] > _STALE_SECONDS]
        for _, path, _ in finished[CACHE_ENTRIES:] + stale:
            if path != keep:
                os.unlink(path)
    except OSError as error:
        log.debug(f"{directory}: {error.strerror}")


def _gzip(data: memoryview) -> Iterator[bytes]:
    from zlib import decompressobj

    return _stream(decompressobj(31), data)


def _xz(data: memoryview) -> Iterator[bytes]:
    from lzma import FORMAT_XZ, LZMADecompressor

    return _stream(LZMADecompressor(FORMAT_XZ), data)


def _lzma(data: memoryview) -> Iterator[bytes]:
    from lzma import FORMAT_ALONE, LZMADecompressor

    return _stream(LZMADecompressor(FORMAT_ALONE), data)


def _bzip2(data: memoryview) -> Iterator[bytes]:
    from bz2 import BZ2Decompressor

    return _stream(BZ2Decompressor(), data)


def _zstd(data: memoryview) -> Iterator[bytes]:
    from zstandard import ZstdDecompressor

    # zstd -22 --ultra, as the kernel calls it, uses windows of 128 MiB.
    return _stream(ZstdDecompressor(max_window_size=1 << 31).decompressobj(), data)


def _lz4(data: memoryview) -> Iterator[bytes]:
    """The legacy frame format: the magic, then blocks, each behind its length in four bytes."""
    from lz4.block import decompress

    at = 4
    while at + 4 <= len(data):
        (size,) = unpack_from("<I", data, at)
        at += 4
        if size == _LZ4_MAGIC:
            continue  # another frame follows
        if at + size > len(data) or size == 0:
            raise ValueError("a block is cut off")
        yield decompress(data[at : at + size], uncompressed_size=_LZ4_BLOCK)
        at += size


def _stream(engine: _Engine, data: memoryview) -> Iterator[bytes]:
    """Feed in steps, so that a small file that unpacks to gigabytes is noticed in time."""
    for at in range(0, len(data), _STEP):
        yield engine.decompress(data[at : at + _STEP])
        if engine.eof:
            return
    raise ValueError("it is cut off")


_LZ4_MAGIC = 0x184C_2102
_FORMATS: tuple[tuple[bytes, str, _Method], ...] = (
    (b"\x1f\x8b", "gzip", _gzip),
    (b"\xfd7zXZ\x00", "xz", _xz),
    (b"\x5d\x00\x00", "lzma", _lzma),
    (b"BZh", "bzip2", _bzip2),
    (b"\x02\x21\x4c\x18", "lz4", _lz4),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
)
