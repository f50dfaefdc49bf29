"""One command in a fresh guest: boot with the host's files, run it, hand its status on.

It owns what makes a virtual machine a command runner: the guest's init and its command
channel, the kernel's log, signals, the time limit, and the verdict when the guest ends
without a word.  How machines are built it leaves to `vm`.
"""

from __future__ import annotations

import os
from _socket import socketpair

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
from .errors import ConfigError, GuestCrash, GuestError, GuestPanic, GuestTimeout
from .foreground import Foreground
from .guest import protocol
from .guest.channel import CommandChannel
from .host.console import ConsoleLog
from .host.progress import Progress
from .layout import MIB
from .lean import signal
from .loop import EventLoop
from .record import Record
from .vm import CRASH, OFF, RESET, STOPPED, Outcome, Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .config import TraceConfig
    from .guest.channel import Outcome as CommandOutcome

ROOT_TAG = "root"
# Kernel arguments: no probing of what is not there, a restart at once after a panic.
BASE_CMDLINE = "console=ttyS0 panic=-1 reboot=a tsc=reliable"
QUIET, VERBOSE = "quiet", "ignore_loglevel"
_ENDS = {OFF: "it powered itself off", RESET: "it restarted", STOPPED: "it was stopped"}
_LOST = "the streams of its command were lost"
POWER_OFF_SECONDS = 5.0  # for the guest to write back and power off after its command, or say why not

# What a run without a command shows of the guest; needs nothing but a shell and mount points.
LOOK_AROUND = r"""
echo "kernel:  $(uname -sr)"
while read -r source target type options; do
    [ "$target" = / ] && echo "root:    $type ($source)"
    [ "$type" = virtiofs ] && echo "mount:   $target: $type ($source)"
done </proc/mounts
for device in /sys/bus/virtio/devices/*; do
    driver=$(readlink "$device/driver") || driver=none
    read -r id <"$device/device"
    echo "device:  ${device##*/}: virtio id $((id)), driver ${driver##*/}"
done
"""
_GUEST_STAGES = {
    "init": "kernel handed over to init",
    "modules": "modules loaded",
    "port": "command channel open",
    "root": "root mounted",
    "command": "command started",
    "ended": "command ended",
}


class RunConfig(Record):
    """What to run and in which guest.  `memory` is in bytes; `timeout` 0 is none; the directories in
    `share` are at the same paths in the guest, and writable."""

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
    share: tuple[str, ...] = ()
    trace: TraceConfig | None = None
    on_backend_loss: str = "stop"


class Stages:
    """Names and times in seconds of what happened: the VMM's own, then the guest's since its boot."""

    def __init__(self) -> None:
        self.host: list[tuple[str, float]] = []
        self.guest: list[tuple[str, float]] = []

    def mark(self, name: str) -> None:
        """Something of ours is done now; times count from the start of this process."""
        self.host.append((name, _process_age()))

    def table(self) -> list[str]:
        """One line for each stage."""
        lines = [f"{seconds:8.2f} s  {name}" for name, seconds in self.host]
        lines += [f"{seconds:8.2f} s  {_GUEST_STAGES.get(name, name)}" for name, seconds in self.guest]
        return ["times (of this process, then of the guest's clock):", *lines]


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
        self.on_command: Callable[[], None] = lambda: None

    def run(self, stdin: int | None = 0, stdout: int | None = 1, stderr: int | None = 2) -> int:
        """Boot, run the command, return its exit status.  Raises PyvmmError."""
        self._progress.show("starting the virtual machine")
        ours, theirs = socketpair()
        try:
            self._channel = CommandChannel(
                self._loop, ours, self._spec(), self._command_ended,
                stdin=stdin, stdout=stdout, stderr=stderr, on_stage=self._stage, on_warning=log.warn,
            )  # fmt: skip
            self._vm = Vm(self._machine(theirs.fileno()), self._loop)
        finally:
            theirs.close()
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
            mounts=tuple(protocol.Mount(path, f"share{i}") for i, path in enumerate(config.share)),
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
                *(FsDevice(f"share{i}", path) for i, path in enumerate(config.share)),
            ),
            on_backend_loss=config.on_backend_loss,
            trace=config.trace,
        )

    # -- events ----------------------------------------------------------------------------
    def _stage(self, name: str, seconds: float) -> None:
        self.stages.guest.append((name, seconds))
        self._progress.show(f"guest: {name} ({seconds:.1f} s)")
        log.debug(f"guest: {name} at {seconds:.3f} s")
        if name == "command":
            self._started = True
            self._progress.clear()
            self.on_command()

    def _command_ended(self, outcome: CommandOutcome) -> None:
        """The guest has written everything back and powers off by itself, or nothing comes of it any more."""
        self._ended = outcome
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
            raise GuestCrash(outcome.report)
        if ended is not None and ended.error and not ended.lost:
            raise GuestError(f"guest: {ended.error}")
        lost = outcome.kind == STOPPED and ended is not None
        error = self._console.explain(_LOST if lost else _ENDS[outcome.kind])
        if isinstance(error, GuestPanic) and not self.config.verbose:
            log.warn("the end of the guest's console:")
            os.write(2, self._console.text[-4000:].replace(b"\r\n", b"\n") + b"\n")
        raise error


def run_command(config: RunConfig, stages: Stages | None = None) -> int:
    """Run `config` with this process's streams and signals; returns the command's exit status."""
    run = CommandRun(config, stages)
    with Foreground(run, config.tty is not None):
        try:
            return run.run()
        finally:
            run.close()


def run_or_show(config: RunConfig) -> int:
    """`run_command`, or without a command a look around the guest and the times of each stage."""
    if config.argv:
        return run_command(config)
    stages = Stages()
    status = run_command(config.replace(argv=("/bin/sh", "-c", LOOK_AROUND), tty=None), stages)
    os.write(1, "".join(line + "\n" for line in stages.table()).encode())
    return status


def unpack_ahead(path: str) -> None:
    """Put a bzImage's kernel into the cache now, for a boot that happens on a slower machine."""
    from .boot import bzimage, image, payload

    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"kernel {path}: {error.strerror}; a readable file is needed") from error
    try:
        if image.identify(os.pread(fd, image.HEAD, 0), path) != image.ELF:
            unpacked, _ = payload.open_vmlinux(fd, bzimage.parse(fd, path), path)
            os.close(unpacked)
    finally:
        os.close(fd)


def _process_age() -> float:
    """Seconds since this process was started, by the kernel's account (10 ms steps)."""
    import time

    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
