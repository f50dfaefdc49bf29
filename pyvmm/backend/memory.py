"""Guest memory in a backend: the frontend's regions, mapped.

It owns the list of regions and their mappings; each change makes a new immutable
`GuestMemory`, and old mappings live as long as something points into them.  It must not
know rings.

To touch a mapping beyond its file's end kills the process (SIGBUS).  So only what has a known
length is mapped, no further than that; a file that its frontend makes shorter afterwards still kills.
Frontends seal theirs, or are trusted with that.
"""

from __future__ import annotations

import mmap
import os
from stat import S_ISCHR, S_ISREG

from .._native.vring import GuestMemory
from ..errors import RemoteProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..vhost_user.payloads import MemRegion, SingleRegion

    Region = MemRegion | SingleRegion

MAX_SLOTS = 509  # what rust-vmm's backends answer; KVM has about as many
CHARACTER_DEVICES = "/sys/dev/char"


def map_region(region: Region, fd: int) -> memoryview:
    """Map one region of the file `fd`; the view keeps the mapping alive."""
    what = f"memory region {region.guest_address:#x}+{region.size:#x}"
    return map_file(fd, region.mmap_offset, region.size, what)


def map_file(fd: int, offset: int, size: int, what: str) -> memoryview:
    """Map a part of a file that the frontend sent; the view keeps the mapping alive.

    RemoteProtocolError when it is no file with such a part, huge pages and device DAX included.
    """
    if not size:  # to mmap, 0 would mean the whole file
        raise RemoteProtocolError(f"{what} is empty")
    length = _length(fd, what)
    if offset + size > length:
        raise RemoteProtocolError(
            f"{what} ends at {offset + size:#x} of its file, which has {length:#x} bytes"
        )
    slack = offset % mmap.ALLOCATIONGRANULARITY
    try:
        mapping = mmap.mmap(fd, size + slack, mmap.MAP_SHARED, offset=offset - slack)
    except (OSError, ValueError, OverflowError) as error:
        raise RemoteProtocolError(f"{what} cannot be mapped: {error}") from None
    return memoryview(mapping)[slack:]


def _length(fd: int, what: str) -> int:
    try:
        status = os.fstat(fd)
        if S_ISREG(status.st_mode):
            return status.st_size
        folder = f"{CHARACTER_DEVICES}/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        if S_ISCHR(status.st_mode) and os.readlink(f"{folder}/subsystem").endswith("/dax"):
            with open(f"{folder}/size") as file:
                return int(file.read())
    except OSError as error:
        raise RemoteProtocolError(f"{what} is in something unknown: {error.strerror}") from None
    raise RemoteProtocolError(f"{what} is in something that is no file")


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
