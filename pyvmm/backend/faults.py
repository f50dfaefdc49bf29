"""Misbehaviour on purpose, for tests of drivers: what a broken device might do, as data.

    Faults(seed=7, after=100, drop=0.01, duplicate={250}).attach(device)

It owns which chain is hit by what; how each fault is done is in `faulty`.  It must not know the device,
which goes on as if nothing had happened.  Everything follows from the numbers of chains and the
seed: the same faults hit the same chains again, whatever the timing.
"""

from __future__ import annotations

from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from .. import log
from ..errors import ConfigError
from .faulty import EFFECTS, FaultyRing, Hit

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from .device import Device
    from .queue import Queue

    Rule = float | int | Collection[int]  # a chance for each chain, or the numbers of the chains hit


class Faults:
    """A plan of faults.  `after` so many chains, each later one has a chance, or is named.

    A float is a chance from 0.0 to 1.0; an int is the number of a chain, as are those in a set.  So
    `drop=1.0` drops every chain and `drop=1` the second.  ConfigError for what is neither.
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
        if not 0 <= delay_seconds < float("inf"):
            raise ConfigError(f"faults: delay_seconds={delay_seconds}: {WANTED['delay_seconds']}")
        if not 0 <= features < 1 << 64:
            raise ConfigError(f"faults: features={features}: {WANTED['features']}")
        self.seed, self.after, self.delay_seconds, self.features = seed, after, delay_seconds, features
        self.rules = {name: _rule(name, rule) for name, rule in rules.items()}
        self.hits: list[Hit] = []
        self._chains = self._reads = 0

    @classmethod
    def parse(cls, text: str) -> Faults:
        """From `seed=7,after=100,drop=0.01,duplicate=250+251`; ConfigError when it is none."""
        values: dict[str, Any] = {}
        for pair in text.split(","):
            name, _, value = pair.partition("=")
            name = name.replace("-", "_")
            try:
                values[name] = _value(name, value)
            except ValueError:
                raise ConfigError(f"faults: {pair}: {WANTED.get(name, RULE)}") from None
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
        if not isinstance(rule, float):
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


NAMES = (*EFFECTS, "config_flip")


RULE = "a chance from 0.0 to 1.0, or numbers of chains joined with +, are needed"
WANTED = {
    "seed": "a number is needed",
    "after": "a number of chains is needed",
    "features": "a word of feature bits is needed, such as 0x20",
    "delay_seconds": "a time in seconds is needed, such as 0.05",
}


def _value(name: str, text: str) -> Rule:
    """What stands behind a name in `Faults.parse`; ValueError when it cannot be."""
    if name == "delay_seconds":
        return float(text)
    if name in WANTED:
        return int(text, 0)
    try:
        return {int(part, 0) for part in text.split("+")}
    except ValueError:
        return float(text)


def _rule(name: str, rule: Rule) -> float | frozenset[int]:
    """The chance, or the numbers."""
    if isinstance(rule, float):
        if 0 <= rule <= 1:
            return rule
    else:
        numbers = frozenset((rule,) if isinstance(rule, int) else rule)
        if all(type(number) is int and number >= 0 for number in numbers):
            return numbers
    raise ConfigError(f"faults: {name}={rule}: {RULE}")
