"""A device's state on its way to or from the frontend (SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE).

It owns the descriptor of a transfer and the thread that moves the bytes, so that a
frontend may hand over a pipe and read it whenever it likes.  What the bytes mean, only
the device knows.
"""

from __future__ import annotations

import os
import select
from fcntl import F_GETFL, fcntl
from time import monotonic

SAVE, LOAD = 0, 1
PHASE_STOPPED = 0
USE_YOURS = 0x100  # the reply that says: no descriptor comes back, the frontend's is used
FAILED = 0x101
MOST = 64 << 20  # bytes of state that a frontend may send
PIECE = 1 << 16
SECONDS = 30.0  # how long one end waits for the other
GLANCE = 0.1  # seconds between two looks at whether to give up
GRACE = 1.0  # seconds for a thread to see that it should


class Transfer:
    """Moves `data` into `fd`, or all there is in `fd` into `data`; owns and closes `fd`.

    Its thread waits in `poll` only, whatever the descriptor is and whoever else has it.
    """

    def __init__(self, fd: int, data: bytes | None) -> None:
        self.loads = data is None
        self.data = bytearray(data or b"")
        self._fd = fd
        self._failed = self._given_up = False
        from threading import Thread  # only those who move state pay for it

        self._thread = Thread(target=self._run, name="state", daemon=True)
        self._thread.start()

    def finish(self) -> bool:
        """Wait for the end; whether all went well."""
        self._thread.join(SECONDS)
        self.close()
        return not (self._failed or self._thread.is_alive())

    def close(self) -> None:
        """Give up what is not yet moved."""
        self._given_up = True
        self._thread.join(GRACE)

    def _run(self) -> None:
        try:
            os.set_blocking(self._fd, False)
            if fcntl(self._fd, F_GETFL) & os.O_ACCMODE == (os.O_WRONLY if self.loads else os.O_RDONLY):
                raise OSError("the wrong end of a pipe")  # of which poll would never say anything
            (self._load if self.loads else self._save)()
        except OSError:
            self._failed = True
        finally:
            os.close(self._fd)

    def _save(self) -> None:
        left = memoryview(bytes(self.data))
        while left:
            self._await(select.POLLOUT)
            try:
                left = left[os.write(self._fd, left[: select.PIPE_BUF]) :]
            except BlockingIOError:
                continue

    def _load(self) -> None:
        while True:
            self._await(select.POLLIN)
            try:
                piece = os.read(self._fd, PIECE)
            except BlockingIOError:
                continue
            if not piece:
                return
            self.data += piece
            if len(self.data) > MOST:
                raise OSError("too much state")

    def _await(self, events: int) -> None:
        """Wait until the descriptor may be used; OSError when nobody wants that any more."""
        poll = select.poll()
        poll.register(self._fd, events)
        due = monotonic() + SECONDS
        while not poll.poll(GLANCE * 1000):
            if self._given_up or monotonic() > due:
                raise TimeoutError("the frontend does not move the state")
