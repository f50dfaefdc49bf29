"""The machine between two resets: KVM's part of it, what is on its buses, its virtual CPUs.

It owns all that a reset throws away.  A restart is a new one of these around the same memory,
streams and frontends, so no list of registers has to be put back one by one, in KVM (interrupt
controllers, clocks, MSRs, routes) or here.  It must not know who keeps those, nor what
the end of a machine means.

It is made in two steps, for a short start: from its creation on the host reads the kernel in a
thread of its own, beside which everything else is loaded and built by `complete`.
"""

from __future__ import annotations

from . import ending, layout
from .boot import cpu, load
from .lean import ExitStack, Task
from .record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from ._native import kvm as native
    from ._native.memory import GuestRegion
    from ._native.vcpu import Vcpu
    from .board import Board
    from .config import VmConfig
    from .layout import RamRange
    from .loop import EventLoop
    from .serial import SerialPort
    from .vcpus import VcpuThreads
    from .vhost_user.frontend import Frontend

    Ended = tuple[int, dict[str, Any]]  # what Vcpu.run returns

OFF, RESET, CRASH, STOPPED = "off", "reset", "crash", "stopped"


class Outcome(Record):
    """How a run ended: the guest powered off, asked for a restart, crashed, or was stopped."""

    kind: str
    report: str = ""


