"""Files in a device's shared memory regions (virtio 1.2, 2.10), where the guest's driver finds them.

It owns what is mapped where, for a device in Python; the frontend does the mapping.  A reset of the
device, and the end of the connection, unmap everything: `forget` makes the book agree.  It must
not know what is in the files.
"""

from __future__ import annotations

from ..errors import LocalProtocolError
from ..vhost_user.payloads import Mmap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .device import Device

WRITABLE = 1 << 0  # VHOST_USER_FLAG_MAP_RW


class SharedMemory:
    """What `device` has mapped (virtio 1.3, section 2.10).

    Its class names sizes of regions as `shared_memory`.
    Each call waits for the frontend.  OSError when that refuses, or has not agreed to any (SHMEM): the
    errno is the status, if it is a frontend that says why.  BackendLost when it does not answer, which
    out of `Device.on_queue` costs the connection.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._mapped: dict[tuple[int, int], int] = {}

    def map(
        self, shmid: int, offset: int, fd: int, length: int, *, fd_offset: int = 0, writable: bool = True
    ) -> None:
        """Show `length` bytes of the file `fd` at `offset` of region `shmid`, where nothing is (SHMEM_MAP).

        All in bytes, on page boundaries; the descriptor stays the caller's.
        """
        self._ask("SHMEM_MAP", Mmap(shmid, fd_offset, offset, length, WRITABLE if writable else 0), fd)
        self._mapped[shmid, offset] = length

    def unmap(self, shmid: int, offset: int) -> None:
        """Take away the mapping that begins at `offset` (SHMEM_UNMAP); KeyError when none does."""
        length = self._mapped[shmid, offset]
        self._ask("SHMEM_UNMAP", Mmap(shmid, 0, offset, length, 0))
        del self._mapped[shmid, offset]

    def forget(self) -> None:
        """Nothing is mapped any more: for the device's `on_reset` and `on_disconnect`."""
        self._mapped.clear()

    def _ask(self, name: str, request: Mmap, *fds: int) -> None:
        connection = self._device.connection
        if connection is None:
            raise OSError(f"{name}: no frontend is connected")
        try:
            status = connection.ask(name, request, fds)
        except LocalProtocolError as error:
            raise OSError(f"{name}: {error}") from None
        if status:
            raise OSError(status, f"{name}: the frontend refused")
