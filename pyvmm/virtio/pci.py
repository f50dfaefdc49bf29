"""The virtio-PCI function (virtio 4.1): capabilities, BAR 0, doorbells and interrupts.

It owns the layout of BAR 0, the ISR register and the way from a queue to an interrupt.  It must
not know what the device does, nor what a status or a feature bit means: `VirtioDevice` does.

BAR 0 is 32 KiB: each structure has its own 4 KiB page, so that a driver can map, and KVM can trap,
each by itself; the table has two pages, which is 512 vectors.  Locks: configuration lock, then the
device's `driver_lock`, then the ISR lock, then the function's line lock.
"""

from __future__ import annotations

import os
import struct
from _thread import allocate_lock as Lock

from .. import log
from ..bus import Bus
from ..errors import ConfigError
from ..eventfd import create, drain
from ..pci.config import Identity
from ..pci.function import Bar, PciFunction
from ..pci.msix import CAPABILITY_ID as MSIX_CAPABILITY
from ..pci.msix import MsixTable
from . import kinds, spec
from .common import SIZE as COMMON_SIZE
from .common import CommonConfig
from .device import VirtioDevice
from .shared_memory import SharedMemoryBar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from ..irq import InterruptRouter
    from ..layout import RamRange
    from .device import Backend
    from .shared_memory import Slots, Space

    class Readers(Protocol):
        """What is used of the event loop."""

        def add_reader(self, fd: int, callback: Callable[[], None]) -> None: ...
        def remove_reader(self, fd: int) -> None: ...

    class Doorbells(Protocol):
        """What is used of the native Vm: guest stores at `address` signal the eventfd `fd`."""

        def ioeventfd(self, fd: int, address: int, *, assign: bool = True) -> None: ...


PAGE = 0x1000
COMMON, ISR, DEVICE, NOTIFY, TABLE, PENDING = 0, PAGE, 2 * PAGE, 3 * PAGE, 4 * PAGE, 6 * PAGE
BAR_SIZE = 8 * PAGE
REGISTERS_BAR, MEMORY_BAR = 0, 2
NOTIFY_MULTIPLIER = 4  # a doorbell has 32 bits where VIRTIO_F_NOTIFICATION_DATA is accepted (4.1.4.4.1)
MAX_REGIONS = 3  # each has a capability, and those share 192 bytes
MAX_QUEUES = 256  # vhost-user names a queue in 8 bits when it hands over a doorbell
CFG_BAR, CFG_OFFSET, CFG_LENGTH, CFG_DATA = 4, 8, 12, 16  # struct virtio_pci_cfg_cap
CFG_WIDTHS = (1, 2, 4)


