"""Guest memory in a backend: the frontend's regions, mapped.

It owns the list of regions and their mappings; each change makes a new immutable
`GuestMemory`, and old mappings live as long as something points into them.  It must not
know rings.
"""

from __future__ import annotations

import mmap
import os

from .._native.vring import GuestMemory
from ..errors import RemoteProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..vhost_user.payloads import MemRegion, SingleRegion

    Region = MemRegion | SingleRegion

MAX_SLOTS = 509  # what rust-vmm's backends answer; KVM has about as many


def map_region(region: Region, fd: int) -> memoryview:
    """Map one region of the file `fd`; the view keeps the mapping alive."""
    what = f"memory region {region.guest_address:#x}+{region.size:#x}"
    return map_file(fd, region.mmap_offset, region.size, what)


def map_file(fd: int, offset: int, size: int, what: str) -> memoryview:
    """Map a part of a file that the frontend sent; the view keeps the mapping alive.

    RemoteProtocolError when the file is shorter: touching it would kill us.
    """
    if not size:  # to mmap, 0 would mean the whole file
        raise RemoteProtocolError(f"{what} is empty")
    slack = offset % mmap.ALLOCATIONGRANULARITY
    try:
        mapping = mmap.mmap(fd, size + slack, mmap.MAP_SHARED, offset=offset - slack)
    except (OSError, ValueError, OverflowError) as error:
        raise RemoteProtocolError(f"{what} cannot be mapped: {error}") from None
    return memoryview(mapping)[slack:]


class MemoryTable:
    """The regions that the frontend has shared so far; `memory` is their current map."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, memoryview]] = []
        self.memory = GuestMemory()

    def replace(self, regions: Sequence[Region], fds: list[int]) -> None:
        """Take a whole new table (SET_MEM_TABLE); closes `fds`, the mappings remain."""
        try:
            rows = [self._row(region, fd) for region, fd in zip(regions, fds, strict=True)]
        finally:
            for fd in fds:
                os.close(fd)
        self._commit(rows)

    def add(self, region: Region, fd: int) -> None:
        """Take one region more (ADD_MEM_REG); closes `fd`."""
        try:
            row = self._row(region, fd)
        finally:
            os.close(fd)
        if len(self._rows) >= MAX_SLOTS:
            raise RemoteProtocolError(f"more than {MAX_SLOTS} memory regions")
        self._commit([*self._rows, row])

    def remove(self, region: Region) -> None:
        """Forget the region with this place and size (REM_MEM_REG)."""
        wanted = (region.guest_address, region.user_address, region.size)
        rows = [row for row in self._rows if (row[0], row[1], len(row[2])) != wanted]
        if len(rows) == len(self._rows):
            raise RemoteProtocolError(f"no memory region {wanted[0]:#x}+{wanted[2]:#x} to remove")
        self._commit(rows)

    def clear(self) -> None:
        """Forget everything; memory is unmapped when the last chain in hand is gone."""
        self._commit([])

    def _row(self, region: Region, fd: int) -> tuple[int, int, memoryview]:
        return region.guest_address, region.user_address, map_region(region, fd)

    def _commit(self, rows: list[tuple[int, int, memoryview]]) -> None:
        try:
            self.memory = GuestMemory(rows)
        except (ValueError, OverflowError) as error:
            raise RemoteProtocolError(str(error)) from None
        self._rows = rows
