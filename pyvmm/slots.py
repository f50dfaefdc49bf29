"""Numbers of KVM's memory slots, for guest memory that comes and goes.

It owns which numbers are in use besides those of RAM, which come first and stay.  It must not
know what the memory is.
"""

from __future__ import annotations

import errno

from .errors import KvmError
from .lean import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Slotted(Protocol):
        """What is used of the native Vm."""

        def set_memory_region(
            self, slot: int, guest_address: int, size: int, host_address: int, readonly: bool = False
        ) -> None: ...


RAM_SLOTS = 8  # more than RAM has pieces


class MemorySlots:
    """The slots of `vm` from RAM_SLOTS up to `limit`."""

    def __init__(self, vm: Slotted, limit: int) -> None:
        self._vm = vm
        self._limit = limit
        self._next = RAM_SLOTS
        self._free: list[int] = []
        self._lock = Lock()

    def add(self, guest_address: int, size: int, host_address: int, *, readonly: bool) -> int:
        """Put host memory into the guest; returns the slot.  KvmError when KVM has no room for it."""
        with self._lock:
            slot = self._free.pop() if self._free else self._next
            if slot >= self._limit:
                raise KvmError(errno.ENOSPC, f"KVM has {self._limit} memory slots, and all are in use")
            self._next = max(self._next, slot + 1)
        try:
            self._vm.set_memory_region(slot, guest_address, size, host_address, readonly)
        except BaseException:
            self._release(slot)
            raise
        return slot

    def remove(self, slot: int) -> None:
        """Take the memory away; whoever owns it may unmap it afterwards."""
        self._vm.set_memory_region(slot, 0, 0, 0)
        self._release(slot)

    def _release(self, slot: int) -> None:
        with self._lock:
            self._free.append(slot)
