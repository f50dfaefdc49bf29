"""A virtual machine: everything is created here, passed on, and closed here.

It makes memory, KVM's machine, the kernel in it and virtual CPUs, in the order that keeps
start-up short: backends start first and come up while the kernel is read, in a thread of its
own, beside which everything else is loaded and built (`board`).
`Vm.run` runs it until the guest ends it, fails, or `stop` is called.  What a device does is
its backend's business, what an access means is the bus devices'; this module only connects.
"""

from __future__ import annotations

from . import devices, ending, layout, log
from .boot import cpu, load
from .errors import ConfigError
from .lean import ExitStack, Task
from .record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Self

    from ._native import kvm as native
    from ._native.memory import GuestRegion
    from ._native.vcpu import Vcpu
    from .board import Board
    from .config import MemoryConfig, VmConfig
    from .loop import EventLoop
    from .vcpus import VcpuThreads

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
            serial = self.board.serial
            if serial is not None:
                serial.start()
            self.threads.start()
            self.loop.run()
        finally:
            self._stop_cpus()
        if serial is not None:
            serial.uart.flush()
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
        filled = self._own(Task(self._fill_memory))
        for device in self._prepared:
            device.before_waiting = lambda: _wait_for(filled)  # a bad kernel is told at once
        self.board = self._build_board()
        self.boot: cpu.BootState = _wait_for(filled)
        self._vcpus = self._create_vcpus()
        self.threads = self._prepare_threads()

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
        return vm

    def _fill_memory(self) -> cpu.BootState:
        """Give the machine its RAM with the kernel in it: mostly the host's work, beside ours."""
        for slot, piece in enumerate(self.ranges):
            self.vm.set_memory_region(slot, piece.address, piece.size, self.ram.address + piece.offset)
        with memoryview(self.ram) as view:
            return load.load(self.config.payload, view, self.ranges, layout.ACPI_TABLES, self.ram.fd)

    def _build_board(self) -> Board:
        from .board import Board  # takes as long to load as the kernel, which is being read by now

        off, restart = Outcome(OFF), Outcome(RESET)
        board: Board = self._own(
            Board(
                self.vm, self.ram.fd, self.ranges, self.config, self.loop,
                lambda: self._end(off), lambda: self._end(restart),
            )
        )  # fmt: skip
        board.add_serial()
        for device in self._prepared:
            board.add_device(device)
        tables = board.tables()
        with memoryview(self.ram) as view:
            view[layout.ACPI_TABLES : layout.ACPI_TABLES + len(tables)] = tables
        return board

    def _create_vcpus(self) -> list[Vcpu]:
        from .boot import cpuid

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

    def _prepare_threads(self) -> VcpuThreads:
        from .vcpus import Exits, VcpuThreads

        return VcpuThreads(self._vcpus, Exits(self.board.mmio, self.board.pio), self._vcpu_ended)

    # -- the end ---------------------------------------------------------------------------
    def _end(self, outcome: Outcome) -> None:
        """Keep the first reason; called on virtual CPU threads too."""
        if self.outcome is None:
            self.outcome = outcome
        self.loop.stop()

    def _stop_cpus(self) -> None:
        if self.threads.stop(PATIENCE):
            return
        for frontend in self.board.frontends:  # a CPU may be waiting for one of their answers
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


def _wait_for(task: Task) -> Any:
    with ending.waiting():
        return task.result()


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
