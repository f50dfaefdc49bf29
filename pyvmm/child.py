"""A child process by its descriptor: whether it has ended, how, and signals that reach no other.

It owns the pidfd, the process group and the reaping.  How the child came to be, and how it is asked
to end, is for the classes built on it.  Each leads a session, and so a process group, of its own.
"""

from __future__ import annotations

import os
import select

from . import log
from .lean import Lock, signal


class ChildProcess:
    """`pid` is a child of ours that nobody else waits for.  `pidfd` becomes readable when it ends.

    `status` is the exit status as a shell counts it (128 + n for signal n), once it is known.  `ended`,
    `kill` and `destroy` are for any thread, the rest is for the owner's.  It stays unreaped until `destroy`
    or `forget`: as long as nobody else can get its number, that names its process group.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.status: int | None = None
        self._reaped = False
        self._lock = Lock()  # guards status and descriptor

    def wait(self, seconds: float) -> int | None:
        """The exit status as soon as the process ends, None when it does not in time."""
        if seconds > 0 and self.status is None and self.pidfd >= 0:
            _readable(self.pidfd, seconds)
        with self._lock:
            self._look()
        return self.status

    def ended(self) -> bool:
        """Whether it has ended."""
        return self.wait(0) is not None or self.pidfd < 0

    def kill(self, number: int) -> None:
        """Send a signal to it and its process group while it runs."""
        with self._lock:
            if self._look():
                self._signal(number)

    def destroy(self, seconds: float) -> bool:
        """Kill it and all of its process group; whether it is over within so many seconds.

        Its memory is given back then.  What left the group is not ours to find.
        """
        with self._lock:
            fd = -1
            if self._look():
                self._signal(signal.SIGKILL)
                fd = os.dup(self.pidfd)  # the owner may close it meanwhile
        if fd >= 0:
            _readable(fd, seconds)
            os.close(fd)
        with self._lock:
            if not self._look():
                self._reap()
        return self.ended()

    def forget(self) -> None:
        """Kill what it has left in its process group, reap it, and close the descriptor."""
        with self._lock:
            self._look()
            self._reap()
            os.close(self.pidfd)
            self.pidfd = -1

    def _look(self) -> bool:
        """Whether it still runs."""
        if self.status is None and self.pidfd >= 0 and _readable(self.pidfd, 0):
            end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            assert end is not None
            self.status = end.si_status + (0 if end.si_code == os.CLD_EXITED else 128)
        return self.status is None and self.pidfd >= 0

    def _signal(self, number: int) -> None:
        try:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:  # just forked: it does not lead a group yet
                signal.pidfd_send_signal(self.pidfd, number)
        except PermissionError as error:  # it has become another user
            log.debug(f"{self.pid} gets no signal {number} from us: {error}")

    def _reap(self) -> None:
        if self.status is None or self._reaped:
            return
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError) as error:
            log.debug(f"{self.pid} leads no group of ours: {error}")
        os.waitpid(self.pid, 0)
        self._reaped = True


def _readable(fd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0, round(seconds * 1000))))
