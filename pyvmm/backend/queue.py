"""One virtqueue as a device sees it: chains to take, and the notifications both ways.

It owns the queue's eventfds and its ring while that runs.  It must not know the
messages that configure it (`connection`) or what the device does with the chains.
"""

from __future__ import annotations

import os

from .. import eventfd, log
from .._native.vring import Chain as Chain  # noqa: PLC0414 (devices get it here)
from .._native.vring import PackedRing, RingError, VRing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .._native.vring import GuestMemory, Ring


class Queue:
    """A virtqueue (virtio 1.3, section 2.6).  Iterate over it in `Device.on_queue` to get available chains.

    A chain that the loop's body neither pushed nor `keep`s is given back when the next one is
    asked for, with what was written to it.  One pass hands out at most as many chains as
    the queue has entries, so that a busy driver cannot starve the others; the rest comes
    in the next call.

    After `break`, the chain of that turn is given back when `on_queue` returns, and the rest comes in
    the next call.  When `on_queue` raises, that chain stays in hand.  Elsewhere, `notify` ends a loop that
    was left early.

    `index` is the virtqueue's number, `max_size` the largest and `size` the driver's number of entries,
    `fresh` whether it began anew rather than to go on from a pause.
    """

    def __init__(self, index: int, max_size: int) -> None:
        self.index = index
        self.max_size = max_size
        self.kick_fd = self.call_fd = self.error_fd = -1
        self.forget()

    def forget(self) -> None:
        """Back to what a new connection finds; descriptors are closed."""
        self.size = self.max_size
        self.base = 0
        self.fresh = False  # whether its ring began at the beginning, and does not go on from a pause
        self.addresses: tuple[int, int, int] | None = None
        self.inflight: memoryview | None = None  # where chains in hand are noted
        self.ring: Ring | None = None
        self.enabled = False
        self.ending = False  # within `Device.on_stop`, where the rest can be taken though disabled
        self.kicked = False  # whether SET_VRING_KICK came: a queue may go without the descriptor
        self.again = False
        self._lent: set[Chain] = set()  # by loops, which give them back
        self._left: list[Chain] = []  # of loops that were left early
        self._missed_call = False
        self.close()

    # -- what devices use --------------------------------------------------------------

    def __iter__(self) -> Iterator[Chain]:
        if self.ring is not None:
            self.ring.disable_kicks()
        for _ in range(self.size):
            chain = self.pop()
            if chain is None:
                break
            self._lent.add(chain)
            try:
                yield chain
            except GeneratorExit:  # `break`, or an exception: `hand_to` sees which
                self._leave(chain)
                raise
            self._settle(chain)
        else:
            self.again = True
        self.notify()

    def pop(self) -> Chain | None:
        """Take the next available chain, which the caller pushes sooner or later (section 2.7.6 or 2.8).

        None when there is none, and then the driver's next one calls `on_queue`.
        """
        ring = self.ring
        if ring is None or not (self.enabled or self.ending):
            return None
        try:
            chain = ring.pop()
            if chain is None and ring.enable_kicks():
                chain = ring.pop()
        except RingError as error:
            self.broke(error)
            return None
        return chain

    def keep(self, chain: Chain) -> None:
        """Leave `chain` out of the loop's return: the device pushes it later, in any order.

        Nothing for a chain of `pop`, which nobody else pushes anyway.
        """
        self._lent.discard(chain)

    def rewind(self, count: int) -> None:
        """Put the last `count` popped and not pushed chains back, as if never popped; drop them after."""
        if self.ring is not None:
            self.ring.rewind(count)

    def notify(self) -> None:
        """Tell the driver about pushed chains, unless it asked not to be told (section 2.7.7 or 2.8.10).

        Loops over the queue do this by themselves, at their end; call it after pushing a kept chain.
        """
        while self._left:
            self._settle(self._left.pop(0))
        if self.ring is not None and self.ring.should_call():
            self._call()

    def _call(self) -> None:
        if self.call_fd < 0:
            self._missed_call = True
        else:
            signal_eventfd(self.call_fd)

    @property
    def running(self) -> bool:
        """Whether chains can be taken now."""
        return self.enabled and self.ring is not None and self.ring.running

    def _leave(self, chain: Chain) -> None:
        self._left.append(chain)
        if self.ring is not None and self.ring.enable_kicks():
            self.again = True  # for these the driver has kicked

    def _settle(self, chain: Chain) -> None:
        if chain in self._lent:
            self._lent.remove(chain)
            if not chain.pushed:
                chain.push()

    def broke(self, error: RingError) -> None:
        """The driver broke the ring, which has stopped for good; the frontend is told."""
        log.once(("ring", self.index), f"virtqueue {self.index} stopped: {error}")
        if self.error_fd >= 0:
            signal_eventfd(self.error_fd)

    # -- what the connection uses ------------------------------------------------------

    def start(self, memory: GuestMemory, *, packed: bool, event_idx: bool, indirect: bool) -> None:
        """Make the ring from what the frontend set; ValueError when it cannot be."""
        if self.addresses is None:
            raise ValueError("its addresses were never set")
        place = (memory, self.size, *self.addresses)
        if packed:
            self.ring = PackedRing(*place, base=self.base, event_idx=event_idx, indirect=indirect)
        else:
            self.ring = VRing(
                *place, base=self.base, event_idx=event_idx, indirect=indirect, inflight=self.inflight
            )
        self.fresh = self.ring.base == (PackedRing.FRESH if packed else 0)
        if self.ring.resumed:
            self._call()  # a predecessor may have been killed between the used index and its call

    def hand_to(self, method: Callable[[Queue], None]) -> None:
        """Have a method of the device's take chains; those whose loops it left early go back then.

        Not if it raises: nobody has done what they ask for, so a successor must find them in flight.
        """
        self._left.clear()
        method(self)
        if self._left:
            self.notify()

    def stop(self) -> int:
        """End the ring and forget its eventfds; return the base to go on from."""
        if self.ring is not None:
            self.ring.stop()
            self.base = self.ring.base
            self.ring = None
        self.again = self.kicked = False
        self.close()
        return self.base

    def set_call(self, fd: int) -> None:
        """Use `fd` (-1: none) for used buffer notifications; one that was missed is made up for."""
        close_fd(self.call_fd)
        self.call_fd = fd
        if fd >= 0 and self._missed_call:
            self._missed_call = False
            signal_eventfd(fd)

    def set_error(self, fd: int) -> None:
        """Use `fd` (-1: none) to tell the frontend that the ring broke."""
        close_fd(self.error_fd)
        self.error_fd = fd

    def set_kick(self, fd: int) -> None:
        """Use `fd` (-1: none) for the driver's kicks."""
        close_fd(self.kick_fd)
        self.kick_fd = fd

    def close(self) -> None:
        """Close all three eventfds."""
        self.set_kick(-1)
        self.set_call(-1)
        self.set_error(-1)


def close_fd(fd: int) -> None:
    """Close `fd` unless it is -1."""
    if fd >= 0:
        os.close(fd)


def signal_eventfd(fd: int) -> None:
    """Add one to an eventfd of the frontend's, which may be full, and may be blocking."""
    try:
        eventfd.signal(fd)
    except OSError:
        return  # a signal, which ends the wait for a counter that the frontend fills again and again
