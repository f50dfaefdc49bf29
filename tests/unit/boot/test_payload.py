"""The cache of unpacked kernels: hits, identity, atomicity, bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fakes import kernels

from pyvmm.boot import bzimage, payload
from pyvmm.errors import ConfigError

ELF = kernels.elf(notes=kernels.pvh_note())


class Cache:
    """A cache directory and a kernel file."""

    def __init__(self, directory: Path) -> None:
        self.place = directory / "cache"
        self.kernel = directory / "vmlinuz-1"

    def write(self, contents: bytes = ELF) -> None:
        self.kernel.write_bytes(kernels.bzimage(kernels.payload(contents, "gzip")))

    def open(self) -> tuple[bytes, str]:
        fd = os.open(self.kernel, os.O_RDONLY)
        try:
            image = bzimage.parse(fd, str(self.kernel))
            result, path = payload.open_vmlinux(fd, image, str(self.kernel), str(self.place))
        finally:
            os.close(fd)
        with open(result, "rb") as file:
            return file.read(), path

    def names(self) -> list[str]:
        return sorted(os.listdir(self.place))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    cache = Cache(tmp_path)
    cache.write()
    return cache


def test_the_second_time_nothing_is_unpacked(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cache.open()
    monkeypatch.setattr(payload, "unpack", lambda data: pytest.fail("unpacked again"))
    assert cache.open() == first
    assert first[0] == ELF
    assert cache.names() == [os.path.basename(first[1])]


def test_another_kernel_under_the_same_name_is_another_entry(cache: Cache) -> None:
    _, first = cache.open()
    other = kernels.elf([(kernels.ENTRY, b"other" * 100, 0x1000)])
    cache.write(other)
    data, second = cache.open()
    assert data == other
    assert second != first


def test_same_size_and_times_are_told_apart_by_contents(cache: Cache) -> None:
    facts = cache.kernel.stat()
    cache.open()
    data = bytearray(cache.kernel.read_bytes())
    data[0x300] ^= 1  # in the setup code, where the version string is
    cache.kernel.write_bytes(data)
    os.utime(cache.kernel, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    cache.open()
    assert len(cache.names()) == 2


def test_a_cut_off_entry_is_replaced(cache: Cache) -> None:
    _, path = cache.open()
    os.truncate(path, 100)
    assert cache.open() == (ELF, path)
    assert Path(path).read_bytes() == ELF


def test_only_the_last_used_are_kept(cache: Cache) -> None:
    paths = []
    for index in range(payload.CACHE_ENTRIES + 3):
        cache.write(kernels.elf([(kernels.ENTRY, bytes([index]) * (500 + index), 0x1000)]))
        _, path = cache.open()
        os.utime(path, (1000 + index, 1000 + index))
        paths.append(os.path.basename(path))
    assert cache.names() == sorted(paths[-payload.CACHE_ENTRIES :])


def test_left_overs_of_interrupted_runs_go_when_they_are_old(cache: Cache) -> None:
    cache.place.mkdir()
    old, new = cache.place / ".unpacking-1-x", cache.place / ".unpacking-2-x"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache.open()
    assert old.name not in cache.names()
    assert new.name in cache.names()


@pytest.mark.parametrize("failing", ["stat", "unlink"])
def test_another_process_that_removes_the_same_entries_is_no_failure(
    cache: Cache, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.place.mkdir()
    for number in range(9):
        (cache.place / f"old{number}").touch()
    scandir = os.scandir

    @contextmanager
    def scanned(path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        with scandir(path) as found:
            entries = [*found]
        if failing == "stat":
            (cache.place / "old0").unlink()
        yield iter(entries)

    def gone(path: str) -> None:
        raise FileNotFoundError(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scanned)
        if failing == "unlink":
            patch.setattr(os, "unlink", gone)
        assert cache.open()[0] == ELF


def test_a_failure_leaves_nothing(cache: Cache) -> None:
    data = bytearray(kernels.payload(ELF, "gzip"))
    data[-1] = 0x01  # claims 16 MiB
    cache.kernel.write_bytes(kernels.bzimage(bytes(data)))
    with pytest.raises(ConfigError, match="does not unpack to|damaged"):
        cache.open()
    assert cache.names() == []


def test_without_a_place_for_it_the_kernel_still_unpacks(cache: Cache) -> None:
    cache.place.write_text("a file where the directory should be")
    assert cache.open() == (ELF, "")


def test_a_bomb_is_stopped_at_the_size_it_claims(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr(payload, "_write_all", lambda fd, data: written.append(len(data)))
    bomb = kernels.COMPRESSORS["zstd"](bytes(64 << 20)) + (4096).to_bytes(4, "little")
    cache.kernel.write_bytes(kernels.bzimage(bomb))
    with pytest.raises(ConfigError, match="does not unpack to 4096 bytes"):
        cache.open()
    assert cache.names() == []
    assert sum(written) <= 4096


def test_a_missing_decompressor_is_named(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.kernel.write_bytes(kernels.bzimage(kernels.payload(ELF, "zstd")))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match="zstd data, and Python's module zstandard"):
        cache.open()


def test_all_formats_cross_step_boundaries() -> None:
    """Pieces are joined right when data are longer than one step of input and one LZ4 block."""
    data = os.urandom(9 << 17) + bytes(8 << 20) + os.urandom(100)
    for name in kernels.COMPRESSORS:
        packed = memoryview(kernels.payload(data, name))
        assert b"".join(payload.unpack(packed)) == data, name


def test_loading_imports_nothing_slow() -> None:
    """Decompressors cost start-up time and are needed for the first boot of a kernel only."""
    code = (
        "import sys, pyvmm.boot.load; "
        "slow = {'lzma', 'bz2', 'lz4', 'zstandard', 'typing', 're', 'hashlib', 'subprocess'}; "
        "print(*sorted(slow & set(sys.modules)))"
    )
    root = Path(payload.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []
