"""Helper programs that must not outlive us: started, watched, ended, reaped.

It owns child processes and nothing else; what they are is for the callers.  The kernel
ends them when the thread that started them ends, however that happens.
"""

from __future__ import annotations

import os
import select
import signal

from .._native.process import set_parent_death_signal
from ..errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_GRACE_MS = 2000


class Child:
    """One helper.  `pidfd` becomes readable when it ends; `close` ends it if it has not.

    Only the descriptors in `keep` stay open in it, under their own numbers.  Its standard
    input is empty, its output and error go to `output`.  It has a session of its own, so
    Ctrl-C does not reach it.  Raises ConfigError when the program cannot be started.
    """

    def __init__(self, argv: Sequence[str], keep: Sequence[int] = (), output: int = 2) -> None:
        self.name = os.path.basename(argv[0])
        reader, writer = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _become(argv, keep, output, writer, parent)
        os.close(writer)
        failure = os.read(reader, 4096)
        os.close(reader)
        if failure:
            os.waitpid(self.pid, 0)
            raise ConfigError(f"{argv[0]} cannot be started: {failure.decode()}")
        self.pidfd = os.pidfd_open(self.pid)
        self.status: int | None = None

    def wait(self, milliseconds: int) -> int | None:
        """Exit status as a shell counts it, or None while it runs."""
        if self.status is None:
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            if poll.poll(milliseconds):
                code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
                self.status = code if code >= 0 else 128 - code
        return self.status

    def close(self) -> None:
        """End it, politely first, and reap it."""
        if self.pidfd < 0:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.wait(0) is None:
                signal.pidfd_send_signal(self.pidfd, number)
                self.wait(_GRACE_MS)
        os.close(self.pidfd)
        self.pidfd = -1


def _become(argv: Sequence[str], keep: Sequence[int], output: int, failure: int, parent: int) -> None:
    """In the child: turn into the program.  Never returns."""
    try:
        os.setsid()
        set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        _arrange_descriptors(keep, output)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.execvp(argv[0], list(argv))
    except OSError as error:
        os.write(failure, (error.strerror or str(error)).encode())
    finally:
        os._exit(127)


def _arrange_descriptors(keep: Sequence[int], output: int) -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(null, 0)
    for fd in keep:
        os.set_inheritable(fd, True)
