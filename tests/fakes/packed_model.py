"""Every state that a small packed ring can come to, and what its device has in each.

A model of driver and device with the choices that virtio 1.3, section 2.8, leaves them: any free
buffer ID, any length of a chain, any order of giving back; what the driver has seen of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

NEXT, INDIRECT, AVAIL, USED = 1, 4, 1 << 7, 1 << 15
NEW = (0, -1)  # a descriptor that nobody has written: not the same as a used one with ID 0
ANY, ONE_BY_ONE, BATCHES = "any order", "in order", "IN_ORDER"  # in which the device gives back
NO_EVENTS, NEXT_USED, DELAYED = "no events", "next used", "delayed"  # what the driver asks for, as Linux does


class Chain(NamedTuple):
    """A chain with its buffer ID, so many slots, and the place of the first."""

    number: int
    slots: int
    place: int


class State(NamedTuple):
    """Memory, which is flags and ID of each descriptor and the event, and what only one side knows."""

    ring: tuple[tuple[int, int], ...]
    event: int | None
    avail: int
    held: tuple[Chain, ...]  # by the device
    back: tuple[tuple[Chain, ...], ...]  # given back, not seen by the driver: what each used one stands for

    @property
    def used(self) -> int:
        """The device's position, which may be negative."""
        return self.avail - sum(chain.slots for chain in self.held)

    @property
    def seen(self) -> int:
        """Up to where the driver has seen what is used."""
        return self.used - sum(chain.slots for given in self.back for chain in given)

    @property
    def told(self) -> bool:
        """Whether the driver has looked since the device came to where it asked to be woken."""
        lap = 2 * len(self.ring)
        return self.event is None or (self.event - self.seen) % lap >= self.used - self.seen


class Rules(NamedTuple):
    """Which states there are."""

    size: int
    order: str = ANY
    events: str = NO_EVENTS
    indirect: bool = False
    every_id: bool = True  # as in Linux; else in the last descriptor of a chain only

    def wrap(self, position: int) -> bool:
        return position % (2 * self.size) < self.size

    def put(self, ring: tuple[tuple[int, int], ...], position: int, flags: int, number: int):  # type: ignore[no-untyped-def]
        place = position % self.size
        return ring[:place] + ((flags, number),) + ring[place + 1 :]

    def add(self, state: State, chain: Chain, indirect: int) -> State:
        ring = state.ring
        for slot in range(chain.slots):
            position, last = state.avail + slot, slot + 1 == chain.slots
            number = chain.number if last or self.every_id else max(ring[position % self.size][1], 0)
            flags = indirect | (0 if last else NEXT) | (AVAIL if self.wrap(position) else USED)
            ring = self.put(ring, position, flags, number)
        avail = (state.avail + chain.slots) % (2 * self.size)
        return state._replace(ring=ring, avail=avail, held=(*state.held, chain))

    def adds(self, state: State) -> Iterator[State]:
        taken = {chain.number for given in (state.held, *state.back) for chain in given}
        room = self.size - (state.avail - state.seen)
        for number in set(range(self.size)) - taken:
            for slots in range(1, room + 1):
                chain = Chain(number, slots, state.avail % self.size)
                yield self.add(state, chain, 0)
                if self.indirect and slots == 1:
                    yield self.add(state, chain, INDIRECT)

    def gives(self, state: State) -> Iterator[State]:
        held = state.held
        for turn in range(min(len(held), 1) if self.order == ONE_BY_ONE else len(held)):
            given, left = (held[turn : turn + 1], held[:turn] + held[turn + 1 :])
            if self.order == BATCHES:
                given, left = held[: turn + 1], held[turn + 1 :]
            flags = AVAIL | USED if self.wrap(state.used) else 0
            ring = self.put(state.ring, state.used, flags, held[turn].number)
            yield state._replace(ring=ring, held=left, back=(*state.back, given))

    def looks(self, state: State) -> Iterator[State]:
        """The driver takes one, and asks to be told of the next, or when most of the rest is done."""
        if state.back:
            after = state._replace(back=state.back[1:])
            event = None if self.events == NO_EVENTS else after.seen % (2 * self.size)
            yield after._replace(event=event)
        if self.events == DELAYED:
            event = state.seen + (state.avail - state.seen) * 3 // 4
            yield state._replace(event=event % (2 * self.size))

    def states(self) -> set[State]:
        """All that can be reached from a new ring."""
        found = {State((NEW,) * self.size, None, 0, (), ())}
        fresh = list(found)
        while fresh:
            state = fresh.pop()
            for way in (self.adds, self.gives, self.looks):
                for after in way(state):
                    if after not in found:
                        found.add(after)
                        fresh.append(after)
        return found
