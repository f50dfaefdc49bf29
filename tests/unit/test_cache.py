"""The cache that cannot be used: a reason and a cure, and a file that appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvmm import cache
from pyvmm.errors import ConfigError
from pyvmm.guest import initramfs
from pyvmm.host import kernels, own_kernel

CURE = "; set XDG_CACHE_HOME to a writable directory$"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "base"))
    return tmp_path / "base"


def test_a_directory_is_made_once(base: Path) -> None:
    assert cache.make("a", "b") == cache.make("a", "b") == str(base / "pyvmm/a/b")
    assert (base / "pyvmm/a/b").is_dir()


def test_a_file_in_its_place(base: Path) -> None:
    base.write_bytes(b"")
    with pytest.raises(cache.Unusable, match=f"^the cache {base}/pyvmm/a: Not a directory{CURE}"):
        cache.make("a")


def test_a_directory_that_cannot_be_written(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a read-only file system, where root may everything but write."""
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(cache.Unusable, match=f"^the cache {base}/pyvmm/a: is not writable{CURE}"):
        cache.make("a")


def test_whoever_must_keep_something_tells(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base.write_bytes(b"")
    monkeypatch.setattr(kernels, "_run", lambda argv: pytest.fail(f"ran {argv}"))
    (tmp_path / "source").write_bytes(b"")
    for make in (
        lambda: initramfs.for_kernel(None),
        initramfs.compiled_init,
        kernels.fetch_kernel,
        lambda: own_kernel.build(str(tmp_path / "source")),
    ):
        with pytest.raises(ConfigError, match=CURE):
            make()