class VirtioPciFunction(PciFunction):
    """A virtio device on the PCI bus.

    `backend` serves it, `ram` is where rings may lie, `router` takes interrupts, `doorbells` is
    the Vm, and `loop` watches the interrupts of a guest without MSI-X.  Raises ConfigError when the
    backend's device does not fit on the bus.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        ram: Sequence[RamRange],
        router: InterruptRouter,
        doorbells: Doorbells,
        loop: Readers,
    ) -> None:
        _check(backend)
        super().__init__(backend.name, _identity(backend.device_id))
        self.backend = backend
        self._doorbells = doorbells
        self._doorbell_base: int | None = None
        self.interrupts = VirtioInterrupts(self, router, loop, 1 + len(backend.queue_sizes))
        self.msix = self.interrupts.msix
        self.device = VirtioDevice(backend, ram, self.interrupts)
        self.common = CommonConfig(self.device, len(self.msix))
        self.interrupts.common = self.common
        self.memory = SharedMemoryBar(self.name, backend.shared_memory)
        self._add_registers()
        self._add_capabilities()

    def bar_mapped(self, index: int, address: int | None) -> None:
        """The doorbells, or the shared memory, are somewhere else now."""
        if index == MEMORY_BAR:
            self.memory.moved(address)
            return
        if self._doorbell_base is not None:
            self._bind_doorbells(self._doorbell_base, assign=False)
        self._doorbell_base = None if address is None else address + NOTIFY
        if self._doorbell_base is not None:
            self._bind_doorbells(self._doorbell_base, assign=True)

    def reset(self) -> None:
        """The machine restarts: stop the backend."""
        with self.device.driver_lock:
            self.device.write_status(0)

    def close(self) -> None:
        """Unbind doorbells and interrupts and let go of the backend; no virtual CPU runs any more."""
        if self._doorbell_base is not None:
            self._bind_doorbells(self._doorbell_base, assign=False)
            self._doorbell_base = None
        if self.memory.is_open:
            self.backend.mappings.attach(None)
            self.memory.close()
        self.device.close()
        self.interrupts.close()

    def open_memory(self, reserve: Callable[[int], Space], slots: Slots) -> None:
        """Let the backend show memory to the guest, at host addresses from `reserve`, in `slots`."""
        self.memory.open(reserve, slots)
        self.backend.mappings.attach(self.memory)

    # -- construction ----------------------------------------------------------------------
    def _add_registers(self) -> None:
        registers = Bus(self.name)
        registers.insert(COMMON, PAGE, self.common, "common configuration")
        registers.insert(ISR, PAGE, self.interrupts, "ISR status")
        registers.insert(DEVICE, PAGE, DeviceConfig(self.device), "device configuration")
        registers.insert(NOTIFY, PAGE, Notify(self.device), "notification")
        registers.insert(TABLE, 2 * PAGE, self.msix, "MSI-X table")
        registers.insert(PENDING, PAGE, self.msix.pending, "MSI-X pending bits")
        self.add_bar(Bar(REGISTERS_BAR, BAR_SIZE, registers))
        if self.memory.size:
            self.add_bar(Bar(MEMORY_BAR, self.memory.size, self.memory, prefetchable=True))

    def _add_capabilities(self) -> None:
        self._add_capability(spec.CAP_COMMON, COMMON, COMMON_SIZE)
        notify_size = NOTIFY_MULTIPLIER * max(1, len(self.device.queues))
        self._add_capability(spec.CAP_NOTIFY, NOTIFY, notify_size, struct.pack("<I", NOTIFY_MULTIPLIER))
        self._add_capability(spec.CAP_ISR, ISR, 1)
        if self.device.config_size:
            self._add_capability(spec.CAP_DEVICE, DEVICE, self.device.config_size + 3 & ~3)
        self._cfg = self._add_capability(spec.CAP_PCI, 0, 0, bytes(4), bar=0)
        self.config.allow(self._cfg + CFG_BAR, 1, 0xFF)
        self.config.allow(self._cfg + CFG_OFFSET, 12, (1 << 96) - 1)
        self.config.before_read(self._cfg + CFG_DATA, self._cfg_read)
        self.config.after_write(self._cfg + CFG_DATA, self._cfg_write)
        body = self.msix.capability(REGISTERS_BAR, TABLE, PENDING)
        self._msix_offset = self.config.add_capability(MSIX_CAPABILITY, body)
        self.config.allow(self._msix_offset + 2, 2, 0xC000)
        self.config.after_write(self._msix_offset, self._msix_written)
        for shmid, (offset, size) in self.memory.regions.items():
            high = struct.pack("<II", offset >> 32, size >> 32)
            low, length = offset & 0xFFFF_FFFF, size & 0xFFFF_FFFF
            self._add_capability(spec.CAP_SHARED_MEMORY, low, length, high, bar=MEMORY_BAR, number=shmid)

    def _add_capability(
        self,
        kind: int,
        offset: int,
        length: int,
        extra: bytes = b"",
        *,
        bar: int = REGISTERS_BAR,
        number: int = 0,
    ) -> int:
        """Append a struct virtio_pci_cap (4.1.4); returns where it is."""
        body = struct.pack("<BBBBxxII", 16 + len(extra), kind, bar, number, offset, length) + extra
        return self.config.add_capability(spec.PCI_CAP_VENDOR, body)

    # -- doorbells -------------------------------------------------------------------------
    def _bind_doorbells(self, base: int, *, assign: bool) -> None:
        """A store of any width and value to a queue's doorbell signals its eventfd in the kernel.

        Without (KVM has a limit for all devices together) stores come to `Notify`, which is slower.
        """
        for index, kick in enumerate(self.device.kicks):
            try:
                self._doorbells.ioeventfd(kick, base + NOTIFY_MULTIPLIER * index, assign=assign)
            except OSError as error:
                if assign:
                    log.once((self.name, "ioeventfd"), f"{self.name}: doorbells will be slow: {error}")

    # -- access through configuration space (4.1.4.9) ----------------------------------------
    def _cfg_target(self) -> tuple[Bar, int, int] | None:
        get = self.config.get
        bar = self.bars.get(get(self._cfg + CFG_BAR, 1))
        offset, length = get(self._cfg + CFG_OFFSET, 4), get(self._cfg + CFG_LENGTH, 4)
        if bar is None or length not in CFG_WIDTHS or offset % length or offset + length > bar.size:
            return None
        return bar, offset, length

    def _cfg_read(self) -> None:
        target = self._cfg_target()
        if target is not None:
            bar, offset, length = target
            self.config.put(self._cfg + CFG_DATA, length, bar.device.read(offset, length))

    def _cfg_write(self) -> None:
        target = self._cfg_target()
        if target is not None:
            bar, offset, length = target
            bar.device.write(offset, length, self.config.get(self._cfg + CFG_DATA, length))

    # -- MSI-X -------------------------------------------------------------------------------
    def _msix_written(self) -> None:
        enabled = self.msix.enabled
        self.msix.set_control(self.config.get(self._msix_offset + 2, 2))
        if self.msix.enabled != enabled:
            self.interrupts.refresh()
            with self.device.driver_lock:
                self.device.update_calls()


class VirtioInterrupts:
    """From queues and configuration changes to MSI-X or INTx; as a bus device, the ISR register."""

    def __init__(self, function: PciFunction, router: InterruptRouter, loop: Readers, vectors: int) -> None:
        self.msix = MsixTable(router, vectors, function.name)
        self.common: CommonConfig
        self._function = function
        self._loop = loop
        self._lock = Lock()
        self._isr = 0
        self._shared = create()
        loop.add_reader(self._shared, self._queue_event)

    def call_fd(self, vector: int) -> int | None:
        """Eventfd for a queue's interrupts; without MSI-X all queues share one."""
        if not self.msix.enabled:
            return self._shared
        return None if vector == spec.NO_VECTOR else self.msix.fd(vector)

    def config_changed(self) -> None:
        """Tell the driver of a configuration change or of DEVICE_NEEDS_RESET (4.1.5.4)."""
        self._raise(spec.ISR_CONFIG)
        vector = self.common.config_vector
        if self.msix.enabled and vector != spec.NO_VECTOR:
            self.msix.trigger(vector)

    def refresh(self) -> None:
        """MSI-X was switched on or off: INTx follows ISR only while it is off."""
        self._raise(0)

    def reset(self) -> None:
        """Nothing that happened before a reset interrupts after it."""
        self.common.reset()
        drain(self._shared)
        self.msix.drain(range(len(self.msix)))
        self.read(0, 1)

    def close(self) -> None:
        """Stop watching and close every eventfd."""
        self._loop.remove_reader(self._shared)
        os.close(self._shared)
        self.msix.close()

    def read(self, offset: int, width: int) -> int:
        """ISR status: reading clears it and lowers the line (4.1.4.5)."""
        if offset:
            return 0
        with self._lock:
            isr, self._isr = self._isr, 0
            self._function.set_interrupt(False)
        return isr

    def write(self, offset: int, width: int, value: int) -> None:
        """Read-only: nothing happens."""

    def _queue_event(self) -> None:
        """A queue interrupt of a guest without MSI-X, in the event loop's thread."""
        if drain(self._shared):
            self._raise(spec.ISR_QUEUE)

    def _raise(self, bits: int) -> None:
        with self._lock:
            self._isr |= bits
            self._function.set_interrupt(bool(self._isr) and not self.msix.enabled)


