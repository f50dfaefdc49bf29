"""The `pyvmm` program: picks a subcommand, turns errors into one line and an exit status.

It owns the table of subcommands, which are imported only when asked for.  What they do is
theirs.
"""

from __future__ import annotations

import errno
import os
import sys

from .. import log
from ..errors import EXIT_VMM, GuestError, PyvmmError
from ..lean import signal
from .parse import HelpRequested

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

COMMANDS = {
    "run": "run a command in a fresh guest that has this host's files",
    "boot": "boot any kernel with any devices (cloud-hypervisor's options; the default)",
    "lab": "run a command in an emulated machine that has a real KVM",
    "devices": "list the kinds of devices, their drivers and backends",
    "doctor": "say what this host can do, and how to mend what it cannot",
    "rings": "show the virtqueues of a running machine",
    "trace": "show a recorded vhost-user session, or have it again",
    "kernel": "list, fetch or build guest kernels",
}
_CURES = {
    errno.EMFILE: "; allow more open files (ulimit -n)",
    errno.ENFILE: "; the host has too many files open",
    errno.ENOMEM: "; the host is short of memory",
    errno.EAGAIN: "; allow more processes (ulimit -u)",
}
USAGE = """usage: pyvmm COMMAND [options]        (pyvmm COMMAND --help says more)
       pyvmm [boot options]

A virtual machine monitor on KVM: every device is a vhost-user backend.

commands:
{commands}

examples:
  # this host's files, Debian's kernel, one command
  pyvmm run -- uname -a
  # a kernel, a disk and any vhost-user device
  pyvmm --kernel vmlinux --disk path=image.raw --cmdline "console=hvc0 root=/dev/vda1 rw" \\
        --generic-vhost-user "socket=/run/fs.sock,device_type=fs,queue_sizes=[512,512]"
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv is None:
            _settle()
        status = _dispatch(words, argv is None)
        sys.stdout.flush()
        return status
    except PyvmmError as error:
        log.warn(str(error) if isinstance(error, GuestError) else str(error).replace("\n", "\\n"))
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _silence()
        return 141
    except OSError as error:
        _silence()
        log.warn(f"the host refused: {error}{_CURES.get(error.errno or 0, '')}")
        if log.level >= log.DEBUG:
            raise
        return EXIT_VMM


def _silence() -> None:
    """Standard output may be what failed, and the interpreter flushes it once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _settle() -> None:
    """Make this process a safe place, with three standard streams.

    A device that got the number of a closed standard stream would be sent our messages.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)


def _take_signals() -> None:
    """From now on every signal brings an orderly end.

    Until everything is loaded nothing has to be put in order, and signals end the process by
    themselves: an exception in the import machinery would be printed, or even be swallowed by it.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _dispatch(words: list[str], alone: bool) -> int:
    first = words[0] if words else "--help"
    if first in ("--help", "-h", "help"):
        rows = "\n".join(f"  {name:<8} {text}" for name, text in COMMANDS.items())
        return _print(USAGE.format(commands=rows))
    if first in ("--version", "-V"):
        return _print(f"pyvmm {_version()}\n")
    if first in COMMANDS or first.startswith("-"):
        name, rest = (first, words[1:]) if first in COMMANDS else ("boot", words)
        command = _load(name)
        if alone:
            _take_signals()
        try:
            return command(rest)
        except HelpRequested as text:
            return _print(str(text))
    from ..options import nearest

    log.warn(f"unknown command {first!r}{nearest(first, COMMANDS)} (see pyvmm --help)")
    return 2


def _load(name: str) -> Callable[[Sequence[str]], int]:
    module = __import__(f"pyvmm.cli.{name}", fromlist=["main"])
    main: Callable[[Sequence[str]], int] = module.main
    return main


def _print(text: str) -> int:
    sys.stdout.write(text)
    return 0


def _version() -> str:
    from importlib.metadata import version

    return version("pyvmm")
