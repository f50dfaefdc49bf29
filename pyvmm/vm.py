"""A virtual machine: everything is created here, passed on, and closed here.

`build` wires memory, KVM, buses, devices, tables, kernel and virtual CPUs together in the
order that keeps start-up short: backends start first and come up while the kernel is read.
`Vm.run` runs it until the guest ends it, fails, or `stop` is called.  What a device does is
its backend's business, what an access means is the bus devices'; this module only connects.
"""

from __future__ import annotations

from . import devices, ending, layout, log
from .acpi.tables import build_tables
from .boot import cpu, cpuid, load
from .bus import Bus
from .errors import ConfigError
from .irq import InterruptRouter
from .lean import ExitStack
from .legacy.power import PORT_I8042, I8042Reset, ResetRegister, SleepRegisters
from .pci.host import PciHost
from .record import Record
from .serial import SerialPort
from .vcpus import Exits, VcpuThreads
from .vhost_user.memory import GuestRam
from .virtio.pci import VirtioPciFunction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Self

    from ._native import kvm as native
    from ._native.memory import GuestRegion
    from ._native.vcpu import Vcpu
    from .config import MemoryConfig, VmConfig
    from .loop import EventLoop
    from .vhost_user.frontend import Frontend

    Ended = tuple[int, dict[str, Any]]  # what Vcpu.run returns

OFF, RESET, CRASH, STOPPED = "off", "reset", "crash", "stopped"
FEW_QUEUES = 200  # for which the usual limit of 1024 open files is enough
PATIENCE = 1.0  # seconds that a virtual CPU gets to finish what it does


class Outcome(Record):
    """How a run ended: the guest powered off, asked for a restart, crashed, or was stopped."""

    kind: str
    report: str = ""


