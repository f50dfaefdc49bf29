"""A device of our own that gives back what it is given: for benchmarks and tests of drivers.

Each chain's device-readable bytes are copied into its device-writable bytes.  The number
is one that virtio has not assigned.  Every queue has a thread whose loop is native and holds
no GIL.  This module owns those threads.
"""

from __future__ import annotations

import os
from threading import Thread

from .. import eventfd
from .._native.vring import RingError
from .device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .queue import Queue

DEVICE_ID = 63
PATIENCE = 0.05  # seconds for a ring full of chains, before a look at what the thread may wait for


class Echo(Device):
    """`queues` virtqueues of `size` entries.  `native` False echoes in Python, for comparison."""

    device_id = DEVICE_ID

    def __init__(self, queues: int = 1, size: int = 256, native: bool = True) -> None:
        super().__init__()
        self.queue_sizes = (size,) * queues
        self.threaded = native
        self.echoed = 0
        self._workers: dict[int, _Worker] = {}

    def on_start(self, queue: Queue) -> None:
        if self.threaded:
            self._workers[queue.index] = _Worker(queue)

    def on_stop(self, queue: Queue) -> None:
        worker = self._workers.pop(queue.index, None)
        if worker is not None:
            self.echoed += worker.stop()

    def on_queue(self, queue: Queue) -> None:
        for chain in queue:
            chain.write(chain.read())
            self.echoed += 1


class _Worker:
    """One queue's thread."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._count = 0
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = Thread(target=self._run, name=f"echo {queue.index}", daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """End the thread; how many chains it echoed."""
        os.eventfd_write(self._stop_fd, 1)
        while self._ends_late():
            if self._queue.call_fd >= 0:
                eventfd.make_room(self._queue.call_fd)  # the driver has filled it, and takes nothing
        os.close(self._stop_fd)
        return self._count

    def _ends_late(self) -> bool:
        self._thread.join(PATIENCE)
        return self._thread.is_alive()

    def _run(self) -> None:
        queue = self._queue
        assert queue.ring is not None
        try:
            self._count = queue.ring.echo(queue.kick_fd, queue.call_fd, self._stop_fd)
        except RingError as error:
            queue.broke(error)


if __name__ == "__main__":
    from .inflight import MAX_QUEUES, MAX_SIZE
    from .program import count, main

    main(
        "echo",
        lambda options: Echo(
            count("--queues", options.queues, MAX_QUEUES), count("--size", options.size, MAX_SIZE)
        ),
        [("--queues", "1", "how many virtqueues"), ("--size", "256", "entries of each virtqueue")],
    )
