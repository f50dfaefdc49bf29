"""Shared memory regions (virtio 1.2, 2.10) of one device: what a backend may put where.

It owns the sizes of the regions, the book of what is mapped into them, and each rule that a
SHMEM_MAP or SHMEM_UNMAP must meet; what breaks one is refused with an errno as the ack's status.
Requests come from the event loop's thread, resets from a virtual CPU's, and neither may wait for the
backend under the lock here.  It must not know how memory is mapped, nor where a guest sees it: a
`Mapper` does that.
"""

from __future__ import annotations

import errno
import os
from stat import S_ISREG

from .. import layout, log
from ..errors import RemoteProtocolError
from ..lean import Lock
from ..record import Record
from .opening import Unfit
from .payloads import Empty, Mmap, ShmemConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Protocol

    from .client import Client
    from .codec import Message
    from .notices import Handler

    Regions = tuple[tuple[int, int], ...]

    class Mapper(Protocol):
        """What puts memory into a guest; a refusal of the host's is an OSError or ValueError."""

        def map(
            self, shmid: int, offset: int, fd: int, fd_offset: int, length: int, writable: bool
        ) -> None: ...
        def unmap(self, shmid: int, offset: int) -> None: ...
        def intact(self, shmid: int, offset: int) -> bool: ...


WRITABLE = 1 << 0  # VHOST_USER_FLAG_MAP_RW
FILE_END = 1 << 63  # of the largest file that mmap(2) can name
MAX_MAPPINGS = 1024  # of one device: each is a memory slot of KVM, and there are 32764 for all
NOWHERE = "the device is not in a machine at present"


class Refused(Exception):
    """The backend asked for what it may not have; `status` is an errno."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class File(Record):
    """What decides how a descriptor can be mapped; `size` is None where only mmap(2) knows."""

    size: int | None
    readable: bool = True
    writable: bool = True


def examine(fd: int) -> File:
    """Look at a descriptor that a backend sent."""
    from fcntl import F_GETFL, fcntl

    status = os.fstat(fd)
    mode = fcntl(fd, F_GETFL)
    access = mode & os.O_ACCMODE
    usable = not mode & os.O_PATH
    return File(
        status.st_size if S_ISREG(status.st_mode) else None,
        usable and access != os.O_WRONLY,
        usable and access == os.O_RDWR,
    )


def ask(client: Client, name: str) -> Regions:
    """The regions that a backend has, as (shmid, size); Unfit for what no guest can be shown."""
    return regions(client.ask("GET_SHMEM_CONFIG", Empty(), ShmemConfig), name)


def regions(config: ShmemConfig, name: str) -> Regions:
    """What `ask` makes of the reply; `name` is the device's, for messages."""
    found = tuple((shmid, size) for shmid, size in enumerate(config.sizes) if size)
    if len(found) != config.count:
        raise RemoteProtocolError(
            f"GET_SHMEM_CONFIG announces {config.count} regions, and {len(found)} have a size"
        )
    for shmid, size in found:
        if size % layout.PAGE_SIZE:
            raise Unfit(
                f"{name}: shared memory region {shmid} has {size:#x} bytes, which are no whole pages; "
                "the backend has to be mended"
            )
    total = sum(size for _, size in found)
    if total > layout.MMIO64_SIZE:
        raise Unfit(
            f"{name}: the backend has {total:#x} bytes of shared memory, and guests have room for "
            f"{layout.MMIO64_SIZE:#x}; configure it for less"
        )
    return found


