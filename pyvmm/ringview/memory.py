"""Guest RAM as NumPy arrays.

It owns the read-only mapping.  It must not know what lies in memory.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..layout import RamRange


class GuestView:
    """Guest RAM, mapped read-only: the `ranges` of the file `fd`, which stays the caller's."""

    def __init__(self, fd: int, ranges: Sequence[RamRange]) -> None:
        self._ranges = tuple(ranges)
        size = max(piece.offset + piece.size for piece in ranges)
        if os.fstat(fd).st_size < size:
            raise ValueError(f"the RAM file has {os.fstat(fd).st_size} bytes, its ranges need {size}")
        self._bytes = np.frombuffer(mmap.mmap(fd, size, prot=mmap.PROT_READ), dtype=np.uint8)

    def array(self, address: int, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        """`count` elements at a guest address, without a copy; ValueError outside of RAM."""
        length = count * dtype.itemsize
        for piece in self._ranges:
            if piece.address <= address and address + length <= piece.end:
                start = address - piece.address + piece.offset
                return self._bytes[start : start + length].view(dtype)
        raise ValueError(f"guest addresses {address:#x} to {address + length:#x} are not in RAM")
