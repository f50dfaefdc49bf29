"""The own kernel's recipe with stand-ins for tar, make and strip, and its configuration."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.host import kernels, own_kernel

TOOLS = {
    "tar": ":",
    "make": """case "$*" in
*allnoconfig*) grep -v "${DROP:-nothing}" pyvmm.config >.config ;;
*) [ -n "$BROKEN" ] && { echo "fs/x.c: error"; exit 2; }
    mkdir -p include/config; echo 6.1.0-pyvmm >include/config/kernel.release
    echo "  CC      init/main.o"; echo elf >vmlinux; echo map >System.map ;;
esac""",
    "strip": 'cp vmlinux "$3"',
}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in TOOLS.items():
        (folder / name).write_text(f'#!/bin/sh\necho {name} >>"$STATE/calls"\n{body}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("STATE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "_boot", lambda: iter(()))
    (tmp_path / "linux.tar.xz").write_bytes(b"source")
    return str(tmp_path / "linux.tar.xz")


def calls(source: str) -> int:
    return len((Path(source).parent / "calls").read_text().splitlines())


def test_built_once_per_source(source: str) -> None:
    kernel = own_kernel.build(source)
    assert kernel == kernels.find_kernel("own")
    assert kernel.release.startswith("6.1.0-pyvmm-")
    assert sorted(os.listdir(os.path.dirname(kernel.path))) == ["System.map", "config", "vmlinux"]
    before = calls(source)
    assert own_kernel.build(source) == kernel
    assert calls(source) == before
    Path(source).write_bytes(b"newer source")
    assert own_kernel.build(source).release != kernel.release


def test_two_at_once_build_once(source: str) -> None:
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(own_kernel.build, [source, source])
    assert first == second
    assert (Path(source).parent / "calls").read_text().count("tar\n") == 1


def test_old_builds_are_forgotten(source: str) -> None:
    for text in ("a", "b", "c"):
        Path(source).write_text(text)
        own_kernel.build(source)
    assert len([kernel for kernel in kernels.find_kernels() if kernel.source == "own"]) == own_kernel.KEPT


def test_a_failure_names_the_log_and_leaves_no_kernel(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(
        ConfigError, match=r"make failed with status 2; its output is in (.*build\.log)"
    ) as caught:
        own_kernel.build(source)
    log = str(caught.value).rpartition(" ")[2]
    assert "fs/x.c: error" in Path(log).read_text()
    assert sorted(os.listdir(os.path.dirname(log))) == [".lock", "build.log"]


def test_a_dropped_option_is_named(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DROP", "FUSE_DAX")
    with pytest.raises(ConfigError, match="Kconfig drops CONFIG_FUSE_DAX=y"):
        own_kernel.build(source)


def test_a_missing_source_names_the_package() -> None:
    with pytest.raises(ConfigError, match="apt-get install linux-source"):
        own_kernel.build("/nowhere/linux.tar.xz")


def test_the_configuration_has_what_is_promised() -> None:
    lines = own_kernel.wanted_lines(Path(own_kernel.config_path()).read_text())
    assert len(lines) == len(set(lines))
    promised = (
        "SMP PVH KVM_GUEST ACPI PCI_MSI VIRTIO_PCI VIRTIO_FS VIRTIO_BLK VIRTIO_CONSOLE HW_RANDOM_VIRTIO "
        "VIRTIO_NET VIRTIO_VSOCKETS EXT4_FS OVERLAY_FS SERIAL_8250_CONSOLE DEVTMPFS TMPFS PROC_FS SYSFS "
        "UNIX INET BLK_DEV_INITRD"
    )
    assert {f"CONFIG_{name}=y" for name in promised.split()} <= set(lines)
    assert "CONFIG_NR_CPUS=32" in lines
