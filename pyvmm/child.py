"""A child process by its descriptor: whether it has ended, how, and signals that reach no other.

It owns the pidfd and the reaping.  How the child came to be, and how it is asked to end, is for
the classes built on it.
"""

from __future__ import annotations

import os
import select

from .lean import signal


class ChildProcess:
    """`pid` is a child of ours that nobody else waits for.  `pidfd` becomes readable when it ends.

    `status` is the exit status as a shell counts it (128 + n for signal n), once it is known.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.status: int | None = None

    def wait(self, seconds: float) -> int | None:
        """The exit status as soon as the process ends, None when it does not in time."""
        if self.status is None and self.pidfd >= 0:
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            if poll.poll(max(0, round(seconds * 1000))):
                code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
                self.status = code if code >= 0 else 128 - code
        return self.status

    def ended(self) -> bool:
        """Whether it has ended."""
        return self.pidfd < 0 or self.wait(0) is not None

    def kill(self, number: int) -> None:
        """Send a signal to it while it runs."""
        if not self.ended():
            signal.pidfd_send_signal(self.pidfd, number)

    def forget(self) -> None:
        """Close the descriptor."""
        os.close(self.pidfd)
        self.pidfd = -1
