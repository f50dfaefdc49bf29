"""The virtqueues of a live machine, as NumPy arrays over its memory.

This room owns the layouts of split and packed rings as structured types, and what can be told
from the rings alone: indices, what the device still has, whether it gets on.  It maps guest RAM
read-only and changes nothing.  It must not know where the facts about the machine come from:
`pyvmm.control` hands them out.  NumPy costs 0.1 s to import; only `pyvmm rings` loads this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..layout import RamRange
from ..virtio.spec import F_RING_PACKED
from .memory import GuestView
from .packed import PackedRing
from .ring import (
    BROKEN,
    BUSY,
    IDLE,
    INDIRECT,
    NEXT,
    STUCK,
    UNCLEAR,
    WRITE,
    Ring,
    Sample,
    latest,
    pauses,
    state,
)
from .split import SplitRing

__all__ = [
    "BROKEN",
    "BUSY",
    "IDLE",
    "INDIRECT",
    "NEXT",
    "STUCK",
    "UNCLEAR",
    "WRITE",
    "GuestView",
    "LiveQueue",
    "PackedRing",
    "Ring",
    "Sample",
    "SplitRing",
    "latest",
    "live_queues",
    "pauses",
    "state",
]


class LiveQueue:
    """A queue of a machine as `pyvmm.control` describes it."""

    def __init__(self, view: GuestView, device: Mapping[str, Any], facts: Mapping[str, int]) -> None:
        self.device = str(device["name"])
        self.index = facts["index"]
        places = facts["size"], facts["desc"], facts["avail"], facts["used"]
        features = device["features"]
        packed = features & F_RING_PACKED
        self.ring: Ring = PackedRing(view, *places, features) if packed else SplitRing(view, *places)


def live_queues(machine: Mapping[str, Any], ram_fd: int) -> list[LiveQueue]:
    """The running queues of a machine whose memory is `ram_fd`."""
    view = GuestView(ram_fd, [RamRange(*piece) for piece in machine["ram"]])
    return [LiveQueue(view, device, queue) for device in machine["devices"] for queue in device["queues"]]
