"""The lab: a command inside an emulated machine that has a stock KVM in it.

QEMU emulates an AMD machine with SVM, Debian's kernel offers /dev/kvm in it, and the
host's file system is its root: read-only through virtiofsd, a writable layer in the
guest's memory on top.  It owns the machine from start to end, and knows nothing of what
runs inside.  Shared directories are the one way for results to outlive it.
"""

from __future__ import annotations

import os
import signal
import socket

from .. import log
from ..config import FsDevice
from ..ending import waiting
from ..errors import GuestError, GuestTimeout
from ..foreground import Foreground, shared_directory, terminal_size
from ..guest import initramfs, protocol
from ..guest.channel import CommandChannel
from ..loop import EventLoop
from ..record import Record
from . import emulator
from .accel import LAB_MARK as MARK
from .backends import start_virtiofsd
from .children import Child
from .console import ConsoleLog
from .handover import BackendProcess
from .progress import Progress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from collections.abc import Callable, Sequence
    from typing import Any

    from ..guest.channel import Outcome

LAST_WORDS_SECONDS = 1.0
MIB = 1 << 20
MEMORY, CPUS = 4096 * MIB, 1
MOST_CPUS = 8
OWN_MEMORY = 1024 * MIB  # besides that of a guest inside
START_SECONDS = 180.0  # within which the machine, and a guest's VMM in it, have surely started
_STAGES = {
    "init": "its kernel is up",
    "modules": "its kernel is up",
    "port": "its kernel is up",
    "root": "its root is mounted",
    "command": "running",
    "ended": "done",
}


class LabConfig(Record):
    """What to run, where, and in how large a machine.  `memory` is in bytes.

    `timeout` is in seconds from the machine's start, `grace` what the command gets besides; 0 is no limit.
    """

    argv: tuple[str, ...]
    env: tuple[str, ...] = ()
    cwd: str = "/"
    share: tuple[str, ...] = ()
    memory: int = MEMORY
    cpus: int = CPUS
    timeout: float = 0
    grace: float = 0
    tty: tuple[int, int] | None = None


