"""Module resolution: on made-up trees, and on Debian's kernel where it is cached."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.guest import initramfs
from pyvmm.guest.modules import ModuleTree, dependencies, read_module
from pyvmm.host import kernels


def module(depends: str) -> bytes:
    """A file that looks like a module to who reads its .modinfo."""
    return b"\x7fELF" + bytes(60) + b"\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    compressed: bytes = zstandard.ZstdCompressor().compress(data)
    return compressed


Compress = Callable[[bytes], bytes]
COMPRESSIONS: dict[str, Compress] = {
    ".ko": bytes,
    ".ko.xz": lzma.compress,
    ".ko.gz": gzip.compress,
    ".ko.zst": zstd,
}


class Tree:
    """Makes lib/modules/RELEASE piece by piece."""

    def __init__(self, root: Path) -> None:
        self.path = root / "6.1.0-test"
        (self.path / "kernel").mkdir(parents=True)
        self.listed: list[str] = []

    def add(self, name: str, depends: str = "", suffix: str = ".ko") -> None:
        (self.path / "kernel" / f"{name}{suffix}").write_bytes(COMPRESSIONS[suffix](module(depends)))
        self.listed.append(f"kernel/{name}.ko")

    def builtin(self, *names: str) -> None:
        (self.path / "modules.builtin").write_text("".join(f"kernel/{name}.ko\n" for name in names))

    def open(self, listed: bool = True) -> ModuleTree:
        if listed:
            (self.path / "modules.order").write_text("".join(f"{line}\n" for line in self.listed))
        return ModuleTree(str(self.path))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def order(tree: ModuleTree, wanted: Sequence[str]) -> list[str]:
    return [name for name, _ in tree.resolve(wanted)]


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_what_a_module_needs_comes_first(tree: Tree, suffix: str, listed: bool) -> None:
    tree.add("virtio_pci", "virtio,virtio_ring,virtio-pci-modern-dev", suffix)
    tree.add("virtio_ring", "", suffix)
    tree.add("virtio", "virtio_ring", suffix)
    tree.add("virtio-pci-modern-dev", "", suffix)
    got = tree.open(listed).resolve(["virtio-pci", "virtio"])
    assert [name for name, _ in got] == ["virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci"]
    assert all(data.startswith(b"\x7fELF") for _, data in got)


def test_builtin_modules_are_left_out(tree: Tree) -> None:
    tree.add("virtiofs", "fuse,virtio")
    tree.builtin("fuse", "virtio")
    opened = tree.open()
    assert order(opened, ["virtiofs", "fuse"]) == ["virtiofs"]
    assert opened.has("fuse") and opened.has("virtiofs") and not opened.has("overlay")


def test_missing_modules_are_named(tree: Tree) -> None:
    tree.add("kvm-amd", "kvm,ccp")
    tree.add("kvm")
    with pytest.raises(ConfigError, match="no module ccp, which kvm_amd depends on"):
        tree.open().resolve(["kvm_amd"])
    with pytest.raises(ConfigError, match="no module zfs;"):
        tree.open().resolve(["zfs"])


def test_a_circle_is_an_error(tree: Tree) -> None:
    tree.add("a", "b")
    tree.add("b", "a")
    with pytest.raises(ConfigError, match="circle"):
        tree.open().resolve(["a"])


def test_a_listed_file_that_is_gone(tree: Tree) -> None:
    tree.listed.append("kernel/gone.ko")
    with pytest.raises(ConfigError, match=r"gone\.ko is missing"):
        tree.open().resolve(["gone"])


def test_a_directory_without_modules(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no kernel modules"):
        ModuleTree(str(tmp_path))


@pytest.mark.parametrize("name", ["x.ko.xz", "x.ko.gz", "x.ko.zst"])
def test_damaged_modules(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x7fELF is not what this should be")
    with pytest.raises(ConfigError, match="is damaged"):
        read_module(str(tmp_path / name))


def test_a_file_that_is_no_module(tmp_path: Path) -> None:
    (tmp_path / "x.ko").write_bytes(b"#!/bin/sh\n")
    with pytest.raises(ConfigError, match="no kernel module"):
        read_module(str(tmp_path / "x.ko"))


@pytest.mark.parametrize("wanted", [initramfs.GUEST_MODULES, initramfs.LAB_MODULES])
def test_debians_kernel(wanted: tuple[str, ...]) -> None:
    found = [kernel for kernel in kernels.find_kernels() if kernel.source == "debian"]
    if not found or found[0].modules is None:
        pytest.skip("Debian's kernel is not in the cache (scripts/demo fetches it)")
    got = ModuleTree(found[0].modules).resolve(wanted)
    seen: set[str] = set()
    for name, data in got:
        assert set(dependencies(data)) <= seen, f"{name} comes before what it needs"
        seen.add(name)
    assert {"virtio_pci", "virtiofs", "fuse", "overlay", "virtio_console"} <= seen
