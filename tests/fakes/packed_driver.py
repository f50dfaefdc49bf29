"""A driver's side of one packed virtqueue, with the interface of `ring_driver.DriverQueue`.

All numbers come from virtio 1.3, section 2.8.
"""

from __future__ import annotations

import struct

from fakes.ring_driver import INDIRECT, NEXT, WRITE, DriverQueue, Ram

AVAIL, USED = 1 << 7, 1 << 15
EVENTS_ON, EVENTS_OFF, EVENTS_AT = 0, 1, 2
FRESH = 0x8000_8000


class PackedQueue(DriverQueue):
    """`desc` is the descriptor ring, `avail` the driver's event suppression, `used` the device's."""

    def __init__(self, ram: Ram, size: int = 16, *, event_idx: bool = False) -> None:
        super().__init__(ram, size, event_idx=event_idx)
        self.avail, self.used = ram.alloc(4, 4), ram.alloc(4, 4)
        self.reset()

    def reset(self) -> None:
        self.ids = list(range(self.size))
        self.room = self.size
        self.place = self.used_place = 0
        self.wrap = self.used_wrap = True
        self.chains = {}
        self.slots: dict[int, int] = {}
        self.ram.data[self.desc : self.desc + 16 * self.size] = bytes(16 * self.size)
        for at in (self.avail, self.used):
            self.ram.data[at : at + 4] = bytes(4)

    @property
    def free(self) -> list[int]:  # type: ignore[override]
        return [0] * self.room

    @free.setter
    def free(self, value: list[int]) -> None:
        pass

    def add_rows(self, rows: list[tuple[int, int, int]], *, indirect: bool = False) -> int:
        writable = [(address, length) for address, length, flags in rows if flags & WRITE]
        if indirect:
            table = b"".join(struct.pack("<QIHH", a, n, 0xBAD, f) for a, n, f in rows)
            rows = [(self.ram.put(table), len(table), INDIRECT)]
        number = self.ids.pop(0)
        self.chains[number] = ([], writable)
        self.slots[number] = len(rows)
        self.write_rows(number, rows)
        return number

    def write_rows(self, number: int, rows: list[tuple[int, int, int]]) -> None:
        """Write the descriptors, the first one's flags last, so that the device sees all or none."""
        first = None
        self.room -= len(rows)
        for i, (address, length, kind) in enumerate(rows):
            flags = kind | (NEXT if i + 1 < len(rows) else 0) | (AVAIL if self.wrap else USED)
            at = self.desc + 16 * self.place
            known = struct.unpack_from("<H", self.ram.data, at + 14)[0]
            first = first or (at, flags)
            struct.pack_into(
                "<QIHH", self.ram.data, at, address, length, number, known if first[0] == at else flags
            )
            self.place += 1
            if self.place == self.size:
                self.place, self.wrap = 0, not self.wrap
        assert first is not None
        self.ram.set_u16(first[0] + 14, first[1])

    def collect(self) -> list[tuple[int, bytes]]:
        done = []
        while True:
            at = self.desc + 16 * self.used_place
            (flags,) = struct.unpack_from("<H", self.ram.data, at + 14)  # first: they make it one
            if bool(flags & USED) != self.used_wrap or bool(flags & AVAIL) != self.used_wrap:
                return done
            length, number = struct.unpack_from("<IH", self.ram.data, at + 8)
            _, writable = self.chains.pop(number)
            slots = self.slots.pop(number)
            self.ids.append(number)
            self.room += slots
            self.used_place += slots
            if self.used_place >= self.size:
                self.used_place, self.used_wrap = self.used_place - self.size, not self.used_wrap
            whole = b"".join(self.ram.data[a : a + n] for a, n in writable)
            done.append((number, whole[:length] if flags & WRITE else b""))
            if self.event_idx:
                self.want_call_at(self.used_place, self.used_wrap)

    def want_call_at(self, place: int, wrap: bool) -> None:
        """Ask for a call when the used descriptor at `place` of the round `wrap` is written."""
        self.ram.set_u16(self.avail, place | wrap << 15)
        self.ram.set_u16(self.avail + 2, EVENTS_AT)
