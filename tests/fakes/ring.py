"""A driver's side of one split virtqueue in shared memory, enough to talk to a real backend.

One request at a time, descriptors 0.. each time; no event index.  Layouts follow virtio 1.2,
section 2.7.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
from collections.abc import Sequence

from pyvmm.layout import RamRange
from pyvmm.vhost_user.memory import GuestRam
from pyvmm.virtio.queue import QueueSetup

SIZE = 64
STEP = 0x4000
BUFFERS = 0x10_0000
NEXT, WRITE = 1, 2


class Memory:
    """Guest RAM of 2 MiB at guest address 0, mapped here."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ram")
        os.ftruncate(self.fd, 2 << 20)
        self.map = mmap.mmap(self.fd, 2 << 20)
        self.ram = GuestRam(self.fd, (RamRange(0, 2 << 20, 0),))

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


class Ring:
    """Queue `index` with its doorbell and its interrupt."""

    def __init__(self, memory: Memory, index: int) -> None:
        self.memory = memory.map
        base = 0x10000 + index * STEP
        self.desc, self.avail, self.used = base, base + 0x1000, base + 0x2000
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_NONBLOCK)
        self.setup = QueueSetup(index, SIZE, self.desc, self.avail, self.used, self.kick, self.call)
        self.count = 0

    def restart(self) -> None:
        """What a driver does after a device reset: indices at zero again."""
        self.memory[self.desc : self.desc + STEP] = bytes(STEP)
        self.count = 0

    def request(self, out: Sequence[bytes], writable: Sequence[int], seconds: float = 10.0) -> list[bytes]:
        """Send a chain, ring, wait for the interrupt; what the device wrote to each buffer."""
        places = self._describe(out, writable)
        slot = self.avail + 4 + 2 * (self.count % SIZE)
        struct.pack_into("<H", self.memory, slot, 0)
        self.count += 1
        struct.pack_into("<H", self.memory, self.avail + 2, self.count & 0xFFFF)
        os.eventfd_write(self.kick, 1)
        self._await_used(seconds)
        return [self.memory[place : place + size] for place, size in places]

    def _describe(self, out: Sequence[bytes], writable: Sequence[int]) -> list[tuple[int, int]]:
        place, places = BUFFERS, []
        total = len(out) + len(writable)
        for i in range(total):
            size = len(out[i]) if i < len(out) else writable[i - len(out)]
            if i < len(out):
                self.memory[place : place + size] = out[i]
            else:
                self.memory[place : place + size] = bytes(size)
                places.append((place, size))
            flags = (NEXT if i + 1 < total else 0) | (WRITE if i >= len(out) else 0)
            struct.pack_into("<QIHH", self.memory, self.desc + 16 * i, place, size, flags, i + 1)
            place += -(-size // 16) * 16
        return places

    def _await_used(self, seconds: float) -> None:
        while struct.unpack_from("<H", self.memory, self.used + 2)[0] != self.count & 0xFFFF:
            ready, _, _ = select.select([self.call], [], [], seconds)
            assert ready, "the backend did not answer in time"
            os.eventfd_read(self.call)

    def close(self) -> None:
        os.close(self.kick)
        os.close(self.call)
