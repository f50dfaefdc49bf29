"""A virtual machine: everything is created here, passed on, and closed here.

It owns what the user gave and what a restart of the guest leaves alone: memory, streams,
backends and the frontends that talk to them.  The rest is a `Machine`, a new one for each
restart.  Backends start first and come up while the kernel is read, which keeps start-up short.
`Vm.run` runs it until the guest ends it, fails, or `stop` is called.  What a device does is
its backend's business, what an access means is the bus devices'; this module only connects.
"""

from __future__ import annotations

from time import monotonic

from . import devices, ending, layout, log
from .errors import ConfigError
from .lean import ExitStack, Task
from .machine import CRASH, OFF, RESET, STOPPED, Machine, Outcome

__all__ = ("CRASH", "OFF", "RESET", "STOPPED", "Outcome", "Vm")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Self

    from ._native.memory import GuestRegion
    from .board import Board
    from .config import MemoryConfig, VmConfig
    from .loop import EventLoop
    from .serial import SerialPort
    from .vhost_user.frontend import Frontend
    from .vhost_user.trace import Trace

PATIENCE = 1.0  # seconds that a virtual CPU, or a backend, gets to finish what it does
LAST_PATIENCE = 15.0  # longer than any deadline
FEW_QUEUES = 200  # for which the usual limit of 1024 open files is enough
BRIEF = 0.5  # seconds; a guest that restarts sooner has done nothing
STORM = 10  # such restarts in a row, from which on each is held back until that time has passed


