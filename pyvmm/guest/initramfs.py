"""The initramfs that pyvmm makes for a kernel: its own init and the modules it needs.

It owns the compiled init and the finished archives in the user's cache, both named by
what they were made from, so that a later start only looks a file up.  It does not
know what the guest will be asked to run: that arrives over the command channel.
"""

from __future__ import annotations

import os

from .. import cache, programs
from ..errors import ConfigError
from . import cpio
from .modules import ModuleTree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# In this order: the command channel and the root first, then what a guest may use.
GUEST_MODULES = (
    "virtio_pci", "virtio_console", "virtiofs", "overlay", "virtio_blk", "virtio_rng", "virtio_net",
)  # fmt: skip
LAB_MODULES = ("virtio_pci", "virtio_console", "virtiofs", "overlay", "kvm_amd")
KEPT = 8  # archives that stay in the cache
_COMPILE = ("-static", "-Os", "-s", "-std=gnu11")
_LISTS = ("modules.order", "modules.builtin", "modules.dep")


def images_directory() -> str:
    """Where the sources of guest images are: beside this package when installed, else the checkout's."""
    here = os.path.dirname(os.path.abspath(__file__))
    for path in (os.path.join(here, "images"), os.path.join(here, "..", "..", "guest-images")):
        if os.path.isdir(path):
            return os.path.normpath(path)
    raise ConfigError(f"{here}/images is missing; install pyvmm again")


def build(modules: Sequence[tuple[str, bytes]], init: bytes) -> bytes:
    """The archive: /init, and `modules` in load order with the list that init follows."""
    entries = [cpio.directory("dev"), cpio.character("dev/console", 5, 1), cpio.regular("init", init, 0o755)]
    entries += [cpio.directory(name) for name in ("proc", "sys")]
    if modules:
        order = "".join(f"{name}.ko\n" for name, _ in modules)
        entries += [cpio.directory("modules"), cpio.regular("modules/order", order.encode())]
        entries += [cpio.regular(f"modules/{name}.ko", data) for name, data in modules]
    return cpio.archive(entries)


def for_kernel(modules_directory: str | None, wanted: Sequence[str] = GUEST_MODULES) -> str:
    """Path of the archive for a kernel, made now if it is not cached.

    `modules_directory` is lib/modules/RELEASE, or None for a kernel with everything built
    in.  Modules of `wanted` that the kernel does not have are left out: init says what it
    lacks, and a kernel may have it under another name.  Raises ConfigError.
    """
    path = cache.directory("initramfs", f"{_key(modules_directory, wanted)}.cpio")
    if not os.path.exists(path):
        cache.make("initramfs")
        modules = _modules(modules_directory, wanted)
        with open(compiled_init(), "rb") as init, cache.whole_file(path) as file:
            file.write(build(modules, init.read()))
        _forget_old()
    return path


def _modules(directory: str | None, wanted: Sequence[str]) -> list[tuple[str, bytes]]:
    if directory is None:
        return []
    tree = ModuleTree(directory)
    return tree.resolve(name for name in wanted if tree.has(name))


def _key(directory: str | None, wanted: Sequence[str]) -> str:
    parts = [_source_key().encode()]
    if directory is not None:
        if not os.path.isdir(directory):
            raise ConfigError(f"{directory} is no directory; name the kernel's lib/modules/RELEASE")
        parts += [os.path.realpath(directory).encode(), " ".join(wanted).encode()]
        parts += [_identity(os.path.join(directory, name)) for name in _LISTS]
    return _digest(parts)


def _identity(path: str) -> bytes:
    try:
        status = os.stat(path)
    except OSError:
        return b"-"
    return b"%d %d" % (status.st_size, status.st_mtime_ns)


def _digest(parts: Sequence[bytes]) -> str:
    from _blake2 import blake2b  # hashlib's import costs more than all of this module

    digest = blake2b(digest_size=10)
    for part in parts:
        digest.update(b"%d " % len(part) + part)
    return str(digest.hexdigest())


def _sources() -> list[str]:
    folder = os.path.join(images_directory(), "init")
    return sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith((".c", ".h")))


def _source_key() -> str:
    parts: list[bytes] = []
    for path in _sources():
        with open(path, "rb") as file:
            parts.append(file.read())
    return _digest(parts)


def compiled_init() -> str:
    """Path of the static init, compiled now if it is not cached.  Raises ConfigError without a compiler."""
    path = cache.directory("init", _source_key())
    if not os.path.exists(path):
        cache.make("init")
        part = f"{path}.{os.getpid()}.part"
        try:
            _compile(part)
            os.replace(part, path)
        finally:
            if os.path.exists(part):
                os.unlink(part)
    return path


def _compile(output: str) -> None:
    sources = [path for path in _sources() if path.endswith(".c")]
    command = [os.environ.get("CC") or "cc", *_COMPILE, "-o", output, *sources]
    try:
        status, _, said = programs.run(command)
    except OSError as error:
        raise ConfigError(
            f"cannot compile the guest's init: {command[0]}: {error.strerror}; apt-get install gcc libc6-dev"
        ) from error
    if status:
        lines = said.strip().splitlines() or ["no message"]
        raise ConfigError(f"cannot compile the guest's init with {command[0]}: {lines[-1]}")


def _forget_old() -> None:
    files = sorted(cache.entries("initramfs"), key=lambda entry: entry.stat().st_mtime_ns, reverse=True)
    for entry in files[KEPT:]:
        os.unlink(entry.path)
