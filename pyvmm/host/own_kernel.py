"""Builds the small guest kernel: Debian's kernel source and our configuration, some minutes.

It owns `kernels/own` in the cache, where a build is named by what it was made from: the
kernel's release and the hash of source archive and configuration.  The same input
builds once.  It does not install anything; scripts/build-kernel does that first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from .. import cache, log
from ..errors import ConfigError
from ..guest.initramfs import images_directory
from .kernels import Kernel, find_kernels
from .progress import Progress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import IO

SOURCE = "/usr/src/linux-source-6.1.tar.xz"
PACKAGES = "linux-source-6.1 bc bison flex libelf-dev libssl-dev make gcc xz-utils"
KEPT = 2  # builds that stay in the cache
_LINES_OF_MAKE = 1910  # what make prints for this configuration, for the percentage
_MAKE = ("make", "ARCH=x86_64", "KBUILD_BUILD_USER=pyvmm", "KBUILD_BUILD_HOST=pyvmm")


def config_path() -> str:
    """The configuration: lines of Kconfig's."""
    return os.path.join(images_directory(), "own-kernel", "config")


def build(source: str = SOURCE) -> Kernel:
    """The own kernel for this source and configuration, built now unless cached.  Raises ConfigError."""
    if not os.path.isfile(source):
        raise ConfigError(f"{source} is missing: apt-get install {PACKAGES}")
    progress = Progress("kernel")
    try:
        progress.show("looking at the source")
        key = _key(source)
        return _cached(key) or _build_alone(source, key, progress.show)
    finally:
        progress.clear()


def _cached(key: str) -> Kernel | None:
    own = (kernel for kernel in find_kernels() if kernel.source == "own")
    return next((kernel for kernel in own if kernel.release.endswith(key)), None)


def _key(source: str) -> str:
    import hashlib

    with open(source, "rb") as archive, open(config_path(), "rb") as config:
        digest = hashlib.file_digest(archive, "sha256")
        digest.update(config.read())
    return digest.hexdigest()[:12]


def _build_alone(source: str, key: str, say: Callable[[str], None]) -> Kernel:
    """Build, or wait for who builds already: two at once would take twice as long."""
    import fcntl

    parent = cache.make("kernels", "own")
    with open(os.path.join(parent, ".lock"), "wb") as lock:
        say("waiting for another build")
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _cached(key) is None:
            _build(source, key, say)
            _forget_old()
    kernel = _cached(key)
    assert kernel is not None
    return kernel


def wanted_lines(text: str) -> list[str]:
    """The settings in a configuration, without comments."""
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _build(source: str, key: str, say: Callable[[str], None]) -> None:
    parent = cache.directory("kernels", "own")
    work = os.path.join(parent, ".building")
    shutil.rmtree(work, ignore_errors=True)  # of a build that was killed
    os.makedirs(work)
    try:
        say("unpacking the source")
        _run(["tar", "-xf", source, "--strip-components=1", "-C", work], parent)
        _configure(work, parent)
        _run([*_MAKE, f"-j{os.cpu_count() or 1}", "vmlinux"], parent, work, _percentage(say))
        release = _read(work, "include/config/kernel.release").strip()
        _install(work, os.path.join(parent, f"{release}-{key}"))
    finally:
        say("removing the source")
        shutil.rmtree(work, ignore_errors=True)


def _configure(work: str, parent: str) -> None:
    """Start from nothing but our lines; a line that Kconfig drops lacks a dependency."""
    shutil.copyfile(config_path(), os.path.join(work, "pyvmm.config"))
    _run([*_MAKE, "KCONFIG_ALLCONFIG=pyvmm.config", "allnoconfig"], parent, work)
    got = set(_read(work, ".config").splitlines())
    dropped = [line for line in wanted_lines(_read(work, "pyvmm.config")) if line not in got]
    if dropped:
        raise ConfigError(f"{config_path()}: Kconfig drops {', '.join(dropped)}; add what they depend on")


def _install(work: str, target: str) -> None:
    """The stripped kernel, its symbols for crash reports, and its full configuration."""
    result = os.path.join(work, "result")
    os.mkdir(result)
    _run(["strip", "-s", "-o", os.path.join(result, "vmlinux"), "vmlinux"], os.path.dirname(target), work)
    shutil.copyfile(os.path.join(work, "System.map"), os.path.join(result, "System.map"))
    shutil.copyfile(os.path.join(work, ".config"), os.path.join(result, "config"))
    os.rename(result, target)


def _read(work: str, name: str) -> str:
    with open(os.path.join(work, name), encoding="utf-8") as file:
        return file.read()


def _percentage(say: Callable[[str], None]) -> Callable[[int], None]:
    def heard(lines: int) -> None:
        say(f"compiling, {min(99, lines * 100 // _LINES_OF_MAKE)} %")

    return heard


def _run(
    argv: Sequence[str], logs: str, folder: str = "/", heard: Callable[[int], None] | None = None
) -> None:
    """Run a step with its output in build.log; `heard` is told the number of lines so far."""
    path = os.path.join(logs, "build.log")
    with open(path, "wb") as file:
        status = _follow(_start(argv, folder), file, heard)
    if status:
        raise ConfigError(f"{argv[0]} failed with status {status}; its output is in {path}")


def _follow(process: subprocess.Popen[bytes], copy: IO[bytes], heard: Callable[[int], None] | None) -> int:
    assert process.stdout is not None
    with process:
        try:
            for number, line in enumerate(process.stdout):
                copy.write(line)
                if heard is not None:
                    heard(number)
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def _start(argv: Sequence[str], folder: str) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as error:
        raise ConfigError(f"{argv[0]}: {error.strerror}; apt-get install {PACKAGES}") from error


def _forget_old() -> None:
    own = [kernel for kernel in find_kernels() if kernel.source == "own"]
    for kernel in own[KEPT:]:
        shutil.rmtree(os.path.dirname(kernel.path), ignore_errors=True)


def main() -> int:
    """Build, and print the kernel's path."""
    try:
        print(build().path)
    except ConfigError as error:
        log.warn(str(error))
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
