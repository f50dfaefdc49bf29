"""The initramfs: its contents, and that it is made once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pyvmm import cache
from pyvmm.errors import ConfigError
from pyvmm.guest import initramfs


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)


@pytest.fixture
def compiler() -> None:
    if not shutil.which("cc"):
        pytest.skip("no C compiler (apt-get install gcc libc6-dev)")


@pytest.fixture
def fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that counts its calls and writes four bytes."""
    script = tmp_path / "fake-cc"
    script.write_text(
        f'#!/bin/sh\necho call >>{tmp_path}/calls\nwhile [ "$1" != -o ]; do shift; done\nprintf INIT >"$2"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    return tmp_path / "calls"


def modules(tmp_path: Path) -> str:
    folder = tmp_path / "6.1.0-test"
    folder.mkdir()
    (folder / "virtiofs.ko").write_bytes(b"\x7fELF\0depends=fuse\0")
    (folder / "fuse.ko").write_bytes(b"\x7fELF\0depends=\0")
    return str(folder)


def test_the_archive_lists_modules_in_load_order() -> None:
    data = initramfs.build([("fuse", b"F"), ("virtiofs", b"V")], b"INIT")
    assert b"fuse.ko\nvirtiofs.ko\n" in data
    assert b"modules/virtiofs.ko\0" in data
    assert b"modules" not in initramfs.build([], b"INIT")


def test_made_once(tmp_path: Path, fake_compiler: Path) -> None:
    folder = modules(tmp_path)
    first = initramfs.for_kernel(folder)
    assert initramfs.for_kernel(folder) == first
    assert initramfs.for_kernel(None) != first
    assert fake_compiler.read_text() == "call\n"
    data = Path(first).read_bytes()
    assert b"INIT" in data and b"fuse.ko\nvirtiofs.ko\n" in data


def test_made_again_when_the_modules_change(tmp_path: Path, fake_compiler: Path) -> None:
    folder = modules(tmp_path)
    first = initramfs.for_kernel(folder)
    Path(folder, "modules.builtin").write_text("kernel/fuse.ko\n")
    second = initramfs.for_kernel(folder)
    assert second != first
    assert b"fuse.ko\n" not in Path(second).read_bytes()


def test_old_archives_are_forgotten(tmp_path: Path, fake_compiler: Path) -> None:
    folder = modules(tmp_path)
    for number in range(initramfs.KEPT + 3):
        initramfs.for_kernel(folder, ("fuse", f"wish{number}"))
    assert len(list(cache.entries("initramfs"))) == initramfs.KEPT


def test_a_compiler_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(ConfigError, match="cannot compile the guest's init"):
        initramfs.for_kernel(None)
    assert list(cache.entries("init")) == []
    assert list(cache.entries("initramfs")) == []


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    with pytest.raises(ConfigError, match="apt-get install gcc"):
        initramfs.compiled_init()


def test_a_directory_that_is_none() -> None:
    with pytest.raises(ConfigError, match="/nowhere is no directory"):
        initramfs.for_kernel("/nowhere")


def test_the_init_compiles_without_warnings(compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initramfs, "_COMPILE", (*initramfs._COMPILE, "-Wall", "-Wextra", "-Werror"))
    path = initramfs.compiled_init()
    assert os.access(path, os.X_OK)
    assert Path(path).stat().st_size < 1 << 20


def test_the_init_is_nothing_but_a_first_process(compiler: None) -> None:
    assert os.waitstatus_to_exitcode(os.system(f"{initramfs.compiled_init()} 2>/dev/null")) == 2
