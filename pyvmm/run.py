"""One command in a fresh guest: boot with the host's files, run it, hand its status on.

It owns what makes a virtual machine a command runner: the guest's init and its command
channel, the kernel's log, signals, the time limit, and the verdict when the guest ends
without a word.  How machines are built it leaves to `vm`.
"""

from __future__ import annotations

import os
import signal
import socket

from . import log
from .config import (
    ConsoleDevice,
    ConsolePort,
    CpusConfig,
    FsDevice,
    MemoryConfig,
    PayloadConfig,
    StreamConfig,
    VmConfig,
)
from .errors import GuestError, GuestPanic, GuestTimeout
from .guest import protocol
from .guest.channel import CommandChannel
from .host.console import ConsoleLog
from .host.progress import Progress
from .layout import MIB
from .loop import EventLoop
from .record import Record
from .vm import CRASH, OFF, Outcome, Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .guest.channel import Outcome as CommandOutcome
    from .record import Record as Device

ROOT_TAG = "root"
# Kernel arguments: no probing of what is not there, a restart at once after a panic.
BASE_CMDLINE = "console=ttyS0 panic=-1 reboot=a tsc=reliable"
QUIET, VERBOSE = "quiet", "ignore_loglevel"
POWER_OFF_SECONDS = 5.0  # for the guest to write back and power off after its command


class RunConfig(Record):
    """What to run and in which guest.  `memory` is in bytes; `timeout` 0 is none."""

    argv: tuple[str, ...]
    kernel: str
    initramfs: str
    cpus: int = 1
    memory: int = 1024 * MIB
    append: str = ""
    timeout: float = 0
    verbose: bool = False
    tty: tuple[int, int] | None = None
    env: tuple[str, ...] = ()
    cwd: str = "/"
    root: str = "/"
    devices: tuple[Device, ...] = ()


class Stages:
    """Names and times in seconds of what happened: the VMM's own, then the guest's since its boot."""

    def __init__(self) -> None:
        self.host: list[tuple[str, float]] = []
        self.guest: list[tuple[str, float]] = []

    def mark(self, name: str) -> None:
        """Something of ours is done now; times count from the start of this process."""
        self.host.append((name, _process_age()))


class CommandRun:
    """One guest for one command: `run` once, then `close`."""

    def __init__(self, config: RunConfig, stages: Stages | None = None) -> None:
        self.config = config
        self.stages = stages or Stages()
        self._loop = EventLoop()
        self._console = ConsoleLog(self._loop, config.verbose)
        self._progress = Progress("run")
        self._ended: CommandOutcome | None = None
        self._failure: BaseException | None = None
        self._interrupts = 0
        self._started = False
        self._channel: CommandChannel | None = None
        self._vm: Vm | None = None

    def run(self, stdin: int | None = 0, stdout: int | None = 1, stderr: int | None = 2) -> int:
        """Boot, run the command, return its exit status.  Raises PyvmmError."""
        self._progress.show("starting the virtual machine")
        ours, theirs = socket.socketpair()
        with theirs:
            self._channel = CommandChannel(
                self._loop, ours, self._spec(), self._command_ended, stdin=stdin, stdout=stdout, stderr=stderr,
                on_stage=self._stage, on_warning=log.warn,
            )  # fmt: skip
            self._vm = Vm(self._machine(theirs.fileno()), self._loop)
        self.stages.mark("machine built")
        if self.config.timeout:
            self._loop.call_later(self.config.timeout, self._timed_out)
        outcome = self._vm.run()
        self._progress.clear()
        if self._failure is not None:
            raise self._failure
        return self._verdict(outcome)

    def signal(self, number: int) -> None:
        """Pass Ctrl-C on to the command once; a second one, or another signal, ends the machine."""
        self._loop.call_soon_threadsafe(lambda: self._signalled(number))

    def resize(self, rows: int, columns: int) -> None:
        """Tell the command's terminal its new size."""
        channel = self._channel
        if channel is not None:
            self._loop.call_soon_threadsafe(lambda: channel.resize(rows, columns))

    def close(self) -> None:
        """End everything that was started."""
        self._progress.clear()
        if self._vm is not None:
            self._vm.close()
        if self._channel is not None:
            self._channel.close()
        self._console.close()
        self._loop.close()

    # -- the machine -----------------------------------------------------------------------
    def _spec(self) -> protocol.Spec:
        config = self.config
        return protocol.Spec(
            argv=config.argv,
            env=config.env,
            cwd=config.cwd,
            hostname="pyvmm",
            tty=config.tty,
            root=protocol.Mount("/", ROOT_TAG, "virtiofs", "ro"),
            overlay=True,
        )

    def _machine(self, command_fd: int) -> VmConfig:
        config = self.config
        cmdline = f"{BASE_CMDLINE} {VERBOSE if config.verbose else QUIET} {config.append}".strip()
        command = ConsolePort(protocol.PORT_NAME, command_fd)
        return VmConfig(
            PayloadConfig(config.kernel, cmdline, config.initramfs),
            CpusConfig(config.cpus),
            MemoryConfig(config.memory),
            StreamConfig("fd", fd=self._console.take_socket().fileno()),
            (
                ConsoleDevice(StreamConfig("null"), (command,)),
                FsDevice(ROOT_TAG, config.root, readonly=True, cache="always"),
                *config.devices,
            ),
        )

    # -- events ----------------------------------------------------------------------------
    def _stage(self, name: str, seconds: float) -> None:
        self.stages.guest.append((name, seconds))
        self._progress.show(f"guest: {name} ({seconds:.1f} s)")
        log.debug(f"guest: {name} at {seconds:.3f} s")
        if name == "command":
            self._started = True
            self._progress.clear()

    def _command_ended(self, outcome: CommandOutcome) -> None:
        """The guest has written everything back by now and powers off by itself."""
        self._ended = outcome
        if not outcome.lost:
            self._loop.call_later(POWER_OFF_SECONDS, self._loop.stop)

    def _timed_out(self) -> None:
        what = "the command" if self._started else "the guest's boot"
        self._fail(GuestTimeout(f"timeout: {what} did not end within {self.config.timeout:g} s (--timeout)"))

    def _signalled(self, number: int) -> None:
        self._interrupts += 1
        if number == signal.SIGINT and self._started and self._interrupts == 1 and self._channel is not None:
            self._channel.signal(number)
        else:
            self._fail(SystemExit(128 + number))

    def _fail(self, failure: BaseException) -> None:
        self._failure = failure
        self._loop.stop()

    # -- the verdict -----------------------------------------------------------------------
    def _verdict(self, outcome: Outcome) -> int:
        ended = self._ended
        if ended is not None and ended.status is not None:
            return ended.status
        self._console.drain()
        if outcome.kind == CRASH:
            raise outcome.error()
        if ended is not None and ended.error and not ended.lost:
            raise GuestError(f"guest: {ended.error}")
        error = self._console.explain(outcome.kind)
        if isinstance(error, GuestPanic) and not self.config.verbose:
            log.warn("the end of the guest's console:")
            os.write(2, self._console.text[-4000:].replace(b"\r\n", b"\n") + b"\n")
        raise error


def run_command(config: RunConfig, stages: Stages | None = None) -> int:
    """Run `config` with this process's streams and signals; returns the command's exit status."""
    from .streams import Terminal

    run = CommandRun(config, stages)
    terminal = Terminal() if config.tty else None
    handlers = catch_signals(run)
    try:
        return run.run()
    finally:
        run.close()
        if terminal is not None:
            terminal.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _process_age() -> float:
    """Seconds since this process was started, by the kernel's account (10 ms steps)."""
    import time

    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
