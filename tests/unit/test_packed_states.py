"""What is told of small packed rings, in every state that they can come to."""

from __future__ import annotations

import os
import struct
from collections import defaultdict
from collections.abc import Iterator

import pytest
from fakes.packed_model import ANY, BATCHES, DELAYED, NEXT_USED, NO_EVENTS, ONE_BY_ONE, Rules, State

pytest.importorskip("numpy")

from pyvmm.layout import RamRange
from pyvmm.ringview import GuestView, PackedRing, Sample
from pyvmm.virtio.spec import F_EVENT_IDX, F_IN_ORDER

DRIVER, DEVICE = 0x100, 0x200
RULES = [
    Rules(size, order, events, indirect, every_id)
    for size in (1, 2, 3)
    for order in (ANY, ONE_BY_ONE, BATCHES)
    for events in (NO_EVENTS, NEXT_USED, DELAYED)
    for indirect, every_id in ((False, False), (False, True), (True, True))
]


class Reader:
    """Reads states of one kind through memory."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, 0x1000)
        features = F_EVENT_IDX if rules.events != NO_EVENTS else 0
        features |= F_IN_ORDER if rules.order == BATCHES else 0
        view = GuestView(self.fd, [RamRange(0, 0x1000, 0)])
        self.ring = PackedRing(view, rules.size, 0, DRIVER, DEVICE, features)

    def read(self, state: State) -> Sample:
        for place, (flags, number) in enumerate(state.ring):  # a used descriptor keeps its address
            data = bytes(16) if number < 0 else struct.pack("<QIHH", 0x1000, 0, number, flags)
            os.pwrite(self.fd, data, 16 * place)
        event = state.event or 0
        off_wrap = event % self.rules.size | self.rules.wrap(event) << 15
        os.pwrite(self.fd, struct.pack("<HH", off_wrap, 0 if state.event is None else 2), DRIVER)
        return self.ring.sample()


@pytest.fixture(params=RULES, ids=lambda rules: "-".join(map(str, rules)))
def reader(request: pytest.FixtureRequest) -> Iterator[Reader]:
    reader = Reader(request.param)
    yield reader
    os.close(reader.fd)


def test_every_state(reader: Reader) -> None:
    """What is said is true, whatever else could have led to the same bytes; `unclear` is not said lightly."""
    rules = reader.rules
    known: dict[tuple[object, ...], Sample] = {}
    truths: dict[tuple[object, ...], set[bool]] = defaultdict(set)
    for state in rules.states():
        if not state.told:
            continue
        memory = state.ring, state.event
        if memory not in known:
            known[memory] = reader.read(state)
        found = known[memory]
        truths[memory].add(bool(state.held))
        assert (found.avail, found.broken) == (state.avail, False), state
        assert found.holds in (None, bool(state.held)), state
        if rules.order != ANY:
            heads = tuple(chain.place for chain in state.held)
            assert heads in [found.heads[turn:] for turn in range(found.unsure + 1)], state
        if state.event is not None and not state.back:
            assert found.holds is not None, state
    undecided = [memory for memory, found in known.items() if found.holds is None]
    if rules.order == ANY or (rules.order == BATCHES and rules.events == NO_EVENTS):
        assert all(len(truths[memory]) == 2 for memory in undecided)
