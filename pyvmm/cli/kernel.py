"""`pyvmm kernel`: the guest kernels there are, and how to get more."""

from __future__ import annotations

import sys

from .. import log
from ..errors import ConfigError
from ..host import kernels
from ..host.progress import Progress
from .parse import Command, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

COMMAND = Command(
    "kernel",
    "List guest kernels, fetch Debian's newest, or build the small one of our own.",
    "kernel [list|fetch|build]",
    (),
    examples=(
        ("what --kernel can name; the first is the default", "pyvmm kernel list"),
        ("Debian's newest cloud kernel, into the user's cache", "pyvmm kernel fetch"),
        ("a small kernel with everything built in; some minutes", "pyvmm kernel build"),
    ),
    words=True,
)


def main(argv: Sequence[str]) -> int:
    """Do one of ACTIONS."""
    words = parse(COMMAND, argv).words or ["list"]
    if len(words) > 1 or words[0] not in ACTIONS:
        raise ConfigError(f"kernel {' '.join(words)}: one of {', '.join(ACTIONS)} is needed")
    ACTIONS[words[0]]()
    return 0


def _list() -> None:
    found = kernels.find_kernels()
    if not found:
        log.warn(kernels.NONE)
    for kernel in found:
        sys.stdout.write(f"{kernel.source:<7} {kernel.release:<32} {kernel.path}\n")


def _fetch() -> None:
    progress = Progress("kernel")
    try:
        kernel = kernels.fetch_kernel(progress.show)
    finally:
        progress.clear()
    sys.stdout.write(f"{kernel.path}\n")


def _build() -> None:
    from ..host import own_kernel

    sys.stdout.write(f"{own_kernel.build().path}\n")


ACTIONS: dict[str, Callable[[], None]] = {"list": _list, "fetch": _fetch, "build": _build}
