"""Helper programs that must not outlive us: started, watched, ended, reaped.

It owns child processes and nothing else; what they are is for the callers.  The kernel
ends them when the thread that started them ends, however that happens.
"""

from __future__ import annotations

import os

from .. import ending
from ..backend.process import keep_only
from ..child import ChildProcess
from ..errors import ConfigError
from ..lean import signal
from .output import Kept, Passed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_GRACE = 2.0  # seconds


class Child(ChildProcess):
    """One helper.  `pidfd` becomes readable when it ends; `close` ends it if it has not.

    Only the descriptors in `keep` stay open in it, under their own numbers.  Its standard
    input is empty; what it prints is kept for `last_words`, or each line is passed to `tell` once
    `output` listens.  It has a session of its own, so Ctrl-C does not reach it.  `prepare` is
    called in the child before it turns into the program; an OSError of it counts as a failure to
    start.  Raises ConfigError when the program cannot be started.
    """

    def __init__(
        self,
        argv: Sequence[str],
        keep: Sequence[int] = (),
        prepare: Callable[[], None] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.name = os.path.basename(argv[0])
        self.output = Passed(tell) if tell else Kept(self.name)
        try:
            super().__init__(_start(argv, keep, self.output.fd, prepare))
        except BaseException:
            self.output.close()
            raise
        self.output.started()

    def close(self) -> None:
        """End it, politely first, and reap it."""
        if self.pidfd < 0:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self.ended():
                self.kill(number)
                self.wait(_GRACE)
        self.forget()
        self.output.close()

    def last_words(self) -> str:
        """The last line that it printed, or nothing."""
        return self.output.last()


def _start(argv: Sequence[str], keep: Sequence[int], output: int, prepare: Callable[[], None] | None) -> int:
    """Fork and exec; returns the process id once the program runs."""
    from .._native.process import set_parent_death_signal

    reader, writer = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()

    def prepare_all() -> None:
        set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        if prepare is not None:
            prepare()

    with ending.held():
        pid = os.fork()
        if pid == 0:
            _become(argv, keep, output, writer, prepare_all)
    os.close(writer)
    with open(reader, "rb") as pipe:
        failure = pipe.read()
    if failure:
        os.waitpid(pid, 0)
        raise ConfigError(f"{argv[0]} cannot be started: {failure.decode()}")
    return pid


def _become(
    argv: Sequence[str], keep: Sequence[int], output: int, failure: int, prepare: Callable[[], None]
) -> None:
    """In the child: turn into the program.  Never returns."""
    try:
        os.setsid()
        prepare()
        _arrange_descriptors(keep, output)
        keep_only({0, 1, 2, failure, *keep})
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        ending.release()
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
