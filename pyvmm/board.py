"""What stands on a machine's buses: serial port, power registers, PCI devices; and the tables of it.

It owns the two buses and the PCI host, and wires devices to interrupts, doorbells and their
frontends.  `vm` loads and uses it while the host still reads the kernel.  It must not know
virtual CPUs, boot protocols, or where a device's backend comes from.
"""

from __future__ import annotations

from . import layout
from .acpi.tables import build_tables
from .bus import Bus
from .irq import InterruptRouter
from .lean import ExitStack
from .legacy.power import PORT_I8042, I8042Reset, ResetRegister, SleepRegisters
from .pci.host import PciHost
from .serial import SerialPort
from .vhost_user.memory import GuestRam
from .virtio.pci import VirtioPciFunction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._native import kvm as native
    from .config import VmConfig
    from .devices import Prepared
    from .layout import RamRange
    from .loop import EventLoop
    from .vhost_user.frontend import Frontend


class Board:
    """The buses of the machine `vm`, whose RAM is `ranges` of the file `ram_fd`.

    `power_off` and `restart` are called when the guest asks for that, on virtual CPU threads.
    """

    def __init__(
        self,
        vm: native.Vm,
        ram_fd: int,
        ranges: Sequence[RamRange],
        config: VmConfig,
        loop: EventLoop,
        power_off: Callable[[], None],
        restart: Callable[[], None],
    ) -> None:
        self._vm, self._loop, self._config = vm, loop, config
        self._ram = GuestRam(ram_fd, tuple(ranges))
        self._owned = ExitStack()
        self.mmio, self.pio = Bus("memory"), Bus("ports")
        self.router = InterruptRouter(vm)
        self.frontends: list[Frontend] = []
        self.serial: SerialPort | None = None
        self.pci = PciHost(self.mmio, self.router, layout.mmio64_base(config.memory.size))
        self._owned.callback(self.pci.close)
        self.pio.insert(layout.PORT_PCI_ADDRESS, 8, self.pci.ports, "PCI configuration ports")
        self._add_power(power_off, restart)

    def add_serial(self) -> None:
        """COM1, unless it is off.  Raises ConfigError."""
        if self._config.serial.mode == "off":
            return
        line = self.router.line(layout.IRQ_COM1)
        self.serial = SerialPort("--serial", self._config.serial, line.set, self._loop)
        self._owned.callback(self.serial.close)
        self.pio.insert(layout.PORT_COM1, self.serial.SIZE, self.serial.uart, "serial port")

    def add_device(self, device: Prepared) -> None:
        """Connect to a device's backend and put it on the PCI bus.  Raises ConfigError."""
        frontend = device.connect(self._ram, self._loop, self._config)
        self.frontends.append(frontend)
        with ExitStack() as undo:
            undo.callback(frontend.close)
            function = VirtioPciFunction(
                frontend, ram=self._ram.ranges, router=self.router, doorbells=self._vm, loop=self._loop
            )
            undo.callback(function.close)
            self.pci.add(function)
            undo.pop_all()
        frontend.start_watching()

    def tables(self) -> bytes:
        """The ACPI tables that describe all of it, for layout.ACPI_TABLES."""
        windows = [(window.base, window.size) for window in (self.pci.window32, self.pci.window64)]
        return build_tables(self._config.cpus.boot, self.serial is not None, *windows)

    def close(self) -> None:
        """Close every device; no virtual CPU runs any more.  Harmless when repeated."""
        self._owned.close()

    def _add_power(self, power_off: Callable[[], None], restart: Callable[[], None]) -> None:
        sleep, reset, i8042 = SleepRegisters(power_off), ResetRegister(restart), I8042Reset(restart)
        self.pio.insert(layout.PORT_SLEEP, sleep.SIZE, sleep, "ACPI sleep registers")
        self.pio.insert(layout.PORT_RESET, reset.SIZE, reset, "ACPI reset register")
        self.pio.insert(PORT_I8042, i8042.SIZE, i8042, "i8042")
