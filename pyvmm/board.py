"""What stands on a machine's buses: serial port, power registers, PCI devices; and the tables of it.

It owns the two buses and the PCI host, and wires devices to interrupts, doorbells and their
frontends, which outlive it.  `machine` loads and uses it while the host still reads the kernel.  It
must not know virtual CPUs, boot protocols, or where a device's backend comes from.
"""

from __future__ import annotations

from . import layout
from .acpi.tables import build_tables
from .bus import Bus
from .config import PCI_SLOTS
from .irq import InterruptRouter
from .lean import ExitStack, Lock
from .legacy.power import PORT_I8042, I8042Reset, ResetRegister, SleepRegisters
from .pci.host import PciHost
from .virtio.pci import VirtioPciFunction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from ._native import kvm as native
    from .config import VmConfig
    from .layout import RamRange
    from .loop import EventLoop
    from .serial import SerialPort
    from .slots import MemorySlots
    from .vhost_user.frontend import Frontend
    from .virtio.device import VirtioDevice


def places(devices: Sequence[Any]) -> list[int | None]:
    """The PCI slot of each device: the one it asks for, else the lowest that none does; None is too many."""
    wanted = {device.pci_device_id for device in devices}
    free = (slot for slot in PCI_SLOTS if slot not in wanted)
    return [device.pci_device_id or next(free, None) for device in devices]


class Board:
    """The buses of the machine `vm`, whose RAM is at `ranges`.  Devices are added in `config`'s order.

    `power_off` and `restart` are called when the guest asks for that, on virtual CPU threads.
    """

    def __init__(
        self,
        vm: native.Vm,
        ranges: Sequence[RamRange],
        config: VmConfig,
        loop: EventLoop,
        power_off: Callable[[], None],
        restart: Callable[[], None],
    ) -> None:
        self._vm, self._ranges, self._loop, self._config = vm, ranges, loop, config
        self._owned = ExitStack()
        self._has_serial = False
        self._places = iter(places(config.devices))
        self.devices: list[VirtioDevice] = []
        self._slots: MemorySlots | None = None
        self._mapping: list[Frontend] = []
        self._mend_lock = Lock()
        self._mended = 0
        self.mmio, self.pio = Bus("memory"), Bus("ports")
        self.router = InterruptRouter(vm)
        self.pci = PciHost(self.mmio, self.router, layout.mmio64_base(config.memory.size))
        self._owned.callback(self.pci.close)
        self.pio.insert(layout.PORT_PCI_ADDRESS, 8, self.pci.ports, "PCI configuration ports")
        self._add_power(power_off, restart)

    def add_serial(self, port: SerialPort) -> None:
        """Make `port`, as after a reset, COM1."""
        port.attach(self.router.line(layout.IRQ_COM1).set)
        self._has_serial = True
        self.pio.insert(layout.PORT_COM1, port.SIZE, port.uart, "serial port")

    def add_device(self, frontend: Frontend) -> None:
        """Put a device on the PCI bus; its frontend stays the owner's.  Raises ConfigError."""
        function = VirtioPciFunction(
            frontend, ram=self._ranges, router=self.router, doorbells=self._vm, loop=self._loop
        )
        with ExitStack() as undo:
            undo.callback(function.close)
            self.pci.add(function, next(self._places, None))
            undo.pop_all()
        self.devices.append(function.device)
        if frontend.shared_memory:
            self._open_memory(function, frontend)

    def _open_memory(self, function: VirtioPciFunction, frontend: Frontend) -> None:
        from ._native.kvm import KVM_CAP_NR_MEMSLOTS
        from ._native.memory import AddressSpace
        from .slots import MemorySlots

        if self._slots is None:
            self._slots = MemorySlots(self._vm, self._vm.check_extension(KVM_CAP_NR_MEMSLOTS))
        function.open_memory(AddressSpace, self._slots)
        self._mapping.append(frontend)

    def mend_memory(self, seen: int) -> int:
        """A CPU went where no memory is: take away what backends mapped and lost.  From CPUs' threads.

        Returns how many mappings that made since the machine began: it can go on if there are more than
        it has `seen`.  If there are some already, those of another CPU may be all that is to be done.
        """
        with self._mend_lock:
            if self._mended != seen:
                return self._mended
            gone = sum([frontend.mappings.drop_broken() for frontend in self._mapping])
            if not gone:  # memory may also be full: there is no telling whose
                gone = sum([frontend.mappings.drop_broken(every=True) for frontend in self._mapping])
            self._mended += gone
            return self._mended

    def tables(self) -> bytes:
        """The ACPI tables that describe all of it, for layout.ACPI_TABLES."""
        windows = [(window.base, window.size) for window in (self.pci.window32, self.pci.window64)]
        return build_tables(self._config.cpus.boot, self._has_serial, *windows)

    def close(self) -> None:
        """Take every device off; no virtual CPU runs any more.  Harmless when repeated."""
        self._owned.close()

    def _add_power(self, power_off: Callable[[], None], restart: Callable[[], None]) -> None:
        sleep, reset, i8042 = SleepRegisters(power_off), ResetRegister(restart), I8042Reset(restart)
        self.pio.insert(layout.PORT_SLEEP, sleep.SIZE, sleep, "ACPI sleep registers")
        self.pio.insert(layout.PORT_RESET, reset.SIZE, reset, "ACPI reset register")
        self.pio.insert(PORT_I8042, i8042.SIZE, i8042, "i8042")
