"""Serving a device in a process of its own, forked early and gone with its parent.

It owns the child's life: what it keeps, which signals reach it, and how it ends.  It must
not know devices.  Fork before KVM, guest memory or threads exist: the child is then small
and holds nothing of the machine.

The child never returns into the parent's code: no `finally`, no exit handler of the parent
runs twice.  Modules that only the child needs are imported there, beside the parent's work.
"""

from __future__ import annotations

import os
from _socket import socketpair

from .. import ending, log
from ..child import ChildProcess
from ..errors import EXIT_VMM
from ..lean import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from collections.abc import Callable, Iterable
    from typing import NoReturn, TypeVar

    from .device import Device
    from .endpoints import PortConfig
    from .loop import DeviceLoop

    Process = TypeVar("Process", bound="DeviceProcess")

STOP_SECONDS = 3.0  # how long a backend may take to flush what the guest wrote


class DeviceProcess(ChildProcess):
    """A running backend.  `socket` is the frontend's end, connected; whoever wants it may take it.

    `pidfd` becomes readable when the process ends.  `close` ends it in order: the connection
    first, then a request to stop, then force.
    """

    def __init__(self, name: str, pid: int, sock: Socket) -> None:
        self.name = name
        super().__init__(pid)
        self.socket: Socket | None = sock

    def take_socket(self) -> Socket:
        """Hand the frontend's end over; its new owner closes it before `close` is called."""
        sock, self.socket = self.socket, None
        if sock is None:
            raise ValueError(f"the socket of {self.name} was taken before")
        return sock

    def close(self) -> None:
        """End and reap the process; harmless when repeated."""
        if self.pidfd < 0:
            return
        if self.socket is not None:
            self.socket.close()
            self.socket = None
        for sign, seconds in ((0, STOP_SECONDS), (signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 60.0)):
            if sign and self.status is None:
                log.debug(f"{self.name} backend does not end; sending signal {sign}")
                self.kill(sign)
            if self.wait(seconds) is not None:
                break
        self.forget()


class ConsoleProcess(DeviceProcess):
    """A console backend, which can be told the size of a port's terminal."""

    resize_fd = -1

    def resize(self, port: int, columns: int, rows: int) -> None:
        """Tell the guest the size of the terminal behind `port`; may be called in signal handlers."""
        data = port.to_bytes(4, "little") + columns.to_bytes(2, "little") + rows.to_bytes(2, "little")
        try:
            os.write(self.resize_fd, data)
        except OSError:
            return  # the backend has ended, or has not kept up with thousands of sizes

    def close(self) -> None:
        if self.resize_fd >= 0:
            os.close(self.resize_fd)
            self.resize_fd = -1
        super().close()


def spawn(make: Callable[[], Device], keep: Iterable[int] = (), name: str = "device") -> DeviceProcess:
    """Fork a process that serves `make()` on one end of a socketpair.

    `make` runs in the child, which keeps the descriptors in `keep` and standard error and
    closes all others.  The caller closes its own copies of what the child has taken over.
    """
    return _spawn(DeviceProcess, make, keep, name)


def spawn_console(ports: Iterable[PortConfig], name: str = "console") -> ConsoleProcess:
    """Fork a console backend with these ports, in order; their descriptors go with it.

    The caller still closes its own copies of the ports' descriptors.
    """
    ports = tuple(ports)
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def make() -> Device:
        from .console import Console

        return Console(ports, resize_fd=reader)

    try:
        keep = [reader, *(fd for port in ports for fd in port.fds)]
        process = _spawn(ConsoleProcess, make, keep, name)
    except BaseException:
        os.close(writer)
        raise
    finally:
        os.close(reader)
    process.resize_fd = writer
    return process


def _spawn(kind: type[Process], make: Callable[[], Device], keep: Iterable[int], name: str) -> Process:
    ours, theirs = socketpair()
    try:
        parent = os.getpid()
        with ending.held():
            pid = os.fork()
            if pid == 0:
                _child(make, {theirs.fileno(), *keep}, theirs, parent, name)
        return kind(name, pid, ours)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()


def _child(make: Callable[[], Device], keep: set[int], sock: Socket, parent: int, name: str) -> NoReturn:
    status = EXIT_VMM
    try:
        _leave_parent(keep)
        from .loop import DeviceLoop
        from .server import serve

        loop = DeviceLoop()
        if _stop_with(loop, parent):
            serve(make(), sock, loop=loop)
        status = 0
    except BaseException as error:
        _report(name, error)
    finally:
        os._exit(status)


def _leave_parent(keep: set[int]) -> None:
    """Cut everything that ties the child to its parent's terminal, descriptors and objects."""
    import gc

    os.setsid()  # Ctrl-C at the terminal is for the parent
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()  # the parent's objects must not be finalised here: their descriptors have new meanings
    keep_only(keep | {2})


def _stop_with(loop: DeviceLoop, parent: int) -> bool:
    """Stop the loop on SIGTERM and at the parent's death; false when it is dead already."""
    signal.signal(signal.SIGTERM, lambda *_: loop.stop())
    ending.release()
    try:
        loop.add_reader(os.pidfd_open(parent), loop.stop)
    except ProcessLookupError:
        return False
    return os.getppid() == parent


def keep_only(fds: set[int]) -> None:
    """Close all other descriptors; standard input and output become /dev/null unless kept."""
    low = 0
    for fd in sorted(fds):
        if low < fd:  # closerange(0, 0) would close everything
            os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, max(low, os.sysconf("SC_OPEN_MAX")))
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY)):
        if fd not in fds:
            null = os.open(os.devnull, flags)  # takes the lowest free number: this one
            assert null == fd


def _report(name: str, error: BaseException) -> None:
    """Say why the child ends; with the traceback for those who asked for detail."""
    log.warn(f"{name} backend failed: {type(error).__name__}: {error}")
    if log.level >= log.DEBUG:
        import traceback

        log.debug("".join(traceback.format_exception(error)))
