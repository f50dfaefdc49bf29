"""Misbehaviour on purpose, for tests of drivers: what a broken device might do, as data.

    Faults(seed=7, after=100, drop=0.01, duplicate={250}).attach(device)

It owns which chain is hit by what, and how each fault is done.  It must not know the device,
which goes on as if nothing had happened.  Everything follows from the numbers of chains and the
seed: the same faults hit the same chains again, whatever the timing.
"""

from __future__ import annotations

import os
import signal
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from .. import log
from ..errors import ConfigError
from ..record import Record
from .queue import signal_eventfd

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from .._native.vring import Chain, Ring
    from .device import Device
    from .queue import Queue

    Rule = float | Collection[int]  # a chance for each chain, or the numbers of the chains hit

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


class Faults:
    """A plan of faults.  `after` so many chains, each later one has a chance, or is named.

    The faults are the keys of `EFFECTS`, and `config_flip`, which counts reads of the configuration
    space instead.  `features` are feature bits to turn over in the offer.  A chain is hit by
    at most one fault: the first in the table that is due.  `hits` tells what was done, when it was done:
    a chain after which none came has not been reordered.
    """

    def __init__(
        self, *, seed: int = 0, after: int = 0, delay_seconds: float = 0.05, features: int = 0, **rules: Rule
    ) -> None:
        unknown = rules.keys() - NAMES
        if unknown:
            raise ConfigError(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
        self.seed, self.after, self.delay_seconds, self.features = seed, after, delay_seconds, features
        self.rules = rules
        self.hits: list[Hit] = []
        self._chains = self._reads = 0

    @classmethod
    def parse(cls, text: str) -> Faults:
        """From `seed=7,after=100,drop=0.01,duplicate=250+251`; ConfigError when it is none."""
        values: dict[str, Any] = {}
        for pair in text.split(","):
            name, _, value = pair.partition("=")
            try:
                values[name.replace("-", "_")] = _value(name, value)
            except ValueError:
                raise ConfigError(
                    f"faults: {pair}: a chance, or numbers joined with +, belong there"
                ) from None
        return cls(**values)

    def replay(self) -> Faults:
        """The faults that were done so far, as a plan that names them."""
        rules: dict[str, set[int]] = {}
        for hit in self.hits:
            rules.setdefault(hit.fault, set()).add(hit.number)
        plan: dict[str, Any] = {"delay_seconds": self.delay_seconds, "features": self.features, **rules}
        return Faults(seed=self.seed, **plan)  # the seed says which bits were flipped

    def attach(self, device: Device) -> None:
        """Have `device` misbehave from its next connection on; not for one with a native loop."""
        if device.threaded:
            raise ConfigError(f"{type(device).__name__} has a loop of its own, which takes no faults")
        for name, around in AROUND.items():
            setattr(device, name, partial(around, self, device, getattr(device, name)))

    def next_fault(self) -> tuple[int, str]:
        """The next chain's number, and what hits it: a key of `EFFECTS`, or nothing."""
        number = self._chains
        self._chains += 1
        return number, next((name for name in EFFECTS if self._due(name, number)), "")

    def _due(self, name: str, number: int) -> bool:
        rule = self.rules.get(name, 0.0)
        if not isinstance(rule, (int, float)):
            return number in rule
        return number >= self.after and Random(f"{self.seed} {name} {number}").random() < rule

    def flipped(self, device: Device, data: bytes) -> bytes:
        """What a read of the configuration space becomes, which gave `data`."""
        number = self._reads
        self._reads += 1
        if not data or not self._due("config_flip", number):
            return data
        bit = Random(f"{self.seed} bit {number}").randrange(8 * len(data))
        self.note(device, Hit(number, -1, "config_flip", detail=f"bit {bit}"))
        return (int.from_bytes(data, "little") ^ 1 << bit).to_bytes(len(data), "little")

    def note(self, device: Device, hit: Hit) -> None:
        """Remember, and tell, that a fault is done now."""
        self.hits.append(hit)
        device.on_fault(hit)
        log.debug(f"fault {hit.fault}: chain {hit.number} of virtqueue {hit.queue}")


# -- what is done around the methods of a device, by their names -----------------------------------


def _offer(faults: Faults, device: Device, offer: Callable[[int], int], features: int) -> int:
    return offer(features) ^ faults.features


def _on_connect(faults: Faults, device: Device, connect: Callable[[], None]) -> None:
    connect()
    if faults.features:
        device.on_fault(Hit(-1, -1, "features", detail=f"{faults.features:#x}"))


def _on_start(faults: Faults, device: Device, start: Callable[[Queue], None], queue: Queue) -> None:
    if queue.ring is not None:
        queue.ring = FaultyRing(queue, queue.ring, faults, device)  # type: ignore[assignment]
    start(queue)


def _on_stop(faults: Faults, device: Device, stop: Callable[[Queue], None], queue: Queue) -> None:
    stop(queue)
    ring: Any = queue.ring
    if isinstance(ring, FaultyRing):
        ring.release()


def _on_config_read(
    faults: Faults, device: Device, read: Callable[[int, int], bytes], offset: int, size: int
) -> bytes:
    return faults.flipped(device, read(offset, size))


AROUND: dict[str, Callable[..., Any]] = {
    "offer": _offer,
    "on_connect": _on_connect,
    "on_start": _on_start,
    "on_stop": _on_stop,
    "on_config_read": _on_config_read,
}


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
        self.pushed = True
        self.length = self.chain.written if length is None else length
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
    item.chain.push(item.chain.written + item.chain.writable + BEYOND)


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
NAMES = (*EFFECTS, "config_flip")


def _value(name: str, text: str) -> Rule:
    """What stands behind a name in `Faults.parse`."""
    if name in ("seed", "after", "features"):
        return int(text, 0)
    if "." in text or name.replace("-", "_") == "delay_seconds":
        return float(text)
    return {int(part, 0) for part in text.split("+")}
