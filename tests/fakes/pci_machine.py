"""Buses, a host bridge and virtio functions around fakes: a machine without a CPU."""

from __future__ import annotations

from pyvmm import layout
from pyvmm.bus import Bus
from pyvmm.irq import InterruptRouter
from pyvmm.layout import RamRange
from pyvmm.pci.host import PciHost
from pyvmm.virtio.pci import VirtioPciFunction

from .devices import FakeBackend, FakeLoop, FakeVm
from .driver import ConfigAccess, VirtioDriver

RAM = (RamRange(0, 1 << 30, 0),)
MMIO64 = 4 << 30


class PciMachine:
    """Buses, host bridge and functions around fakes."""

    def __init__(self) -> None:
        self.vm = FakeVm()
        self.loop = FakeLoop()
        self.mmio, self.ports = Bus("mmio"), Bus("io")
        self.router = InterruptRouter(self.vm)
        self.host = PciHost(self.mmio, self.router, MMIO64)
        self.ports.insert(layout.PORT_PCI_ADDRESS, 8, self.host.ports, "PCI")

    def close(self) -> None:
        """Close every function and look whether anything of theirs stayed behind."""
        self.host.close()
        assert not self.vm.irqfds and not self.vm.doorbells and not self.loop.readers

    def add(self, backend: FakeBackend) -> VirtioPciFunction:
        function = VirtioPciFunction(backend, ram=RAM, router=self.router, doorbells=self.vm, loop=self.loop)
        self.slot, _ = self.host.add(function)
        return function

    def driver(self, through_ports: bool = False) -> VirtioDriver:
        ports = self.ports if through_ports else None
        return VirtioDriver(self.mmio, ConfigAccess(self.mmio, self.slot, ports=ports))

    def config_base(self) -> int:
        """Guest address of the last added function's configuration space."""
        return layout.ECAM_BASE + (self.slot << 15)

    def bar(self) -> int:
        """Address in its BAR 0."""
        return self.driver().config.bar(0)

    def driver_status(self) -> int:
        """Its device status."""
        return self.mmio.read(self.bar() + 20, 1)
