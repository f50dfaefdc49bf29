"""The virtqueues of one connection while they run: started, served, moved and stopped.

It owns the queues, the guest's memory, the in-flight area, and when `Device.on_queue` is
called.  It must not know the messages that set a queue up (`connection`).

What a guest may have caused, such as ring addresses outside its memory, is `Refused`.
"""

from __future__ import annotations

from .. import eventfd
from ..errors import RemoteProtocolError
from .inflight import map_areas
from .memory import MemoryTable
from .queue import Queue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..vhost_user.payloads import Inflight
    from .device import Device
    from .loop import DeviceLoop

F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_RING_PACKED = 1 << 34
POLL_SECONDS = 0.001  # a queue without a kick descriptor is looked at so often


class Refused(Exception):
    """The request was understood and cannot be done; the connection goes on."""


class RunningQueues:
    """The queues of `device`, in `loop`; `features` gives the virtio features acked so far.

    `fail` hears of a peer's misbehaviour that a device finds while the loop has it serve a queue.
    """

    def __init__(
        self, device: Device, loop: DeviceLoop, features: Callable[[], int], fail: Callable[[str], None]
    ) -> None:
        self.queues = tuple(Queue(index, size) for index, size in enumerate(device.queue_sizes))
        self.memory = MemoryTable()
        self._device = device
        self._loop = loop
        self._features = features
        self._fail = fail
        self._begun: set[Queue] = set()  # between the device's `on_start` and `on_stop`
        self._polled: set[Queue] = set()
        self._unfinished: set[Queue] = set()  # a timer will serve them again

    def close(self) -> None:
        """Forget everything; the queues were stopped before."""
        for queue in self.queues:
            queue.forget()
        self.memory.clear()

    # -- setting up ------------------------------------------------------------------------

    def track(self, description: Inflight, fd: int) -> None:
        """Mark the chains in hand in this file from each queue's next start on."""
        for queue, area in zip(self.queues, map_areas(description, fd), strict=False):
            queue.inflight = area

    def set_kick(self, queue: Queue, fd: int) -> None:
        """Take the kick eventfd (-1: none) and run the queue if it may."""

        def change() -> None:
            self._unwatch(queue)
            queue.set_kick(fd)
            queue.kicked = True

        self.change(queue, change)
        self.start(queue)

    def enable(self, queue: Queue, enabled: bool) -> None:
        """Let the queue run, or rest, where it is."""

        def change() -> None:
            queue.enabled = enabled

        self.change(queue, change)
        self.start(queue)

    def set_addresses(self, queue: Queue, desc: int, avail: int, used: int) -> None:
        """Take the ring's user addresses; one that runs goes on there."""
        queue.addresses = (desc, avail, used)
        if queue.ring is not None:
            self._move(queue)

    def change(self, queue: Queue, change: Callable[[], None]) -> None:
        """Do `change` to a queue; a thread of the device's is in there neither meanwhile nor
        afterwards, if the queue then does not run."""
        if self._device.threaded:
            self._end(queue)
        change()
        if self._device.threaded:
            self._begin(queue)

    def moved(self) -> None:
        """The memory table changed: find each ring again, and stop those that are not in it."""
        refusals = []
        for queue in self.queues:
            if queue.ring is not None:
                try:
                    self._move(queue)
                except Refused as refusal:
                    refusals.append(str(refusal))
        if refusals:
            raise Refused("; ".join(refusals))

    def _move(self, queue: Queue) -> None:
        ring, addresses = queue.ring, queue.addresses
        assert ring is not None and addresses is not None

        def change() -> None:
            try:
                ring.move(self.memory.memory, *addresses)
            except ValueError as error:
                ring.stop()
                raise Refused(f"virtqueue {queue.index}: {error}") from None

        self.change(queue, change)

    # -- running -----------------------------------------------------------------------------

    def start(self, queue: Queue) -> None:
        """Run `queue` if it may run now: kick set and enabled."""
        if not (queue.kicked and queue.enabled):
            return
        if queue.ring is None:
            self._make_ring(queue)
        self._begin(queue)
        if self._device.threaded:
            return
        self._watch(queue)
        self._serve(queue)  # what came before the kick descriptor did

    def _make_ring(self, queue: Queue) -> None:
        features = self._features()
        try:
            queue.start(
                self.memory.memory,
                packed=bool(features & F_RING_PACKED),
                event_idx=bool(features & F_EVENT_IDX),
                indirect=bool(features & F_INDIRECT_DESC),
            )
        except ValueError as error:
            raise Refused(f"virtqueue {queue.index}: {error}") from None

    def busy(self) -> bool:
        """Whether a queue runs, and could change what the device's state is."""
        return any(queue.running for queue in self.queues)

    def stop(self, queue: Queue) -> int:
        """End `queue`, whatever the device says to that; the base from which it could go on."""
        try:
            self._end(queue)
        finally:
            self._unwatch(queue)
            base = queue.stop()
        return base

    def stop_all(self) -> None:
        """End every queue; what the device raised first comes after that."""
        errors = []
        for queue in self.queues:
            try:
                self.stop(queue)
            except Exception as error:
                errors.append(error)
        if errors:
            del errors[1:]
            raise errors.pop()  # which this frame must not keep: it would keep the guest's memory

    def _begin(self, queue: Queue) -> None:
        """Tell the device, if it does not know yet, that the queue runs."""
        if queue.running and queue not in self._begun:
            self._begun.add(queue)
            self._device.on_start(queue)

    def _end(self, queue: Queue) -> None:
        """Tell the device, if it has begun, to leave the queue alone."""
        if queue in self._begun:
            self._begun.discard(queue)
            queue.ending = True
            try:
                queue.hand_to(self._device.on_stop)
            finally:
                queue.ending = False
            queue.notify()

    def _watch(self, queue: Queue) -> None:
        if queue.kick_fd < 0:
            if queue not in self._polled:
                self._polled.add(queue)
                self._loop.call_later(POLL_SECONDS, lambda: self._poll(queue))
            return
        self._loop.add_reader(queue.kick_fd, lambda: self._on_kick(queue))

    def _unwatch(self, queue: Queue) -> None:
        if queue.kick_fd >= 0:
            self._loop.remove_reader(queue.kick_fd)

    def _poll(self, queue: Queue) -> None:
        if queue.running and queue.kick_fd < 0:
            self._turn(queue)
            self._loop.call_later(POLL_SECONDS, lambda: self._poll(queue))
        else:
            self._polled.discard(queue)

    def _on_kick(self, queue: Queue) -> None:
        eventfd.drain(queue.kick_fd)  # of two queues with the same one, each is served
        self._turn(queue)

    def _turn(self, queue: Queue) -> None:
        try:
            self._serve(queue)
        except RemoteProtocolError as error:
            self._fail(str(error))

    def _serve(self, queue: Queue) -> None:
        if not queue.running:
            return
        queue.again = False
        queue.hand_to(self._device.on_queue)
        if queue.again and queue not in self._unfinished:
            self._unfinished.add(queue)
            self._loop.call_later(0, lambda: self._go_on(queue))

    def _go_on(self, queue: Queue) -> None:
        self._unfinished.discard(queue)
        self._turn(queue)
