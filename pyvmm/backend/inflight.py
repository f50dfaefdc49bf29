"""The memory in which a backend notes the chains it holds, so that a successor knows them.

It owns the file's layout and its mapping, queue by queue (QEMU's docs/interop/vhost-user.rst,
"Inflight I/O tracking").  The frontend keeps the file and hands it to the next backend.
What is in a queue's part, and in which order it is written, `pyvmm._native.vring` knows.
"""

from __future__ import annotations

import os
from fcntl import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, fcntl
from struct import Struct

from ..errors import RemoteProtocolError
from ..vhost_user.payloads import Inflight
from .memory import map_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER = Struct("=QHHHH")  # QueueRegionSplit: features, version, desc_num, last_batch_head, used_idx
ENTRY_BYTES = 16  # DescStateSplit
ALIGNMENT = 64  # libvhost-user's, so that each may take over from the other
VERSION = 1
MAX_QUEUES = 256  # as many as vring messages can name
MAX_SIZE = 32768


def queue_bytes(size: int) -> int:
    """What one queue of `size` entries takes in the file."""
    return -(-(HEADER.size + ENTRY_BYTES * size) // ALIGNMENT) * ALIGNMENT


def create(queues: int, size: int) -> tuple[Inflight, int]:
    """A fresh file for so many queues of so many entries, and its description (GET_INFLIGHT_FD)."""
    _check_counts(queues, size)
    length = queues * queue_bytes(size)
    try:
        return Inflight(length, 0, queues, size), _sealed(length)
    except OSError as error:  # the frontend's memory regions may have taken all descriptors
        raise RemoteProtocolError(f"no in-flight area can be made: {error.strerror}") from None


def _sealed(length: int) -> int:
    fd = os.memfd_create("pyvmm-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, length)
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def map_areas(description: Inflight, fd: int) -> Sequence[memoryview]:
    """Each queue's part of the file that SET_INFLIGHT_FD brought; `fd` stays the caller's.

    RemoteProtocolError when the file cannot be what the description says.
    """
    queues, size = description.num_queues, description.queue_size
    _check_counts(queues, size)
    step = queue_bytes(size)
    if description.mmap_size < queues * step:
        raise RemoteProtocolError(
            f"in-flight area of {description.mmap_size} bytes; {queues} queues of {size} take {queues * step}"
        )
    if description.mmap_offset % 8:
        raise RemoteProtocolError(f"in-flight area at the odd offset {description.mmap_offset:#x}")
    whole = map_file(fd, description.mmap_offset, queues * step, "in-flight area")
    areas = [whole[i * step : (i + 1) * step] for i in range(queues)]
    for area in areas:
        _check_area(area, size)
    return areas


def _check_counts(queues: int, size: int) -> None:
    if not 0 < queues <= MAX_QUEUES or not 0 < size <= MAX_SIZE:
        raise RemoteProtocolError(f"in-flight area for {queues} queues of {size} entries")


def _check_area(area: memoryview, size: int) -> None:
    features, version, desc_num, *place = HEADER.unpack_from(area)
    if version == 0:  # nobody has used it yet
        HEADER.pack_into(area, 0, 0, 0, size, *place)
        return
    if version != VERSION or features or not 0 < desc_num <= size:
        raise RemoteProtocolError(
            f"in-flight area of version {version} with {desc_num} of {size} entries, features {features:#x}"
        )
