"""A virtio-PCI driver that lives in the test: it does what Linux does, through the same registers.

Every access goes through the buses that the virtual machine would use, in the order of
Linux's drivers/virtio/virtio_pci_modern.c: capability walk, reset, negotiation, vectors, queues.
"""

from __future__ import annotations

from pyvmm import layout
from pyvmm.bus import Bus
from pyvmm.pci import config as cfg
from pyvmm.virtio import spec

MSIX = 0x11


class ConfigAccess:
    """Configuration space of one function, through ECAM or through ports 0xCF8 and 0xCFC."""

    def __init__(self, mmio: Bus, slot: int, number: int = 0, ports: Bus | None = None) -> None:
        self._mmio, self._ports = mmio, ports
        self._base = slot << 15 | number << 12

    def read(self, offset: int, width: int) -> int:
        if self._ports is None:
            return self._mmio.read(layout.ECAM_BASE + self._base + offset, width)
        self._select(offset)
        return self._ports.read(layout.PORT_PCI_DATA + (offset & 3), width)

    def write(self, offset: int, width: int, value: int) -> None:
        if self._ports is None:
            self._mmio.write(layout.ECAM_BASE + self._base + offset, width, value)
        else:
            self._select(offset)
            self._ports.write(layout.PORT_PCI_DATA + (offset & 3), width, value)

    def _select(self, offset: int) -> None:
        assert self._ports is not None
        address = 0x8000_0000 | self._base >> 4 | offset & 0xFC
        self._ports.write(layout.PORT_PCI_ADDRESS, 4, address)

    def capabilities(self) -> list[tuple[int, int]]:
        """Identifier and offset of each capability, in order."""
        found = []
        offset = self.read(cfg.CAPABILITIES, 1)
        while offset:
            found.append((self.read(offset, 1), offset))
            offset = self.read(offset + 1, 1)
        return found

    def bar(self, index: int) -> int:
        """Address in BAR `index`."""
        low = self.read(cfg.BAR0 + 4 * index, 4)
        high = self.read(cfg.BAR0 + 4 * index + 4, 4) if low & cfg.BAR_64BIT else 0
        return high << 32 | low & ~0xF

    def bar_size(self, index: int) -> int:
        """Size of BAR `index`, found as Linux does: all ones written, mask read back."""
        offset = cfg.BAR0 + 4 * index
        low = self.read(offset, 4)
        wide = low & cfg.BAR_64BIT
        high = self.read(offset + 4, 4) if wide else 0
        self.write(offset, 4, 0xFFFF_FFFF)
        mask = self.read(offset, 4) & ~0xF
        if wide:
            self.write(offset + 4, 4, 0xFFFF_FFFF)
            mask |= self.read(offset + 4, 4) << 32
            self.write(offset + 4, 4, high)
        self.write(offset, 4, low)
        bits = 64 if wide else 32
        return (~mask & (1 << bits) - 1) + 1 if mask else 0