class Vm:
    """A machine as `config` describes it, ready to run in the thread of `loop`.

    Creating one starts its backends; `close` (or leaving the `with` block) ends all that it
    started.  Raises ConfigError for what the user can mend and KvmError for what KVM refuses.
    """

    def __init__(self, config: VmConfig, loop: EventLoop) -> None:
        self.config = config
        self.loop = loop
        self.outcome: Outcome | None = None
        self._crash: tuple[int, Ended] | None = None
        self._owned = ExitStack()
        self._prepared: list[devices.Prepared] = []
        self._frontends: list[Frontend] = []
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    # -- life ------------------------------------------------------------------------------
    def run(self) -> Outcome:
        """Start the virtual CPUs and serve events until the machine ends."""
        try:
            for device in self._prepared:
                device.start()
            if self.serial is not None:
                self.serial.start()
            self.threads.start()
            self.loop.run()
        finally:
            self._stop_cpus()
        if self.serial is not None:
            self.serial.uart.flush()
        if self._crash is not None:
            return Outcome(CRASH, self._report(*self._crash))
        return self.outcome or Outcome(STOPPED)

    def stop(self) -> None:
        """End the run as if the machine's plug were pulled; from any thread or signal handler."""
        self._end(Outcome(STOPPED))

    def close(self) -> None:
        """Release everything in reverse order of creation; harmless when repeated."""
        self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- construction ----------------------------------------------------------------------
    def _build(self) -> None:
        config = self.config
        devices.check_together(config.devices)
        self._prepared = [self._own(devices.prepare(device)) for device in config.devices]
        _allow_descriptors(sum(len(device.queue_sizes) for device in self._prepared))
        self.ranges = layout.ram_ranges(config.memory.size)
        self.ram = self._own(_allocate(config.memory))
        self.vm = self._create_vm()
        self.mmio, self.pio = Bus("memory"), Bus("ports")
        self.router = InterruptRouter(self.vm)
        self.serial = self._add_serial()
        self._add_power()
        self.boot = self._load_payload()
        self.pci = self._add_pci()
        self._write_tables()
        self._vcpus = self._create_vcpus()
        self.threads = VcpuThreads(self._vcpus, Exits(self.mmio, self.pio), self._vcpu_ended)

    def _own(self, thing: Any) -> Any:
        self._owned.callback(thing.close)
        return thing

    def _create_vm(self) -> native.Vm:
        kvm_module = _native_kvm()
        self.kvm = self._own(kvm_module.Kvm())
        vm: native.Vm = self._own(self.kvm.create_vm())
        vm.set_identity_map_addr(layout.KVM_IDENTITY_MAP)
        vm.set_tss_addr(layout.KVM_TSS)
        vm.create_irqchip()
        for slot, piece in enumerate(self.ranges):
            vm.set_memory_region(slot, piece.address, piece.size, self.ram.address + piece.offset)
        return vm

    def _add_serial(self) -> SerialPort | None:
        if self.config.serial.mode == "off":
            return None
        line = self.router.line(layout.IRQ_COM1)
        port: SerialPort = self._own(SerialPort("--serial", self.config.serial, line.set, self.loop))
        self.pio.insert(layout.PORT_COM1, port.SIZE, port.uart, "serial port")
        return port

    def _add_power(self) -> None:
        sleep = SleepRegisters(lambda: self._end(Outcome(OFF)))
        reset = ResetRegister(lambda: self._end(Outcome(RESET)))
        i8042 = I8042Reset(lambda: self._end(Outcome(RESET)))
        self.pio.insert(layout.PORT_SLEEP, sleep.SIZE, sleep, "ACPI sleep registers")
        self.pio.insert(layout.PORT_RESET, reset.SIZE, reset, "ACPI reset register")
        self.pio.insert(PORT_I8042, i8042.SIZE, i8042, "i8042")

    def _load_payload(self) -> cpu.BootState:
        with memoryview(self.ram) as view:
            return load.load(self.config.payload, view, self.ranges, layout.ACPI_TABLES)

    def _add_pci(self) -> PciHost:
        host: PciHost = self._own(PciHost(self.mmio, self.router, layout.mmio64_base(self.ram.size)))
        self.pio.insert(layout.PORT_PCI_ADDRESS, 8, host.ports, "PCI configuration ports")
        ram = GuestRam(self.ram.fd, self.ranges)
        for device in self._prepared:
            frontend = device.connect(ram, self.loop, self.config)
            self._frontends.append(frontend)
            with ExitStack() as undo:
                undo.callback(frontend.close)
                function = VirtioPciFunction(
                    frontend, ram=self.ranges, router=self.router, doorbells=self.vm, loop=self.loop
                )
                undo.callback(function.close)
                host.add(function)
                undo.pop_all()
            frontend.start_watching()
        return host

    def _write_tables(self) -> None:
        windows = [(window.base, window.size) for window in (self.pci.window32, self.pci.window64)]
        tables = build_tables(self.config.cpus.boot, self.serial is not None, *windows)
        with memoryview(self.ram) as view:
            view[layout.ACPI_TABLES : layout.ACPI_TABLES + len(tables)] = tables

    def _create_vcpus(self) -> list[Vcpu]:
        count = self.config.cpus.boot
        leaves = self.kvm.supported_cpuid()
        vcpus: list[Vcpu] = [self._own(self.vm.create_vcpu(index)) for index in range(count)]
        topology = cpuid.Topology(cores=count)
        deadline_timer = bool(self.vm.check_extension(_native_kvm().KVM_CAP_TSC_DEADLINE_TIMER))
        for vcpu in vcpus:
            vcpu.set_cpuid(cpuid.edit(leaves, topology, vcpu.id, vcpu.tsc_khz(), deadline_timer))
            vcpu.set_msrs(cpu.boot_msrs())
            vcpu.set_fpu_default()
        vcpus[0].set_sregs(cpu.boot_sregs(self.boot, vcpus[0].get_sregs()))
        vcpus[0].set_regs(cpu.boot_regs(self.boot))
        return vcpus

    # -- the end ---------------------------------------------------------------------------
    def _end(self, outcome: Outcome) -> None:
        """Keep the first reason; called on virtual CPU threads too."""
        if self.outcome is None:
            self.outcome = outcome
        self.loop.stop()

    def _stop_cpus(self) -> None:
        if self.threads.stop(PATIENCE):
            return
        for frontend in self._frontends:  # a CPU may be waiting for one of their answers
            frontend.interrupt()
        if not self.threads.stop():
            log.warn("a virtual CPU did not stop in time; its thread is left behind")

    def _vcpu_ended(self, index: int, ended: Ended | BaseException) -> None:
        """A virtual CPU left its loop without being asked; called in its thread."""
        self.loop.call_soon_threadsafe(lambda: self._crashed(index, ended))

    def _crashed(self, index: int, ended: Ended | BaseException) -> None:
        if isinstance(ended, BaseException):
            raise ended  # a fault of ours, or KVM_RUN itself failed: through the loop to whoever called `run`
        if self.outcome is None:
            self._crash = (index, ended)
            self._end(Outcome(CRASH))

    def _report(self, index: int, ended: Ended) -> str:
        """What is known of a crash; all virtual CPUs stand still by now."""
        from .boot import report, symbols
        from .boot.ram import GuestRam as Reader
        from .host import accel

        vcpu = self._vcpus[index]
        with memoryview(self.ram) as view:
            return report.crash_report(
                index,
                ended,
                vcpu.get_regs(),
                vcpu.get_sregs(),
                Reader(view, self.ranges).read,
                symbols.find(self.config.payload.kernel, self.boot),
                bool(accel.why_not()),
            )


def _allow_descriptors(queues: int) -> None:
    """As many open files as this process may have, if there are many queues: each needs two."""
    if queues <= FEW_QUEUES:
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _native_kvm() -> Any:
    from ._native import kvm

    return kvm


def _allocate(memory: MemoryConfig) -> GuestRegion:
    from ._native.memory import GuestRegion

    if memory.prefault and not memory.hugepages:
        _check_available(memory.size)
    with ending.waiting():
        return GuestRegion(memory.size, hugepages=memory.hugepages, prefault=memory.prefault)


def _check_available(size: int) -> None:
    """Refuse to allocate at once what the host does not have: it would kill processes to find it."""
    with open("/proc/meminfo", "rb") as file:
        values = dict(line.split(b":") for line in file)
    available = int(values[b"MemAvailable"].split()[0]) << 10
    if size > available:
        raise ConfigError(
            f"--memory: prefault=on needs {size >> 20}M now, and this host has {available >> 20}M; "
            "give less, or leave prefault out"
        )