class SharedMemory:
    """What is mapped into the regions of the device `name`; `sizes` is (shmid, size) for each.

    `on_broken` is called when mappings turn out to have no memory.  `torn` says whether the guest has
    lost mappings, to that or to the end of the backend, since the device was reset.
    """

    def __init__(self, name: str, sizes: Regions, on_broken: Callable[[], None]) -> None:
        self.torn = False
        self._name = name
        self._sizes = dict(sizes)
        self._on_broken = on_broken
        self._lock = Lock()
        self._mapper: Mapper | None = None
        self._mapped: dict[int, dict[int, int]] = {shmid: {} for shmid in self._sizes}
        self.handlers: Mapping[str, Handler] = {
            "SHMEM_MAP": lambda message: self._serve(message, self._map),
            "SHMEM_UNMAP": lambda message: self._serve(message, self._unmap),
        }

    def __len__(self) -> int:
        """How many mappings there are."""
        return sum(map(len, self._mapped.values()))

    def attach(self, mapper: Mapper | None) -> None:
        """Let `mapper` show mappings to a guest; None takes away what was mapped with the one before."""
        with self._lock:
            self._forget()
            self._mapper = mapper

    def clear(self) -> None:
        """The device is reset: unmap everything."""
        with self._lock:
            self._forget()

    def lose(self) -> None:
        """The backend is lost: unmap everything."""
        with self._lock:
            self._tear(self._places())

    def drop_broken(self, *, every: bool = False) -> int:
        """Unmap what has no memory behind it, or `every` mapping; how many those were."""
        with self._lock:
            mapper = self._mapper
            gone = [place for place in self._places() if every or (mapper and not mapper.intact(*place))]
            self._tear(gone)
        if gone:
            self._on_broken()
        return len(gone)

    def _places(self) -> list[tuple[int, int]]:
        return [(shmid, start) for shmid, book in self._mapped.items() for start in book]

    def _forget(self) -> None:
        self._drop(self._places())
        self.torn = False

    def _tear(self, places: list[tuple[int, int]]) -> None:
        self._drop(places)
        self.torn = self.torn or bool(places)

    def _drop(self, places: list[tuple[int, int]]) -> None:
        for shmid, start in places:
            assert self._mapper is not None
            self._mapper.unmap(shmid, start)
            del self._mapped[shmid][start]

    # -- requests ----------------------------------------------------------------------
    def _serve(self, message: Message, action: Callable[[Mmap, list[int]], None]) -> int:
        assert isinstance(message.payload, Mmap)
        try:
            with self._lock:
                action(message.payload, message.fds)
        except Refused as refusal:
            return self._note(message, refusal.status, str(refusal))
        except (OSError, ValueError) as error:
            return self._note(message, getattr(error, "errno", None) or errno.EINVAL, str(error))
        return 0

    def _note(self, message: Message, status: int, reason: str) -> int:
        name = message.request.name
        log.once((self._name, name), f"{self._name}: {name} refused: {reason}; others will be, silently")
        return status

    def _map(self, request: Mmap, fds: list[int]) -> None:
        self.check(request, examine(fds[0]))
        assert self._mapper is not None
        self._mapper.map(
            request.shmid,
            request.shm_offset,
            fds[0],
            request.fd_offset,
            request.length,
            bool(request.flags & WRITABLE),
        )
        self._mapped[request.shmid][request.shm_offset] = request.length

    def _unmap(self, request: Mmap, fds: list[int]) -> None:
        """Only the whole of one mapping can be unmapped."""
        if self._mapped.get(request.shmid, {}).get(request.shm_offset) != request.length:
            raise Refused(
                errno.EINVAL,
                f"region {request.shmid} has no mapping {request.shm_offset:#x}+{request.length:#x}",
            )
        self._drop([(request.shmid, request.shm_offset)])

    # -- rules -------------------------------------------------------------------------
    def check(self, request: Mmap, file: File) -> None:
        """Raise Refused unless `file` may be mapped as `request` says."""
        if self._mapper is None:
            raise Refused(errno.ENODEV, NOWHERE)
        if len(self) >= MAX_MAPPINGS:
            raise Refused(errno.ENOSPC, f"there are {MAX_MAPPINGS} mappings already")
        self._check_place(request)
        self._check_file(request, file)

    def _check_place(self, request: Mmap) -> None:
        start, length = request.shm_offset, request.length
        size = self._sizes.get(request.shmid)
        if size is None:
            raise Refused(errno.EINVAL, f"there is no shared memory region {request.shmid}")
        if not length or (start | length | request.fd_offset) % layout.PAGE_SIZE:
            raise Refused(errno.EINVAL, f"{start:#x}+{length:#x} from {request.fd_offset:#x}: no whole pages")
        if start + length > size:
            raise Refused(errno.EINVAL, f"{start:#x}+{length:#x} is not within {size:#x} bytes")
        for other, extent in self._mapped[request.shmid].items():
            if start < other + extent and other < start + length:
                raise Refused(errno.EEXIST, f"{start:#x}+{length:#x} overlaps {other:#x}+{extent:#x}")

    def _check_file(self, request: Mmap, file: File) -> None:
        if request.flags & ~WRITABLE:
            raise Refused(errno.EINVAL, f"unknown flags {request.flags:#x}")
        if not file.readable or (request.flags & WRITABLE and not file.writable):
            raise Refused(errno.EACCES, "the descriptor does not allow such accesses")
        end = request.fd_offset + request.length
        if end > (FILE_END if file.size is None else file.size):
            raise Refused(errno.EINVAL, f"the file ends before {end:#x}")
