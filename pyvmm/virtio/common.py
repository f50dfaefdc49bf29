"""The common configuration structure (virtio 4.1.4.3): a register table over a device.

It owns the select registers and the field widths.  It must not know what a status or a queue
means; `VirtioDevice` does.
"""

from __future__ import annotations

from ..regs import LOW, Register, RegisterFile
from . import spec
from .queue import Queue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .device import VirtioDevice

SIZE = 56  # up to queue_device: what follows needs features that are not offered
REGISTERS = (
    Register(0, 4, "device_feature_select"),
    Register(4, 4, "device_feature", "ro"),
    Register(8, 4, "driver_feature_select"),
    Register(12, 4, "driver_feature"),
    Register(16, 2, "config_msix_vector"),
    Register(18, 2, "num_queues", "ro"),
    Register(20, 1, "device_status"),
    Register(21, 1, "config_generation", "ro"),
    Register(22, 2, "queue_select"),
    Register(24, 2, "queue_size"),
    Register(26, 2, "queue_msix_vector"),
    Register(28, 2, "queue_enable"),
    Register(30, 2, "queue_notify_off", "ro"),
    Register(32, 8, "queue_desc"),
    Register(40, 8, "queue_driver"),
    Register(48, 8, "queue_device"),
)
WORDS = 2  # feature words: bits 0-31 and 32-63


class CommonConfig:
    """A bus device; `vectors` is the size of the MSI-X table."""

    def __init__(self, device: VirtioDevice, vectors: int) -> None:
        self._device = device
        self._vectors = vectors
        self._nowhere = Queue(0, 0)
        self._registers = RegisterFile(REGISTERS, self, device.name)
        self.reset()

    def reset(self) -> None:
        """Forget selections and the configuration vector."""
        self._device_select = self._driver_select = self._queue_select = 0
        self.config_vector = spec.NO_VECTOR

    def read(self, offset: int, width: int) -> int:
        """Read a register."""
        with self._device.driver_lock:
            return self._registers.read(offset, width)

    def write(self, offset: int, width: int, value: int) -> None:
        """Write a register; may start or reset the backend, and takes as long as that takes."""
        with self._device.driver_lock:
            self._registers.write(offset, width, value)

    # -- the whole device ------------------------------------------------------------------
    def read_device_feature_select(self) -> int:
        return self._device_select

    def write_device_feature_select(self, value: int) -> None:
        self._device_select = value

    def read_device_feature(self) -> int:
        return self._word(self._device.features, self._device_select)

    def read_driver_feature_select(self) -> int:
        return self._driver_select

    def write_driver_feature_select(self, value: int) -> None:
        self._driver_select = value

    def read_driver_feature(self) -> int:
        return self._word(self._device.driver_features, self._driver_select)

    def write_driver_feature(self, value: int) -> None:
        if self._driver_select < WORDS:
            shift = 32 * self._driver_select
            kept = self._device.driver_features & ~(LOW << shift)
            self._device.accept_features(kept | value << shift)
        elif value:
            self._device.complain("feature word", f"accepted feature bits in word {self._driver_select}")

    def read_config_msix_vector(self) -> int:
        return self.config_vector

    def write_config_msix_vector(self, value: int) -> None:
        self.config_vector = self._vector(value)

    def read_num_queues(self) -> int:
        return len(self._device.queues)

    def read_device_status(self) -> int:
        return self._device.status

    def write_device_status(self, value: int) -> None:
        self._device.write_status(value)

    def read_config_generation(self) -> int:
        return self._device.generation

    # -- the selected queue ------------------------------------------------------------------
    def read_queue_select(self) -> int:
        return self._queue_select

    def write_queue_select(self, value: int) -> None:
        self._queue_select = value

    def read_queue_size(self) -> int:
        return self._queue().size

    def write_queue_size(self, value: int) -> None:
        queue = self._changeable()
        if queue is not None:
            queue.set_size(value)

    def read_queue_msix_vector(self) -> int:
        return self._queue().vector

    def write_queue_msix_vector(self, value: int) -> None:
        queue = self._queue()
        if queue is not self._nowhere:
            queue.vector = self._vector(value)
            self._device.update_calls([queue])

    def read_queue_enable(self) -> int:
        return int(self._queue().enabled)

    def write_queue_enable(self, value: int) -> None:
        if value != 1:  # 4.1.4.3.2: a driver must not write 0
            self._device.complain("enable", f"wrote {value:#x} to queue_enable")
            return
        queue = self._changeable()
        if queue is not None:
            queue.enabled = True

    def read_queue_notify_off(self) -> int:
        return self._queue().index

    def read_queue_desc(self) -> int:
        return self._queue().desc

    def write_queue_desc(self, value: int) -> None:
        queue = self._changeable()
        if queue is not None:
            queue.desc = value

    def read_queue_driver(self) -> int:
        return self._queue().avail

    def write_queue_driver(self, value: int) -> None:
        queue = self._changeable()
        if queue is not None:
            queue.avail = value

    def read_queue_device(self) -> int:
        return self._queue().used

    def write_queue_device(self, value: int) -> None:
        queue = self._changeable()
        if queue is not None:
            queue.used = value

    # -- helpers -----------------------------------------------------------------------------
    @staticmethod
    def _word(features: int, select: int) -> int:
        return features >> 32 * select & LOW if select < WORDS else 0

    def _vector(self, value: int) -> int:
        """A vector that does not exist reads back as NO_VECTOR, which tells the driver (4.1.5.1.2.1)."""
        return value if value < self._vectors else spec.NO_VECTOR

    def _queue(self) -> Queue:
        """The selected queue, or one of size 0 where there is none."""
        queues = self._device.queues
        return queues[self._queue_select] if self._queue_select < len(queues) else self._nowhere

    def _changeable(self) -> Queue | None:
        """The selected queue unless it is in use: a backend has been told once and for all."""
        queue = self._queue()
        if queue is self._nowhere:
            self._device.complain("select", f"wrote to queue {self._queue_select}, which does not exist")
        elif queue.enabled or self._device.running:
            self._device.complain("fixed", f"changed queue {self._queue_select} while it was enabled")
        else:
            return queue
        return None