class DeviceConfig:
    """The device-specific configuration structure as a bus device; any width, as fields have any."""

    def __init__(self, device: VirtioDevice) -> None:
        self._device = device

    def read(self, offset: int, width: int) -> int:
        """Read configuration bytes."""
        return int.from_bytes(self._device.read_config(offset, width), "little")

    def write(self, offset: int, width: int, value: int) -> None:
        """Write configuration bytes."""
        self._device.write_config(offset, value.to_bytes(width, "little"))


class Notify:
    """Doorbells that no ioeventfd took: the queue follows from the offset, the value is ignored."""

    def __init__(self, device: VirtioDevice) -> None:
        self._device = device

    def read(self, offset: int, width: int) -> int:
        """Doorbells read zero."""
        return 0

    def write(self, offset: int, width: int, value: int) -> None:
        """Ring."""
        self._device.ring(offset // NOTIFY_MULTIPLIER)


def _identity(device_id: int) -> Identity:
    number = spec.PCI_DEVICE_BASE + device_id
    return Identity(
        vendor=spec.PCI_VENDOR_ID,
        device=number,
        class_code=kinds.of(device_id).pci_class << 8,
        revision=spec.PCI_REVISION,
        subsystem_vendor=spec.PCI_VENDOR_ID,
        subsystem=number,
        interrupt_pin=1,
    )


def _check(backend: Backend) -> None:
    if not 1 <= backend.device_id <= spec.MAX_DEVICE_ID:
        raise ConfigError(
            f"{backend.name}: virtio id {backend.device_id}; 1 to {spec.MAX_DEVICE_ID} fit on PCI"
        )
    if len(backend.queue_sizes) > MAX_QUEUES:
        raise ConfigError(
            f"{backend.name}: {len(backend.queue_sizes)} queues; at most {MAX_QUEUES} are possible"
        )
    for size in backend.queue_sizes:
        if not 0 < size <= spec.QUEUE_SIZE_MAX or size & (size - 1):
            raise ConfigError(
                f"{backend.name}: queue size {size}; it must be a power of two up to {spec.QUEUE_SIZE_MAX}"
            )
    if len(backend.shared_memory) > MAX_REGIONS:
        count = len(backend.shared_memory)
        raise ConfigError(
            f"{backend.name}: {count} shared memory regions; at most {MAX_REGIONS} are possible"
        )
    if backend.config_size > kinds.CONFIG_MAX:
        raise ConfigError(
            f"{backend.name}: {backend.config_size} bytes of configuration; at most {kinds.CONFIG_MAX}"
        )
