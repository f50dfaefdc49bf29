"""Rings and chains that misbehave: how each fault is done.

It owns what stands between a device and its ring, and what becomes there of a chain that is given back.
It must not know which chain is hit by what (`faults`), nor the device.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

from ..record import Record
from .queue import signal_eventfd

if TYPE_CHECKING:
    from collections.abc import Callable

    from .._native.vring import Chain, Ring
    from .device import Device
    from .faults import Faults
    from .queue import Queue

BEYOND = 4096  # bytes more than the chain had room for, in a `used_len`


class Hit(Record):
    """One fault that was done: in which queue, to which chain (counted over all queues, from 0).

    One in the configuration space has the number of the read, in the offer none (-1), and neither a queue.
    `head` is the chain's, `detail` what is wrong now.
    """

    number: int
    queue: int
    fault: str
    head: int = -1
    detail: str = ""


class FaultyRing:
    """Stands in for a ring: chains taken from it go back with faults."""

    def __init__(self, queue: Queue, ring: Ring, faults: Faults, device: Device) -> None:
        self.queue, self.ring, self.faults, self.device = queue, ring, faults, device
        self._held: list[FaultyChain] = []  # to go back after the next one, the last of them first
        self._in_hand = 0
        self._silent = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ring, name)

    def pop(self) -> FaultyChain | None:
        """The next chain, which is doomed or not."""
        chain = self.ring.pop()
        if chain is None:
            return None
        self._in_hand += 1
        return FaultyChain(self, chain, *self.faults.next_fault())

    def rewind(self, count: int) -> None:
        """As of the real ring."""
        self._in_hand -= count
        self.ring.rewind(count)

    def returned(self, item: FaultyChain) -> None:
        """The device has given `item` back: do what is to be done with it."""
        self._in_hand -= 1
        before = self.ring.next_used
        if item.fault not in ("", "reorder"):  # which is done when another one comes before it
            item.note()
        EFFECTS.get(item.fault, honest)(item)
        if self.ring.next_used != before:
            self.release()

    def should_call(self) -> bool:
        """As of the real ring, unless the call is to be lost."""
        if not (self._in_hand or self.ring.pending()):
            self.release()  # nothing is sure to come after these
        wanted = self.ring.should_call()
        silent, self._silent = self._silent, False
        return wanted and not silent

    def lose_call(self) -> None:
        """The next call does not come."""
        self._silent = True

    def call_later(self, callback: Callable[[], None]) -> None:
        """Call back `delay_seconds` from now, if there still is a driver to see it."""
        connection = self.device.connection
        if connection is not None:
            connection.loop.call_later(self.faults.delay_seconds, callback)

    def hold(self, item: FaultyChain) -> None:
        """Give `item` back after the next one."""

        def expire() -> None:
            if item in self._held:
                self.release()
                self.queue.notify()

        item.held_at = self.ring.next_used
        self._held.append(item)
        self.call_later(expire)

    def release(self) -> None:
        """Give back the chains that were held up."""
        while self._held:
            item = self._held.pop()
            if self.ring.next_used != item.held_at:
                item.note()
            item.chain.push(item.length)


class FaultyChain:
    """Stands in for a chain; `push` does what its fault says."""

    def __init__(self, ring: FaultyRing, chain: Chain, number: int, fault: str) -> None:
        self.ring, self.chain, self.number, self.fault = ring, chain, number, fault
        self.pushed = False
        self.length = self.held_at = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.chain, name)

    def push(self, length: int | None = None) -> None:
        """Give it back, or what its fault makes of that."""
        if self.pushed:
            raise ValueError("the chain was already given back to the driver")
        self.length = self.chain.used_length(length)
        self.pushed = True
        self.ring.returned(self)

    def note(self) -> None:
        """Its fault is done now."""
        ring = self.ring
        ring.faults.note(ring.device, Hit(self.number, ring.queue.index, self.fault, self.chain.head))


# -- what each fault does with a chain that is to go back ---------------------------------------


def honest(item: FaultyChain) -> None:
    """No fault."""
    item.chain.push(item.length)


def drop(item: FaultyChain) -> None:
    """It never goes back."""


def delay(item: FaultyChain) -> None:
    """It goes back `delay_seconds` later."""

    def late() -> None:
        item.chain.push(item.length)
        item.ring.release()
        item.ring.queue.notify()

    item.ring.call_later(late)


def short_write(item: FaultyChain) -> None:
    """The used length is half of what was written."""
    item.chain.push(item.length // 2)


def used_len(item: FaultyChain) -> None:
    """The used length is more than the chain had room for."""
    chain = item.chain
    item.ring.ring.use(chain.head, chain.written + chain.writable + BEYOND, chain.slots)


def bad_used_id(item: FaultyChain) -> None:
    """The used element names a descriptor that does not exist; the chain never goes back."""
    item.ring.ring.use(item.ring.ring.size + item.chain.head & 0xFFFF, item.length)


def duplicate(item: FaultyChain) -> None:
    """It goes back twice."""
    item.chain.push(item.length)
    item.ring.ring.use(item.chain.head, item.length)


def reorder(item: FaultyChain) -> None:
    """It goes back after the next one, or `delay_seconds` later when none does until then."""
    item.ring.hold(item)


def spurious_call(item: FaultyChain) -> None:
    """The driver is called before there is anything."""
    if item.ring.queue.call_fd >= 0:
        signal_eventfd(item.ring.queue.call_fd)
    item.chain.push(item.length)


def never_call(item: FaultyChain) -> None:
    """The driver is not called for it."""
    item.chain.push(item.length)
    item.ring.lose_call()


def needs_reset(item: FaultyChain) -> None:
    """The connection ends; a frontend tells the driver that the device needs a reset."""
    connection = item.ring.device.connection
    if connection is not None:
        connection.loop.call_later(0, connection.hang_up)


def die(item: FaultyChain) -> None:
    """The process is killed with the chain in flight."""
    os.kill(os.getpid(), signal.SIGKILL)


EFFECTS: dict[str, Callable[[FaultyChain], None]] = {
    effect.__name__: effect
    for effect in (
        die,
        needs_reset,
        drop,
        delay,
        bad_used_id,
        duplicate,
        used_len,
        short_write,
        reorder,
        spurious_call,
        never_call,
    )
}