class VirtioDriver:
    """Drives the function behind `access`."""

    def __init__(self, mmio: Bus, access: ConfigAccess) -> None:
        self.mmio = mmio
        self.config = access
        self.structures: dict[int, tuple[int, int, int]] = {}  # type -> bar, offset, length
        self.shared_memory: dict[int, tuple[int, int]] = {}
        self.multiplier = self.pci_cfg = self.msix = 0

    # -- finding the device ------------------------------------------------------------
    def probe(self) -> None:
        """Walk the capabilities and switch memory decoding on."""
        assert self.config.read(cfg.VENDOR_ID, 2) == spec.PCI_VENDOR_ID
        for identifier, offset in self.config.capabilities():
            if identifier == spec.PCI_CAP_VENDOR:
                self._structure(offset)
            elif identifier == MSIX:
                self.msix = offset
        command = self.config.read(cfg.COMMAND, 2)
        self.config.write(cfg.COMMAND, 2, command | cfg.COMMAND_MEMORY | cfg.COMMAND_MASTER)

    def _structure(self, at: int) -> None:
        kind, bar = self.config.read(at + 3, 1), self.config.read(at + 4, 1)
        offset, length = self.config.read(at + 8, 4), self.config.read(at + 12, 4)
        if kind == spec.CAP_SHARED_MEMORY:
            offset |= self.config.read(at + 16, 4) << 32
            length |= self.config.read(at + 20, 4) << 32
            self.shared_memory[self.config.read(at + 5, 1)] = (offset, length)
        elif kind == spec.CAP_PCI:
            self.pci_cfg = at
        else:
            self.structures.setdefault(kind, (bar, offset, length))
        if kind == spec.CAP_NOTIFY:
            self.multiplier = self.config.read(at + 16, 4)

    def address(self, kind: int, offset: int = 0) -> int:
        """Guest address inside a structure."""
        bar, start, _ = self.structures[kind]
        return self.config.bar(bar) + start + offset

    # -- registers ---------------------------------------------------------------------
    def get(self, offset: int, width: int) -> int:
        """Read the common configuration."""
        return self.mmio.read(self.address(spec.CAP_COMMON, offset), width)

    def set(self, offset: int, width: int, value: int) -> None:
        """Write the common configuration."""
        self.mmio.write(self.address(spec.CAP_COMMON, offset), width, value)

    @property
    def status(self) -> int:
        return self.get(20, 1)

    def add_status(self, bits: int) -> int:
        """Set status bits as Linux's virtio_add_status does; returns what the device kept."""
        self.set(20, 1, self.status | bits)
        return self.status

    def reset(self) -> None:
        self.set(20, 1, 0)
        assert self.status == 0

    def device_features(self) -> int:
        features = 0
        for word in range(2):
            self.set(0, 4, word)
            features |= self.get(4, 4) << 32 * word
        return features

    def accept(self, features: int) -> None:
        for word in range(2):
            self.set(8, 4, word)
            self.set(12, 4, features >> 32 * word & 0xFFFF_FFFF)

    def negotiate(self, features: int | None = None) -> bool:
        """Reset and negotiate; whether the device kept FEATURES_OK."""
        self.reset()
        self.add_status(spec.ACKNOWLEDGE)
        self.add_status(spec.DRIVER)
        every = self.device_features() & ~spec.F_RING_PACKED  # the rings of `queue` are split
        self.accept(every if features is None else features)
        return bool(self.add_status(spec.FEATURES_OK) & spec.FEATURES_OK)

    def device_config(self, offset: int, width: int) -> int:
        return self.mmio.read(self.address(spec.CAP_DEVICE, offset), width)

    def isr(self) -> int:
        return self.mmio.read(self.address(spec.CAP_ISR), 1)

    def notify(self, queue: int, width: int = 2) -> None:
        self.set(22, 2, queue)
        self.mmio.write(self.address(spec.CAP_NOTIFY, self.get(30, 2) * self.multiplier), width, queue)

    # -- queues ------------------------------------------------------------------------
    def queue(
        self, index: int, base: int = 0x10_0000, size: int | None = None, vector: int | None = None
    ) -> int:
        """Describe and enable queue `index` with rings from `base` on; returns the address after them."""
        self.set(22, 2, index)
        assert self.get(28, 2) == 0
        if size is not None:
            self.set(24, 2, size)
        size = self.get(24, 2)
        desc = base
        avail = desc + spec.desc_bytes(size)
        used = avail + spec.avail_bytes(size) + 3 & ~3
        if vector is not None:
            self.set(26, 2, vector)
            assert self.get(26, 2) == vector
        self.enable(index, desc, avail, used)
        return used + spec.used_bytes(size) + 15 & ~15

    def enable(self, index: int, desc: int, avail: int, used: int) -> None:
        """Enable queue `index`, whose parts are at these addresses."""
        self.set(22, 2, index)
        for offset, value in ((32, desc), (40, avail), (48, used)):
            self.set(offset, 4, value & 0xFFFF_FFFF)
            self.set(offset + 4, 4, value >> 32)
        self.set(28, 2, 1)

    # -- MSI-X -------------------------------------------------------------------------
    def table(self, vector: int, word: int) -> int:
        """Guest address of a word of the vector table."""
        where = self.config.read(self.msix + 4, 4)
        return self.config.bar(where & 7) + (where & ~7) + 16 * vector + 4 * word

    def set_control(self, control: int) -> None:
        self.config.write(self.msix + 2, 2, control)

    def vectors(self) -> int:
        return (self.config.read(self.msix + 2, 2) & 0x7FF) + 1

    def mask(self, vector: int, masked: bool = True) -> None:
        self.mmio.write(self.table(vector, 3), 4, int(masked))

    def pending(self, vector: int) -> bool:
        where = self.config.read(self.msix + 8, 4)
        address = self.config.bar(where & 7) + (where & ~7) + vector // 32 * 4
        return bool(self.mmio.read(address, 4) >> vector % 32 & 1)

    def enable_msix(self) -> None:
        """What pci_alloc_irq_vectors does: enable with the function masked, fill in, unmask."""
        self.set_control(0xC000)
        for vector in range(self.vectors()):
            self.mask(vector)
            for word, value in enumerate((0xFEE0_0000, 0, 0x40 + vector)):
                self.mmio.write(self.table(vector, word), 4, value)
        self.set_control(0x8000)
        for vector in range(self.vectors()):
            self.mask(vector, False)

    # -- everything --------------------------------------------------------------------
    def start(self, features: int | None = None) -> None:
        """From nothing to DRIVER_OK, vector 0 for configuration and one for each queue."""
        self.probe()
        assert self.negotiate(features)
        self.enable_msix()
        self.set(16, 2, 0)
        base = 0x10_0000
        for index in range(self.get(18, 2)):
            base = self.queue(index, base, vector=index + 1)
        self.add_status(spec.DRIVER_OK)
