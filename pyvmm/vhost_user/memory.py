"""Guest RAM as a backend is told about it: regions, their descriptors, user addresses.

It turns the ranges of the guest's memory map into the region table of SET_MEM_TABLE and
guest addresses into the `user addresses` of SET_VRING_ADDR.  It maps nothing and must not
know where the VMM has RAM mapped: a user address is only a name that both messages
share, so each is the guest address plus a constant, and nothing about the VMM's own
address space is given away.
"""

from __future__ import annotations

from ..errors import LocalProtocolError
from ..record import Record
from .payloads import MemRegion, MemTable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..layout import RamRange

USER_BASE = 1 << 45  # not 0, which some backends take for `unset`


class GuestRam(Record):
    """The RAM file and where its pieces are in the guest; the descriptor stays the owner's."""

    fd: int
    ranges: tuple[RamRange, ...]


class MemoryTable:
    """What SET_MEM_TABLE, or one ADD_MEM_REG after the other, carries for one guest."""

    def __init__(self, ram: GuestRam) -> None:
        self._ranges = ram.ranges
        self.payload = MemTable(
            tuple(MemRegion(r.address, r.size, USER_BASE + r.address, r.offset) for r in ram.ranges)
        )
        self.fd = ram.fd
        self.fds = (ram.fd,) * len(ram.ranges)

    def user_address(self, guest_address: int) -> int:
        """The user address of a guest address, which must be in RAM."""
        self.file_offset(guest_address)
        return USER_BASE + guest_address

    def file_offset(self, guest_address: int) -> int:
        """Where a guest address, which must be in RAM, lies in the file `fd`."""
        for piece in self._ranges:
            if piece.address <= guest_address < piece.end:
                return piece.offset + guest_address - piece.address
        raise LocalProtocolError(f"guest address {guest_address:#x} is not in RAM")