class Lab:
    """One emulated machine that runs one command.  `run` once, then `close`."""

    def __init__(self, config: LabConfig) -> None:
        self.config = config
        self._loop = EventLoop()
        self._servers: list[BackendProcess] = []
        self._sockets: list[Socket] = []  # QEMU's ends, until it has them
        self._progress = Progress("lab")
        self._console = ConsoleLog(self._loop, log.level >= log.INFO)
        self._outcome: Outcome | None = None
        self._failure: BaseException | None = None
        self._interrupts = 0
        self._started = False
        self._channel: CommandChannel | None = None
        self._qemu: Child | None = None
        self.on_command: Callable[[], None] = lambda: None

    def run(self, stdin: int | None = 0, stdout: int | None = 1, stderr: int | None = 2) -> int:
        """Run the command; returns its exit status.  Raises ConfigError or GuestError."""
        ours, theirs = socket.socketpair()
        self._channel = CommandChannel(
            self._loop, ours, self._spec(), self._ended, stdin=stdin, stdout=stdout, stderr=stderr,
            on_stage=self._stage, on_warning=log.warn,
        )  # fmt: skip
        with theirs:
            self._start_machine(theirs)
        if self.config.timeout:
            self._loop.call_later(self.config.timeout + self.config.grace, self._timed_out)
        self._loop.run()
        self._progress.clear()
        if self._failure is not None:
            raise self._failure
        assert self._outcome is not None
        return self._verdict(self._outcome)

    def signal(self, number: int) -> None:
        """Pass a signal on to the command; a second Ctrl-C, or any other signal, ends the machine."""
        self._loop.call_soon_threadsafe(lambda: self._signalled(number))

    def resize(self, rows: int, columns: int) -> None:
        """Tell the command's terminal its new size."""
        if self._channel is not None:
            channel = self._channel
            self._loop.call_soon_threadsafe(lambda: channel.resize(rows, columns))

    def close(self) -> None:
        """End every process and release everything."""
        self._progress.clear()
        if self._channel is not None:
            self._channel.close()
        self._close_sockets()
        for helper in (self._qemu, *self._servers):
            if helper is not None:
                self._loop.remove_reader(helper.pidfd)
                helper.close()
        self._console.close()
        self._loop.close()

    # -- starting --------------------------------------------------------------------------

    def _spec(self) -> protocol.Spec:
        config = self.config
        mounts = [protocol.Mount(path, f"share{i}") for i, path in enumerate(config.share)]
        return protocol.Spec(
            argv=config.argv,
            env=(*(line for line in config.env if not line.startswith(MARK + "=")), MARK + "=1"),
            cwd=config.cwd,
            hostname="lab",
            tty=config.tty,
            root=protocol.Mount("/", "root", "virtiofs", "ro"),
            overlay=True,
            mounts=tuple(mounts),
        )

    def _start_machine(self, channel: socket.socket) -> None:
        with waiting():
            kernel = emulator.kernel(self._progress.show)
            archive = initramfs.for_kernel(kernel.modules, initramfs.LAB_MODULES)
        self._progress.show("starting the emulated machine")
        files = [("root", self._serve(FsDevice("", "/", cache="always", readonly=True)))]
        files += [(f"share{i}", self._serve(FsDevice("", path))) for i, path in enumerate(self.config.share)]
        console = self._console.take_socket()
        argv = emulator.command(
            memory=self.config.memory,
            cpus=self.config.cpus,
            kernel=kernel.path,
            initramfs=archive,
            files=[(tag, sock.fileno()) for tag, sock in files],
            channel=channel.fileno(),
            console=console.fileno(),
            quiet=log.level < log.INFO,
        )
        self._qemu = Child(argv, [sock.fileno() for sock in (channel, console, *self._sockets)])
        console.close()
        self._close_sockets()
        self._loop.add_reader(self._qemu.pidfd, self._qemu_ended)

    def _serve(self, device: FsDevice) -> Socket:
        """Start a file server for a directory; returns the connection that QEMU will use."""
        server = start_virtiofsd(device)
        self._servers.append(server)
        client = server.endpoint.connect(0)
        self._sockets.append(client)
        self._loop.add_reader(server.pidfd, lambda: self._server_ended(server))
        return client

    def _close_sockets(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()

    # -- what happens ------------------------------------------------------------------------

    def _stage(self, name: str, seconds: float) -> None:
        self._progress.show(f"{_STAGES.get(name, name)} ({seconds:.1f} s)")
        log.debug(f"lab: {name} at {seconds:.3f} s")
        if name == "command":
            self._started = True
            self._progress.clear()
            self.on_command()

    def _ended(self, outcome: Outcome) -> None:
        """The guest has written back everything by now, so the machine need not power off."""
        self._outcome = outcome
        if self._outcome.lost and self._qemu is not None:
            self._loop.call_later(LAST_WORDS_SECONDS, self._loop.stop)  # its console may say why
        else:
            self._loop.stop()

    def _qemu_ended(self) -> None:
        assert self._qemu is not None
        self._loop.remove_reader(self._qemu.pidfd)
        self._qemu.wait(0)

    def _server_ended(self, server: BackendProcess) -> None:
        self._loop.remove_reader(server.pidfd)
        if self._outcome is None and self._qemu is not None and self._qemu.wait(0) is None:
            self._fail(GuestError(f"lab: {server.name}: lost{server.endpoint.explain()}"))

    def _timed_out(self) -> None:
        timeout, grace = self.config.timeout, self.config.grace
        more = f" and {grace:g} s for the start of everything" if grace else ""
        self._fail(GuestTimeout(f"timeout: the command did not end within {timeout:g} s{more} in the lab"))

    def _fail(self, failure: BaseException) -> None:
        self._failure = failure
        self._loop.stop()

    def _signalled(self, number: int) -> None:
        self._interrupts += 1
        if number == signal.SIGINT and self._started and self._interrupts == 1:
            assert self._channel is not None
            self._channel.signal(number)
        else:
            self._fail(SystemExit(128 + number))

    def _verdict(self, outcome: Outcome) -> int:
        if outcome.status is not None:
            return outcome.status
        if outcome.error and not outcome.lost:
            raise GuestError(f"lab: {outcome.error}")
        words = self._qemu.last_words() if self._qemu else ""
        raise self._console.explain(f"the emulator said: {words}" if words else "")


def room_for(memory: int, cpus: int, timeout: float) -> dict[str, Any]:
    """What `run_in_lab` must be told for a command that runs a guest of `memory` bytes and `cpus` CPUs.

    The command itself ends the guest after `timeout` seconds (0: never); this is for a lab that hangs.  With
    several CPUs it does so in any QEMU but the lab's own (guest-images/lab-qemu/tcg.patch).
    """
    useful = min(cpus, MOST_CPUS, os.cpu_count() or 1) if emulator.own_program() else CPUS
    return {
        "memory": max(MEMORY, memory + OWN_MEMORY),
        "cpus": max(CPUS, useful),
        "timeout": timeout,
        "grace": START_SECONDS,
    }


def run_in_lab(
    argv: Sequence[str],
    *,
    share: Sequence[str] = (),
    memory: int = MEMORY,
    cpus: int = CPUS,
    timeout: float = 0,
    grace: float = 0,
) -> int:
    """Run `argv` in the lab with this process's streams and return its exit status.

    Environment and directory are this process's.  `share` are directories that stay writable through to the
    host, at the same paths; the others are as in LabConfig.  Signals of this process go to the command.
    Raises ConfigError, GuestError, and SystemExit for a signal that ends it all.
    """
    config = LabConfig(
        argv=tuple(argv),
        env=tuple(f"{key}={value}" for key, value in os.environ.items()),
        cwd=os.getcwd(),
        share=tuple(shared_directory("--share", path) for path in share),
        memory=memory,
        cpus=cpus,
        timeout=timeout,
        grace=grace,
        tty=terminal_size(),
    )
    lab = Lab(config)
    with Foreground(lab, config.tty is not None):
        try:
            return lab.run()
        finally:
            lab.close()
