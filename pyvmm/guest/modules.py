"""Which module files a guest needs, in which order, and what is in them.

It owns one directory /lib/modules/RELEASE (or its copy anywhere).  A module's own
`depends=` text gives the order: unlike modules.dep it is there in a package that was
unpacked and never installed.  It does not know what the modules are for.
"""

from __future__ import annotations

import os

from ..errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")


def canonical(name: str) -> str:
    """The kernel's spelling: `virtio-rng` and `virtio_rng` are one module."""
    return name.replace("-", "_")


class ModuleTree:
    """The modules of one kernel.  Raises ConfigError when `directory` holds none."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.release = os.path.basename(os.path.normpath(directory))
        self.builtin = frozenset(map(_name_of, self._lines("modules.builtin")))
        self._files = {_name_of(path): path for path in self._lines("modules.order") or self._walk()}
        if not self._files and not self.builtin:
            raise ConfigError(f"{directory} holds no kernel modules; name the directory lib/modules/RELEASE")

    def resolve(self, wanted: Iterable[str]) -> list[tuple[str, bytes]]:
        """(name, contents) of `wanted` and all they depend on, each after what it needs.

        Contents are uncompressed.  Names that are built in are left out.  Raises ConfigError
        for a name that this kernel does not have.
        """
        chosen: dict[str, bytes] = {}
        for name in wanted:
            self._add(canonical(name), chosen, ())
        return list(chosen.items())

    def has(self, name: str) -> bool:
        """Whether the kernel has the module, as a file or built in."""
        return canonical(name) in self._files or canonical(name) in self.builtin

    def _add(self, name: str, chosen: dict[str, bytes], path: tuple[str, ...]) -> None:
        if name in chosen or name in self.builtin:
            return
        if name in path:
            raise ConfigError(f"{self.directory}: modules depend on each other in a circle: {' '.join(path)}")
        contents = self._read(name, path)
        for other in dependencies(contents):
            self._add(other, chosen, (*path, name))
        chosen[name] = contents

    def _read(self, name: str, path: tuple[str, ...]) -> bytes:
        if name not in self._files:
            reason = f", which {path[-1]} depends on" if path else ""
            raise ConfigError(f"{self.directory} has no module {name}{reason}; is it this kernel's?")
        return read_module(self._locate(self._files[name]))

    def _locate(self, listed: str) -> str:
        """The file for a line of modules.order, which never tells the compression."""
        base = os.path.join(self.directory, listed[: listed.index(".ko")])
        for suffix in SUFFIXES:
            if os.path.exists(base + suffix):
                return base + suffix
        raise ConfigError(f"{base}.ko is missing; unpack the kernel's package again")

    def _lines(self, name: str) -> list[str]:
        try:
            with open(os.path.join(self.directory, name), encoding="utf-8", errors="replace") as file:
                return [line for line in file.read().split("\n") if ".ko" in line]
        except OSError:
            return []

    def _walk(self) -> list[str]:
        """Module files when there is no list of them: a hand-made directory."""
        found = []
        for folder, _, files in os.walk(self.directory):
            found += [os.path.join(folder, file) for file in files if file.endswith(SUFFIXES)]
        return [os.path.relpath(path, self.directory) for path in sorted(found)]


def _name_of(path: str) -> str:
    base = path.rpartition("/")[2]
    return canonical(base[: base.index(".ko")])


def dependencies(module: bytes) -> list[str]:
    """Names in the `depends=` entry of a module's .modinfo section (NUL-terminated texts)."""
    start = module.find(b"\0depends=")
    if start < 0:
        return []
    start += len(b"\0depends=")
    names = module[start : module.index(b"\0", start)].decode()
    return [canonical(name) for name in names.split(",") if name]


def read_module(path: str) -> bytes:
    """A module's contents, uncompressed.  Raises ConfigError when it is damaged."""
    with open(path, "rb") as file:
        data = file.read()
    method = _METHODS.get(path.rpartition(".ko")[2])
    if method is not None:
        data = _decompressed(method, data, path)
    if data[:4] != b"\x7fELF":
        raise ConfigError(f"{path} is no kernel module; unpack the kernel's package again")
    return data


def _decompressed(method: Callable[[bytes], bytes], data: bytes, path: str) -> bytes:
    try:
        return method(data)
    except ImportError as error:
        raise ConfigError(f"{path}: Python's module {error.name} is needed to read it") from error
    except Exception as error:  # each decompressor has its own classes
        raise ConfigError(f"{path} is damaged: {error}") from error


def _xz(data: bytes) -> bytes:
    import lzma

    return lzma.decompress(data)


def _gzip(data: bytes) -> bytes:
    import zlib

    return zlib.decompress(data, wbits=31)


def _zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj().decompress(data)


_METHODS: dict[str, Callable[[bytes], bytes]] = {".xz": _xz, ".gz": _gzip, ".zst": _zstd}