class Vm:
    """A machine as `config` describes it, ready to run in the thread of `loop`.

    Creating one starts its backends; `close` (or leaving the `with` block) ends all that it
    started.  Raises ConfigError for what the user can mend and KvmError for what KVM refuses.
    """

    def __init__(self, config: VmConfig, loop: EventLoop) -> None:
        self.config = config
        self.loop = loop
        self.outcome: Outcome | None = None
        self.restarts = 0
        self._brief = 0  # restarts in a row that came too soon
        self._born = 0.0
        self._resetting: Task | None = None
        self._owned = ExitStack()
        self._machine: Machine | None = None
        self._serial: SerialPort | None = None
        self._frontends: list[Frontend] = []
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
            if self._serial is not None:
                self._serial.start()
            self._start()
            self.loop.run()
        finally:
            self.loop.stop()
            self._stop()
        if self._serial is not None:
            self._serial.uart.flush()
        outcome = self.outcome or Outcome(STOPPED)
        return Outcome(CRASH, self._current.report()) if outcome.kind == CRASH else outcome

    def stop(self) -> None:
        """End the run as if the machine's plug were pulled; from any thread or signal handler."""
        self._end(Outcome(STOPPED))

    def resize(self) -> None:
        """The terminal has another size now; may be called in signal handlers."""
        for device in self._prepared:
            if device.resize is not None:
                device.resize()

    def close(self) -> None:
        """Release everything in reverse order of creation; harmless when repeated."""
        try:
            if self._machine is not None:
                self._machine.close()
        finally:
            self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def board(self) -> Board:
        """What is on the machine's buses, until the guest restarts."""
        return self._current.board

    @property
    def _current(self) -> Machine:
        assert self._machine is not None
        return self._machine

    # -- construction ----------------------------------------------------------------------
    def _build(self) -> None:
        config = self.config
        devices.check_files(config)
        devices.check_together(config.devices)
        self._prepared = [self._own(devices.prepare(device)) for device in config.devices]
        devices.check_vectors(self._prepared)
        _allow_descriptors(sum(len(device.queue_sizes) for device in self._prepared))
        self.ranges = layout.ram_ranges(config.memory.size)
        self.ram: GuestRegion = self._own(_allocate(config.memory))
        self._kvm = self._own(_open_kvm())
        machine = self._machine = Machine(self._kvm, self.ram, self.ranges, config, used=False)
        self._open_serial()
        self._connect_devices(machine)
        if config.control:
            self._listen(config.control)
        machine.complete(self.loop, self._serial, self._frontends, self._machine_ended)

    def _own(self, thing: Any) -> Any:
        self._owned.callback(thing.close)
        return thing

    def _open_serial(self) -> None:
        from .serial import SerialPort

        if self.config.serial.mode != "off":
            self._serial = self._own(SerialPort("--serial", self.config.serial, self.loop))

    def _connect_devices(self, machine: Machine) -> None:
        """The frontend of each device; a bad kernel is told before a backend is waited for."""
        from .vhost_user.memory import GuestRam

        ram, trace = GuestRam(self.ram.fd, tuple(self.ranges)), self._open_trace()
        for device in self._prepared:
            device.before_waiting = machine.await_kernel
            frontend: Frontend = self._own(device.connect(ram, self.loop, self.config, trace))
            self._frontends.append(frontend)
            frontend.start_watching()

    def _open_trace(self) -> Trace | None:
        if self.config.trace is None:
            return None
        from .tracing import OpenTrace

        self._current.await_kernel()  # a bad one must not cost an old trace
        trace: Trace = self._own(OpenTrace(self.config.trace))
        return trace

    def _listen(self, path: str) -> None:
        from .control import ControlSocket, describe

        def tell() -> dict[str, Any]:
            return describe(self.board.devices, self.ranges)

        self._own(ControlSocket(path, tell, self.ram.fd, self.loop))

    # -- restarts, in the loop's thread ------------------------------------------------------
    def _start(self) -> None:
        self._born = monotonic()
        self._current.start()

    def _machine_ended(self, outcome: Outcome) -> None:
        if outcome.kind != RESET or not self.config.reboot:
            self._end(outcome)
        elif not self.loop.stopped:
            self.restarts += 1
            log.info(f"the guest restarts ({self.restarts})")
            # Beside the loop: a backend may want an answer from us before it gives one.
            self._resetting = Task(self._reset)

    def _reset(self) -> None:
        """Until the old machine stands still and backends let go of the memory; in a thread of its own."""
        try:
            self._current.reset()
            if self._serial is not None:
                self._serial.uart.flush()
        finally:
            self.loop.call_soon_threadsafe(self._after_reset)

    def _after_reset(self) -> None:
        assert self._resetting is not None
        self._resetting.result()
        pause = self._pause(monotonic() - self._born)
        self.loop.call_later(pause, self._restart) if pause else self._restart()

    def _pause(self, lived: float) -> float:
        """Seconds to wait: a guest that does nothing but restart must not keep the host busy."""
        self._brief = self._brief + 1 if lived < BRIEF else 0
        if self._brief < STORM:
            return 0.0
        log.once(
            ("restarts",), f"the guest has restarted {STORM} times at once; give --no-reboot to end it there"
        )
        return BRIEF - lived

    def _restart(self) -> None:
        if self.loop.stopped:
            return
        self._current.close()
        machine = self._machine = Machine(self._kvm, self.ram, self.ranges, self.config, used=True)
        try:
            machine.complete(self.loop, self._serial, self._frontends, self._machine_ended)
        except ConfigError as error:
            raise ConfigError(f"the guest restarts, but {error}") from None
        self._start()

    # -- the end ---------------------------------------------------------------------------
    def _end(self, outcome: Outcome) -> None:
        """Keep the first reason."""
        self.outcome = self.outcome or outcome
        self.loop.stop()

    def _stop(self) -> None:
        if self._stand_still(PATIENCE):
            return
        for frontend in self._frontends:  # a CPU, or a restart, may be waiting for one of their answers
            frontend.interrupt()
        if not self._stand_still(LAST_PATIENCE):
            log.warn("a virtual CPU did not stop in time; its thread is left behind")

    def _stand_still(self, timeout: float) -> bool:
        due = monotonic() + timeout
        if not self._current.stop(timeout):
            return False
        return self._resetting is None or self._resetting.join(max(0.0, due - monotonic()))


def _allow_descriptors(queues: int) -> None:
    """As many open files as this process may have, if there are many queues: each needs two."""
    if queues <= FEW_QUEUES:
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _open_kvm() -> Any:
    from ._native.kvm import Kvm

    return Kvm()


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
