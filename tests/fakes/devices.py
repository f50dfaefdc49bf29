"""Stand-ins for what surrounds a virtio-PCI function: KVM, the event loop and a backend.

They keep what they were told in plain lists and dicts, so that tests can look.
"""

from __future__ import annotations

import errno
import itertools
import os
import select
from collections.abc import Callable, Sequence

from pyvmm.virtio import spec
from pyvmm.virtio.queue import QueueSetup

NUMBERS = itertools.count()


def readable(fd: int) -> bool:
    """Whether an eventfd has a count."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


class FakeVm:
    """The part of KVM that routes interrupts and doorbells, with KVM's own rules."""

    def __init__(self) -> None:
        self.routes: list[tuple[int, int, int, int, int]] = []
        self.irqfds: dict[int, int] = {}  # fd -> gsi
        self.lines: dict[int, int] = {}
        self.doorbells: dict[int, int] = {}  # address -> fd
        self.log: list[str] = []
        self.refuse: set[str] = set()
        self.strict = True  # False where somebody may signal at any time

    def set_gsi_routing(self, routes: list[tuple[int, int, int, int, int]]) -> None:
        self._permit("routing")
        gone = {gsi for _, gsi in self.irqfds.items()} - {route[0] for route in routes}
        assert not gone, f"routes of GSIs {gone} went away under an irqfd"
        self.routes = list(routes)
        self.log.append("routing")

    def irqfd(self, fd: int, gsi: int, assign: bool = True) -> None:
        self._permit("irqfd")
        if assign:
            assert any(route[0] == gsi for route in self.routes), f"irqfd for GSI {gsi} without a route"
            assert fd not in self.irqfds
            # KVM would inject this and leave it in the counter, to look pending again later
            assert not (self.strict and readable(fd)), "irqfd assigned with a count in it"
            self.irqfds[fd] = gsi
        else:
            assert self.irqfds.pop(fd) == gsi
        self.log.append(f"{'assign' if assign else 'deassign'} {gsi}")

    def irq_line(self, gsi: int, level: bool) -> None:
        self.lines[gsi] = int(level)
        self.log.append(f"line {gsi}={int(level)}")

    def ioeventfd(self, fd: int, address: int, *, assign: bool = True) -> None:
        self._permit("ioeventfd")
        if assign:
            assert address not in self.doorbells
            self.doorbells[address] = fd
        else:
            assert self.doorbells.pop(address) == fd

    def message(self, fd: int) -> tuple[int, int] | None:
        """Address and data of the MSI that a write to `fd` would send now."""
        gsi = self.irqfds.get(fd)
        for number, _, low, high, data in self.routes:
            if number == gsi:
                return high << 32 | low, data
        return None

    def _permit(self, what: str) -> None:
        if what in self.refuse:
            raise OSError(errno.ENOSPC, "no space (fake)")


class FakeLoop:
    """Readers are called by `turn`, when they are readable."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[], None]] = {}

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        self.readers[fd] = callback

    def remove_reader(self, fd: int) -> None:
        self.readers.pop(fd, None)

    def turn(self) -> None:
        for callback in list(self.readers.values()):
            callback()


class FakeBackend:
    """A backend that records calls; `error` is raised by the next one that may fail."""

    def __init__(
        self,
        device_id: int = 26,
        queue_sizes: tuple[int, ...] = (128, 256),
        config: bytes = b"",
        features: int = spec.F_VERSION_1 | 1,
        shared_memory: tuple[tuple[int, int], ...] = (),
    ) -> None:
        self.name = f"fake-{next(NUMBERS)}"  # no other's: complaints are said once for each name
        self.device_id = device_id
        self.features = features
        self.queue_sizes = queue_sizes
        self.config = bytearray(config)
        self.shared_memory = shared_memory
        self.error: Exception | None = None
        self.on_config_change: Callable[[], None] = lambda: None
        self.on_config_refused: Callable[[], None] = lambda: None
        self.on_lost: Callable[[str], None] = lambda _: None
        self.active: dict[int, QueueSetup] | None = None
        self.calls: dict[int, int | None] = {}
        self.agreeable = True
        self.agreed = self.accepted = 0
        self.resets = 0
        self.closed = False

    @property
    def config_size(self) -> int:
        return len(self.config)

    def read_config(self, offset: int, length: int) -> bytes:
        assert offset >= 0 and length > 0 and offset + length <= len(self.config)
        return bytes(self.config[offset : offset + length])

    def write_config(self, offset: int, data: bytes) -> None:
        assert data and offset + len(data) <= len(self.config)
        self.config[offset : offset + len(data)] = data

    def agree(self, features: int) -> bool:
        self.agreed = features
        return self.agreeable

    def activate(self, features: int, queues: Sequence[QueueSetup]) -> None:
        self._fail()
        assert self.active is None
        self.accepted = features
        self.active = {queue.index: queue for queue in queues}
        self.calls = {queue.index: queue.call for queue in queues}

    def set_call(self, index: int, fd: int | None) -> None:
        self._fail()
        assert self.active is not None and index in self.active
        self.calls[index] = fd

    def reset(self) -> None:
        self.active = None
        self.resets += 1
        self._fail()

    def close(self) -> None:
        self.closed = True

    def interrupt(self, index: int) -> None:
        """What a backend does after it used a buffer."""
        fd = self.calls[index]
        if fd is not None:
            os.eventfd_write(fd, 1)

    def _fail(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error
