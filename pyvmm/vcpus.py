"""The virtual CPUs' threads: start them, hear of their end, stop every one.

It owns one thread for each virtual CPU and hands the exits that are memory or port
accesses to the two buses.  It does not know what is on the buses, nor what an exit
means for the machine: the first CPU that leaves its loop is reported, and the machine
decides.
"""

from __future__ import annotations

from errno import EFAULT
from time import monotonic

from .errors import KvmError
from .lean import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from ._native.vcpu import Vcpu
    from .bus import Bus

    OnExit = Callable[[int, tuple[int, dict[str, Any]] | BaseException], None]


class Exits:
    """What the native run loop calls, with plain integers, for each access it cannot finish.

    `mend` is called when the guest went where the host has no memory, with what it returned the last time,
    0 at first: it takes such memory away, and returns how often that was done by now, for whichever CPU.
    """

    __slots__ = ("io_read", "io_write", "mend", "mmio_read", "mmio_write")

    def __init__(self, mmio: Bus, pio: Bus, mend: Callable[[int], int] = int) -> None:
        self.mend = mend
        self.mmio_read = mmio.read
        self.mmio_write = mmio.write
        self.io_read = pio.read
        self.io_write = pio.write


class VcpuThreads:
    """All virtual CPUs of a machine, running between `start` and `stop`.

    `on_exit(index, exit)` is called in the CPU's own thread when its loop ends by itself,
    with the exit tuple of `Vcpu.run` or with the exception that ended it.
    """

    def __init__(self, vcpus: Sequence[Vcpu], exits: Exits, on_exit: OnExit) -> None:
        self._vcpus = vcpus
        self._exits = exits
        self._on_exit = on_exit
        self._stopping = False
        self._threads: list[Thread] = []

    def start(self) -> None:
        """Start every CPU; those that the guest has not woken wait inside KVM."""
        for vcpu in self._vcpus:
            self._threads.append(Thread(self._main, vcpu))

    def stop(self, timeout: float = 15.0) -> bool:
        """Kick every CPU out of the guest and join its thread; False if one did not end.

        `timeout` is in seconds, for all together, -1 for ever; a CPU may be waiting for a backend.
        """
        due = monotonic() + timeout
        self._stopping = True
        for vcpu in self._vcpus:
            vcpu.kick()
        return all(
            [thread.join(max(0.0, due - monotonic()) if timeout >= 0 else -1) for thread in self._threads]
        )

    def _main(self, vcpu: Vcpu) -> None:
        result: tuple[int, dict[str, Any]] | BaseException
        mended, again = 0, True
        while again:
            try:
                result = vcpu.run(self._exits)
            except BaseException as error:
                result = error
            before = mended
            if isinstance(result, KvmError) and result.errno == EFAULT:
                mended = self._exits.mend(before)
            again = mended != before  # the access is repeated, and finds nothing there now
        if not self._stopping:
            self._on_exit(vcpu.id, result)