class Machine:
    """One life of a guest, from a reset to the next.

    The memory `ram` appears at `ranges`; `used` memory is emptied first, and nobody may touch it
    then.  Raises KvmError for what KVM refuses.
    """

    def __init__(
        self, kvm: native.Kvm, ram: GuestRegion, ranges: Sequence[RamRange], config: VmConfig, used: bool
    ) -> None:
        self._kvm, self._ram, self._ranges, self._config = kvm, ram, ranges, config
        self._owned = ExitStack()
        self._vcpus: list[Vcpu] = []
        self._threads: VcpuThreads | None = None
        self._over = False
        self._crash: tuple[int, Ended] | None = None
        try:
            self._vm = self._create_vm()
            self._filled: Task = self._own(Task(self._fill_used if used else self._fill))
        except BaseException:
            self.close()
            raise

    # -- construction ----------------------------------------------------------------------
    def complete(
        self,
        loop: EventLoop,
        serial: SerialPort | None,
        frontends: Sequence[Frontend],
        on_end: Callable[[Outcome], None],
    ) -> None:
        """Build the rest around `serial` and `frontends`; raises ConfigError for a bad kernel.

        `on_end` is called once, in the loop's thread, when the guest ends by itself.
        """
        self._loop, self._on_end = loop, on_end
        self.board = self._build_board(serial, frontends)
        self._boot = self.await_kernel()
        tables = self.board.tables()
        with memoryview(self._ram) as view:
            view[layout.ACPI_TABLES : layout.ACPI_TABLES + len(tables)] = tables
        self._create_vcpus()
        self._prepare_threads()

    def await_kernel(self) -> cpu.BootState:
        """Wait until memory is filled; raises ConfigError for whatever is wrong with the files."""
        with ending.waiting():
            state: cpu.BootState = self._filled.result()
        return state

    def _own(self, thing: Any) -> Any:
        self._owned.callback(thing.close)
        return thing

    def _create_vm(self) -> native.Vm:
        vm: native.Vm = self._own(self._kvm.create_vm())
        vm.set_identity_map_addr(layout.KVM_IDENTITY_MAP)
        vm.set_tss_addr(layout.KVM_TSS)
        vm.create_irqchip()
        return vm

    def _fill_used(self) -> cpu.BootState:
        self._ram.clear()
        return self._fill()

    def _fill(self) -> cpu.BootState:
        """Give the machine its RAM with the kernel in it: mostly the host's work, beside ours."""
        for slot, piece in enumerate(self._ranges):
            self._vm.set_memory_region(slot, piece.address, piece.size, self._ram.address + piece.offset)
        with memoryview(self._ram) as view:
            return load.load(self._config.payload, view, self._ranges, layout.ACPI_TABLES, self._ram.fd)

    def _build_board(self, serial: SerialPort | None, frontends: Sequence[Frontend]) -> Board:
        from .board import Board

        off, restart = Outcome(OFF), Outcome(RESET)
        board: Board = self._own(
            Board(
                self._vm, self._ranges, self._config, self._loop,
                lambda: self._post(off), lambda: self._post(restart),
            )
        )  # fmt: skip
        if serial is not None:
            board.add_serial(serial)
        for frontend in frontends:
            board.add_device(frontend)
        return board

    def _create_vcpus(self) -> None:
        from ._native.kvm import KVM_CAP_TSC_DEADLINE_TIMER, hypervisor
        from .boot import cpuid

        count = self._config.cpus.boot
        leaves = self._kvm.supported_cpuid()
        vcpus = self._vcpus = [self._own(self._vm.create_vcpu(index)) for index in range(count)]
        topology = cpuid.Topology(cores=count)
        deadline_timer = bool(self._vm.check_extension(KVM_CAP_TSC_DEADLINE_TIMER))
        components = cpuid.xcr0(leaves)
        below = hypervisor()
        for vcpu in vcpus:
            vcpu.set_cpuid(cpuid.edit(leaves, topology, vcpu.id, vcpu.tsc_khz(), deadline_timer, below))
            vcpu.set_msrs(cpu.boot_msrs())
            vcpu.set_fpu_default()
            if components:  # QEMU's SVM (7.2) lets a guest of the lab set XCR0 without KVM's noticing
                vcpu.set_xcr0(components)
        vcpus[0].set_sregs(cpu.boot_sregs(self._boot, vcpus[0].get_sregs()))
        vcpus[0].set_regs(cpu.boot_regs(self._boot))

    def _prepare_threads(self) -> None:
        from .vcpus import Exits, VcpuThreads

        exits = Exits(self.board.mmio, self.board.pio, self.board.mend_memory)
        self._threads = VcpuThreads(self._vcpus, exits, self._vcpu_ended)

    # -- life ------------------------------------------------------------------------------
    def start(self) -> None:
        """Let the virtual CPUs run."""
        assert self._threads is not None
        self._threads.start()

    def stop(self, timeout: float) -> bool:
        """Stop every virtual CPU for good; False if one has not within `timeout` seconds (-1: for ever)."""
        return self._threads is None or self._threads.stop(timeout)

    def reset(self) -> None:
        """Stop the virtual CPUs, then the devices: afterwards no backend of ours touches the memory.

        Nor does one of somebody else's that stopped, or ended, when it was told to.  Takes as long as CPUs
        wait for a device, and as backends take to stop; in a thread of its own.
        """
        self.stop(-1)
        self.board.pci.reset()

    def close(self) -> None:
        """Give everything back to KVM; no virtual CPU runs.  Harmless when repeated."""
        self._owned.close()

    # -- the end ---------------------------------------------------------------------------
    def _post(self, outcome: Outcome) -> None:
        self._loop.call_soon_threadsafe(lambda: self._end(outcome))

    def _end(self, outcome: Outcome) -> None:
        """The first reason counts: until they are stopped, CPUs go on and may give others."""
        if not self._over:
            self._over = True
            self._on_end(outcome)

    def _vcpu_ended(self, index: int, ended: Ended | BaseException) -> None:
        """A virtual CPU left its loop without being asked; called in its thread."""
        self._loop.call_soon_threadsafe(lambda: self._crashed(index, ended))

    def _crashed(self, index: int, ended: Ended | BaseException) -> None:
        if isinstance(ended, BaseException):
            raise ended  # a fault of ours, or KVM_RUN itself failed: through the loop to whoever runs it
        if not self._over:
            self._crash = (index, ended)
            self._end(Outcome(CRASH))

    def report(self) -> str:
        """What is known of the crash; all virtual CPUs stand still."""
        from .boot import report, symbols
        from .boot.ram import GuestRam as Reader
        from .host import accel

        assert self._crash is not None
        index, ended = self._crash
        vcpu = self._vcpus[index]
        with memoryview(self._ram) as view:
            return report.crash_report(
                index,
                ended,
                vcpu.get_regs(),
                vcpu.get_sregs(),
                Reader(view, self._ranges).read,
                symbols.find(self._config.payload.kernel, self._boot),
                bool(accel.why_not()),
            )
