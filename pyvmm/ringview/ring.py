"""What both formats of rings have in common: what one looks like, and what several looks tell.

It must not know the layouts; `split` and `packed` do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from random import random

from ..record import Record

NEXT, WRITE, INDIRECT = 1, 2, 4  # descriptor flags of both formats
IDLE, BUSY, STUCK, UNCLEAR, BROKEN = "idle", "busy", "stuck", "unclear", "broken"
LOOKS = 32


class Sample(Record):
    """What one queue looked like at one moment.

    `avail` and `used` are where driver and device are, as the format counts; `last` changes whenever the
    device gives something back.  `holds` is whether the device has a chain, None when memory does not
    tell.  `heads` are the chains that it has, oldest first, if it gives back in order; the first
    `unsure` of them may have been given back.  When `broken`, the ring contradicts itself, and the
    rest tells nothing.
    """

    avail: int
    used: int
    last: int
    holds: bool | None
    heads: tuple[int, ...] = ()
    unsure: int = 0
    broken: bool = False


class Ring(ABC):
    """A virtqueue of `size` descriptors in the memory of a machine that runs."""

    format: str
    size: int

    @abstractmethod
    def sample(self) -> Sample:
        """What it looks like now."""

    @abstractmethod
    def chain(self, head: int) -> Iterator[tuple[int, int, int]]:
        """Address, length and flags of each descriptor of a chain; a loop ends after `size`."""


def latest(looks: Sequence[Sample]) -> Sample:
    """The last look at a queue that does not contradict itself, if there is one."""
    sound = [look for look in looks if not look.broken]
    return (sound or looks)[-1]


def state(looks: Sequence[Sample]) -> str:
    """What looks at one queue tell: STUCK if its device had something in all of them and gave nothing back.

    UNCLEAR if it gave nothing back, and memory does not tell whether it had something; BROKEN if none
    of the looks makes sense, so that one at a ring that is just written does no harm.
    """
    now = latest(looks)
    if now.broken:
        return BROKEN
    if now.holds is False:
        return IDLE
    sound = [look for look in looks if not look.broken]
    if any(look.last != now.last or look.holds is False for look in sound):
        return BUSY
    return STUCK if all(look.holds for look in sound) else UNCLEAR


def pauses(seconds: float) -> list[float]:
    """How long to wait after each look but the last: `seconds` in all.

    Many and by chance: positions in a packed ring come round after twice its size, and a device
    that is quick, or steady, must not be found at the same one each time.
    """
    steps = [0.5 + random() for _ in range(LOOKS - 1)]
    return [seconds * step / sum(steps) for step in steps]
