"""A device's state on its way to or from the frontend (SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE).

It owns the descriptor of a transfer and the thread that moves the bytes, so that a
frontend may hand over a pipe and read it whenever it likes.  What the bytes mean, only
the device knows.
"""

from __future__ import annotations

import os
import select

SAVE, LOAD = 0, 1
PHASE_STOPPED = 0
USE_YOURS = 0x100  # the reply that says: no descriptor comes back, the frontend's is used
FAILED = 0x101
MOST = 64 << 20  # bytes of state that a frontend may send
PIECE = 1 << 16
SECONDS = 30.0  # how long one end waits for the other


class Transfer:
    """Moves `data` into `fd`, or all there is in `fd` into `data`; owns and closes `fd`."""

    def __init__(self, fd: int, data: bytes | None) -> None:
        self.loads = data is None
        self.data = bytearray(data or b"")
        self._fd = fd
        self._failed = False
        from threading import Thread  # only those who move state pay for it

        self._thread = Thread(target=self._run, name="state", daemon=True)
        self._thread.start()

    def finish(self) -> bool:
        """Wait for the end; whether all went well."""
        self._thread.join(SECONDS)
        return not (self._failed or self._thread.is_alive())

    def _run(self) -> None:
        try:
            (self._load if self.loads else self._save)()
        except OSError:
            self._failed = True
        finally:
            os.close(self._fd)

    def _save(self) -> None:
        left = memoryview(bytes(self.data))
        while left:
            try:
                left = left[os.write(self._fd, left) :]
            except BlockingIOError:
                self._await(select.POLLOUT)

    def _load(self) -> None:
        while True:
            try:
                piece = os.read(self._fd, PIECE)
            except BlockingIOError:
                self._await(select.POLLIN)
                continue
            if not piece:
                return
            self.data += piece
            if len(self.data) > MOST:
                raise OSError("too much state")

    def _await(self, events: int) -> None:
        """Wait until the descriptor may be used, which is non-blocking, as its other users like it."""
        poll = select.poll()
        poll.register(self._fd, events)
        if not poll.poll(SECONDS * 1000):
            raise TimeoutError("the frontend does not move the state")
