"""`pyvmm lab`: a command, or a shell, in an emulated machine that has a real KVM."""

from __future__ import annotations

import os

from .. import config, log, options
from ..errors import ConfigError
from .parse import Command, Option, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

COMMAND = Command(
    "lab",
    "Run a command in an emulated machine that has a stock kvm_amd and this host's files.",
    "lab [options] [-- CMD ...]",
    (
        Option("--share", "DIR", "directory that stays writable through to the host", True),
        Option("--memory", "SIZE", "the machine's RAM (default 4G)"),
        Option("--cpus", "N", "the machine's CPUs, 1 to 8 (default 1)"),
        Option("--timeout", "SECONDS", "end the machine after this time"),
        Option("--verbose", "", "show the machine's console", short="-v"),
    ),
    examples=(
        ("a shell with /dev/kvm", "pyvmm lab"),
        ("a program that needs KVM, its results kept", "pyvmm lab --share out -- make -C /src check"),
    ),
    details="The host's files are there, with changes kept in the machine's memory only.  The\n"
    "machine is emulated by QEMU: expect a fiftieth of the host's speed.",
    trailing=True,
)


def main(argv: Sequence[str]) -> int:
    """Run the lab; returns the command's exit status."""
    given = parse(COMMAND, argv)
    log.level += given.count("verbose")
    from ..host import emulator
    from ..host.lab import CPUS, MOST_CPUS, run_in_lab

    cpus = given.text("cpus", str(CPUS))
    if cpus not in [str(count) for count in range(1, MOST_CPUS + 1)]:
        raise ConfigError(f"--cpus: {cpus!r}: 1 to {MOST_CPUS} CPUs are possible")
    if int(cpus) > 1 and emulator.own_program() is None:
        log.warn(
            f"lab: with {cpus} CPUs it may stand still in this QEMU; {emulator.BUILDER} builds a better one"
        )
    timeout = given.text("timeout")
    return run_in_lab(
        given.trailing or [os.environ.get("SHELL") or "/bin/sh"],
        share=given.texts("share"),
        memory=memory(given.text("memory", "4G")),
        cpus=int(cpus),
        timeout=config.seconds("--timeout", timeout) if timeout else 0,
    )


def memory(text: str) -> int:
    """The value of a plain `--memory SIZE`, also written `size=SIZE`, in bytes."""
    try:
        return config.check_memory("--memory", options.size(text.removeprefix("size=")))
    except ValueError as error:
        raise ConfigError(f"--memory: {text!r}: {error}") from None
