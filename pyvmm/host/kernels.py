"""Guest kernels on this host: which there are, which is the default, where to get one.

It owns the cache's `kernels` directory: `own/NAME/vmlinux` from `own_kernel`, and
`debian/RELEASE/` with an unpacked package of Debian's.  Kernels installed in /boot count
too.  It does not look into kernel files; `pyvmm.boot` does.
"""

from __future__ import annotations

import os

from .. import cache, log, programs
from ..errors import ConfigError
from ..record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Progress = Callable[[str], None]

META_PACKAGE = "linux-image-cloud-amd64"
HOW_TO_GET_ONE = "pyvmm kernel fetch gets Debian's, pyvmm kernel build makes a small one of our own"
NONE = f"no guest kernel is cached or in /boot; {HOW_TO_GET_ONE}"
SOURCES = ("own", "debian", "boot")


class Kernel(Record):
    """A kernel file, its release, the directory of its modules, and where it comes from."""

    path: str
    release: str
    modules: str | None
    source: str


def find_kernels() -> list[Kernel]:
    """All kernels, the default first: own before Debian's cached ones before /boot, newest first."""
    own = sorted(_own(), key=lambda kernel: os.stat(kernel.path).st_mtime_ns, reverse=True)
    return own + _newest_first(_debian()) + _newest_first(_boot())


def _newest_first(kernels: Iterator[Kernel]) -> list[Kernel]:
    return sorted(kernels, key=lambda kernel: version_key(kernel.release), reverse=True)


def find_kernel(name: str | None = None) -> Kernel:
    """The kernel for an option's value: None the default, a source's name, a release or a path.

    Raises ConfigError that says how to get one.
    """
    if name is not None and (os.sep in name or os.path.isfile(name)):
        return _from_path(name)
    for kernel in find_kernels():
        if name in (None, kernel.source, kernel.release):
            return kernel
    unknown = f"--kernel {name}: no kernel of this name is cached or in /boot"
    raise ConfigError(_CURES.get(name or "", unknown) + _known())


_CURES = {
    "": NONE,
    "own": "--kernel own: it is not built; pyvmm kernel build does that in some minutes",
    "debian": "--kernel debian: it is not in the cache; pyvmm kernel fetch gets it",
    "boot": "--kernel boot: /boot holds no kernel; apt-get install linux-image-cloud-amd64",
}


def _known() -> str:
    names = ", ".join(kernel.release for kernel in find_kernels())
    return f" (there are: {names})" if names else ""


def _from_path(path: str) -> Kernel:
    """A kernel anywhere; its modules when it lies in a tree of a known form."""
    folder, name = os.path.split(os.path.abspath(path))
    release = name.partition("-")[2]
    for known in find_kernels():
        if os.path.exists(path) and os.path.samefile(known.path, path):
            return known
    modules = os.path.join(os.path.dirname(folder), "lib", "modules", release)
    return Kernel(path, release, modules if release and os.path.isdir(modules) else None, "file")


def version_key(text: str) -> tuple[tuple[int, str], ...]:
    """Sort key of a release: numbers count as numbers."""
    key: list[tuple[int, str]] = []
    for part in text.replace("-", ".").replace("+", ".").split("."):
        key.append((int(part), "") if part.isdigit() else (-1, part))
    return tuple(key)


def _own() -> Iterator[Kernel]:
    for entry in cache.entries("kernels", "own"):
        path = os.path.join(entry.path, "vmlinux")
        if os.path.isfile(path) and not entry.name.startswith("."):  # .building has one at its end
            yield Kernel(path, entry.name, None, "own")


def _debian() -> Iterator[Kernel]:
    for entry in cache.entries("kernels", "debian"):
        path = os.path.join(entry.path, "boot", f"vmlinuz-{entry.name}")
        modules = os.path.join(entry.path, "lib", "modules", entry.name)
        if os.path.isfile(path):
            yield Kernel(path, entry.name, modules, "debian")


def _boot() -> Iterator[Kernel]:
    try:
        names = os.listdir("/boot")
    except OSError:
        return
    for name in names:
        if name.startswith("vmlinuz-"):
            release = name.removeprefix("vmlinuz-")
            modules = f"/lib/modules/{release}"
            yield Kernel(f"/boot/{name}", release, modules if os.path.isdir(modules) else None, "boot")


# -- fetching ------------------------------------------------------------------------------


def fetch_kernel(progress: Progress | None = None) -> Kernel:
    """Debian's newest cloud kernel, downloaded and unpacked unless one is cached.

    A cached one needs no network and no package lists.  `progress` hears what takes long.
    Raises ConfigError.
    """
    cached = _newest_first(_debian())
    if cached:
        return cached[0]
    cache.make("kernels", "debian")
    return _download_with_refresh(progress or log.info)


def _download_with_refresh(say: Progress) -> Kernel:
    """Package lists that are missing, or so old that their files are gone, are refreshed once."""
    try:
        return _download(say)
    except ConfigError as first:
        say("refreshing the package lists (apt-get update)")
        try:
            _run(["apt-get", "update", "-qq"])
        except ConfigError:
            raise first from None
    return _download(say)


def _download(say: Progress) -> Kernel:
    import shutil
    import tempfile

    package = _newest_package()
    release = package.removeprefix("linux-image-")
    parent = cache.directory("kernels", "debian")
    work = tempfile.mkdtemp(prefix=".fetch-", dir=parent)
    try:
        say(f"downloading {package}")
        _run(["apt-get", "download", "-qq", package], work)
        say(f"unpacking {package}")
        _unpack(work)
        _keep(os.path.join(work, "tree"), os.path.join(parent, release))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return next(kernel for kernel in _debian() if kernel.release == release)


def _keep(tree: str, target: str) -> None:
    try:
        os.rename(tree, target)
    except OSError:
        if not os.path.isdir(target):  # another process was faster, with the same contents
            raise


def _unpack(work: str) -> None:
    packages = [name for name in os.listdir(work) if name.endswith(".deb")]
    tree = os.path.join(work, "tree")
    os.mkdir(tree)
    _run(["dpkg-deb", "-x", packages[0], tree], work)


def _newest_package() -> str:
    """What the meta package depends on, e.g. linux-image-6.1.0-56-cloud-amd64."""
    text = _run(["apt-cache", "depends", "--important", META_PACKAGE])
    names = [line.split()[-1] for line in text.splitlines() if "Depends: linux-image-" in line]
    if not names:
        raise ConfigError(f"apt knows no package {META_PACKAGE}; run apt-get update on a Debian host")
    return names[0]


def _run(argv: list[str], folder: str = "/") -> str:
    try:
        status, output, errors = programs.run(argv, folder)
    except OSError as error:
        raise ConfigError(f"{argv[0]}: {error.strerror}; fetching a kernel needs a Debian host") from error
    if status:
        said = errors.splitlines()
        lines = [line for line in said if line.startswith("E:")] or said
        raise ConfigError(f"{' '.join(argv)} failed: {lines[0] if lines else f'status {status}'}")
    return output
