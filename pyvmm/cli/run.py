"""`pyvmm run`: one command in a fresh guest with this host's files."""

from __future__ import annotations

import os
import sys

from .. import config, log
from ..errors import ConfigError
from ..foreground import shared_directory, terminal_size
from ..guest import initramfs
from ..host import kernels
from .lab import memory
from .parse import Command, Option, parse, unparse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ..host.kernels import Kernel
    from .parse import Arguments

COMMAND = Command(
    "run",
    "Boot a kernel with this host's files as its root (changes stay in the guest's memory), run CMD in\n"
    "it, and end with CMD's exit status.  Without CMD, show the guest and how long each stage took.",
    "run [options] [-- CMD ...]",
    (
        Option("--kernel", "NAME|FILE", "own, debian, boot, a release or a file (default: see kernel list)"),
        Option("--modules", "DIR", "the kernel's lib/modules/RELEASE (default: found beside the kernel)"),
        Option("--memory", "SIZE", "guest RAM (default 1G)"),
        Option("--cpus", "N", f"virtual CPUs, 1 to {config.MAX_CPUS} (default 1)"),
        Option("--share", "DIR", "directory that stays writable through to the host", True),
        Option("--append", "TEXT", "more kernel arguments", empty=True),
        Option("--timeout", "SECONDS", "end the guest after this time, with status 124"),
        Option(
            "--on-backend-loss",
            "stop|fail|reconnect",
            "when a backend is lost: end with status 70 (default), go on without it, or restart it",
        ),
        Option("--accel", "auto|kvm|lab", "this host's KVM, or the emulated machine (default: what works)"),
        Option("--trace", "vhost-user[=FILE][,format=json]", "show each message to and from backends"),
        Option("--verbose", "", "the kernel's log on standard error; twice: all there is to say", short="-v"),
    ),
    examples=(
        ("one command", "pyvmm run -- uname -a"),
        ("tests under another kernel", "pyvmm run --kernel ./vmlinux --cpus 4 --memory 4G -- make check"),
        ("a shell", "pyvmm run -- bash"),
    ),
    details="Exit status: CMD's own (128 + N for signal N); 124 time limit, 125 kernel panic,\n"
    "126 crash of a virtual CPU, 2 bad option, 70 anything else of ours.",
    trailing=True,
)
ACCELERATORS = ("auto", "kvm", "lab")


def main(argv: Sequence[str]) -> int:
    """Run what `argv` says; returns the exit status."""
    given = parse(COMMAND, argv)
    log.level += max(0, given.count("verbose") - 1)
    accel = given.text("accel", "auto")
    if accel not in ACCELERATORS:
        raise ConfigError(f"--accel: {accel!r}: one of {', '.join(ACCELERATORS)} is needed")
    kernel = find_kernel(given)
    values = _values(given)
    archive = initramfs.for_kernel(kernel.modules)
    if _needs_lab(accel):
        return _run_in_lab(given, kernel, values)
    from .. import run as runner

    return runner.run_or_show(runner.RunConfig(kernel=kernel.path, initramfs=archive, **values))


def find_kernel(given: Arguments) -> Kernel:
    """The kernel that `--kernel` and `--modules` mean; raises ConfigError."""
    kernel = kernels.find_kernel(given.text("kernel") or None)
    modules = given.text("modules")
    if modules and not os.path.isdir(modules):
        raise ConfigError(f"--modules: {modules}: no such directory; name the kernel's lib/modules/RELEASE")
    return kernel.replace(modules=modules) if modules else kernel


def _values(given: Arguments) -> dict[str, Any]:
    timeout = given.text("timeout")
    return {
        "argv": tuple(given.trailing or ()),
        "cpus": config.cpus(f"boot={given.text('cpus', '1').removeprefix('boot=')}").boot,
        "memory": memory(given.text("memory", "1G")),
        "share": tuple(shared_directory("--share", path) for path in given.texts("share")),
        "append": given.text("append"),
        "on_backend_loss": config.loss_policy("--on-backend-loss", given.text("on_backend_loss", "stop")),
        "timeout": config.seconds("--timeout", timeout) if timeout else 0,
        "trace": config.trace(given.text("trace")),
        "verbose": bool(given.count("verbose")),
        "tty": terminal_size() if given.trailing else None,
        "env": tuple(f"{name}={value}" for name, value in os.environ.items()),
        "cwd": os.getcwd(),
    }


def _needs_lab(accel: str) -> bool:
    from ..host import accel as probe

    inside = bool(os.environ.get(probe.LAB_MARK))
    if accel != "auto" or inside:
        if accel == "lab" and inside:
            raise ConfigError("--accel: lab: this already is the lab; its KVM works, use kvm or auto")
        return accel == "lab"

    reason = probe.why_not()
    if reason:
        log.warn(f"{reason}: using an emulated machine instead (pyvmm lab), which is some fifty times slower")
    return bool(reason)


def _run_in_lab(given: Arguments, kernel: Kernel, values: dict[str, Any]) -> int:
    """The same command again, inside; what can be prepared was prepared out here."""
    from ..host import lab
    from ..run import unpack_ahead

    unpack_ahead(kernel.path)
    inside = given.replace(values={**given.values, "accel": "kvm"})
    room = lab.room_for(values["memory"], values["cpus"], values["timeout"])
    return lab.run_in_lab(
        [sys.executable, "-P", "-m", "pyvmm", "run", *unparse(COMMAND, inside)],
        share=given.texts("share"),
        **room,
    )
