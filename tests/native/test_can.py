"""A CAN controller, for which Linux 6.1 and 6.12 have no driver: driver and backend are the test's own.

Numbers are those of the specification's CAN device (virtio 1.4).  Frames go through guest memory, and
through the VMM's PCI function, its doorbells and interrupts, as with any other driver.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.census import leaves_nothing
from fakes.driver import ConfigAccess, VirtioDriver
from fakes.entropy import eventually, scenario
from fakes.program import SPIN, pvh_elf
from fakes.ring_driver import DriverQueue, MachineRam

from pyvmm import config as cfg
from pyvmm.backend import ConfigSpace, Device, DeviceThread, Queue
from pyvmm.loop import EventLoop
from pyvmm.pci import config as pci
from pyvmm.virtio import spec
from pyvmm.vm import Vm

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("need_kvm")]

CAN_ID, CANBUS = 36, 0x0C09  # the latter is PCI's base class and subclass
TXQ, RXQ, CONTROLQ = range(3)
F_CLASSIC, F_FD, F_RTR_FRAMES, F_LATE_TX_ACK = (1 << bit for bit in range(4))
S_BUSOFF = 1
TX, RX, START, STOP = 0x0001, 0x0101, 0x0201, 0x0202  # message types
OK, NOT_OK = 0, 1
FLAG_EXTENDED, FLAG_FD = 0x8000, 0x4000
HEADER = struct.Struct("<HHBxHII")  # message type, length, classic DLC, XL priority, flags, CAN id
LONGEST = HEADER.size + 64
SIZE = 64
ISR_QUEUE, ISR_CONFIG = 1, 2
BASE, RINGS = 0x40_0000, 0x10_0000


class Frame(NamedTuple):
    """What is on the bus."""

    ident: int
    data: bytes
    flags: int = 0

    def message(self, kind: int) -> bytes:
        return HEADER.pack(kind, len(self.data), 0, 0, self.flags, self.ident) + self.data

    @classmethod
    def of(cls, message: bytes, kind: int) -> Frame:
        found, length, _, _, flags, ident = HEADER.unpack_from(message)
        assert found == kind and len(message) == HEADER.size + length
        return cls(ident, message[HEADER.size :], flags)


FRAMES = {
    "classic": Frame(0x123, b"12345678"),
    "empty": Frame(0x7FF, b""),
    "extended": Frame(0x1ABC_DEF0, b"x", FLAG_EXTENDED),
    "FD": Frame(0x42, bytes(range(64)), FLAG_FD),
}


class Controller(Device):
    """What is sent by a driver that has started it goes to `bus`; `receive` is what comes from there."""

    device_id = CAN_ID
    features = F_CLASSIC | F_FD | F_RTR_FRAMES | F_LATE_TX_ACK
    queue_sizes = (SIZE,) * 3

    def __init__(self) -> None:
        super().__init__()
        self.config = ConfigSpace((("status", 2),))
        self.started = False
        self.bus: list[Frame] = []
        self._pending: deque[Frame] = deque()

    def on_queue(self, queue: Queue) -> None:
        serve = (self._transmit, None, self._control)[queue.index]
        if serve is None:
            self._deliver()
            return
        for chain in queue:
            chain.write(bytes((OK if serve(bytes(chain.read())) else NOT_OK,)))

    def on_config_write(self, offset: int, data: bytes) -> None:
        """All of it is read-only for the driver."""

    def _transmit(self, message: bytes) -> bool:
        if self.started:
            self.bus.append(Frame.of(message, TX))
        return self.started

    def _control(self, message: bytes) -> bool:
        (wanted,) = struct.unpack("<H", message)
        self.started = wanted == START
        return wanted in (START, STOP)

    def receive(self, frame: Frame) -> None:
        self._pending.append(frame)
        self._deliver()

    def _deliver(self) -> None:
        queue = self.queues[RXQ]
        while self._pending and (chain := queue.pop()) is not None:
            chain.write(self._pending.popleft().message(RX))
            chain.push()
        queue.notify()

    def go_off_the_bus(self) -> None:
        self.started = False
        self.config["status"] = S_BUSOFF
        self.config_changed()


class CanDriver:
    """The driver, on the buses and in the memory of `built`."""

    def __init__(self, built: Vm) -> None:
        self.pci = VirtioDriver(built.board.mmio, ConfigAccess(built.board.mmio, 1))
        self._ram = MachineRam(built.ram, RINGS)
        self._queues = [DriverQueue(self._ram, SIZE) for _ in range(3)]

    def start(self) -> None:
        """As virtio 3.1.1 has it; receive buffers are there before DRIVER_OK."""
        self.pci.probe()
        assert self.pci.negotiate(spec.F_VERSION_1 | F_CLASSIC | F_FD)
        for index, queue in enumerate(self._queues):
            self.pci.enable(index, queue.desc, queue.avail, queue.used)
        for _ in range(SIZE):
            self._queues[RXQ].add([], [LONGEST])
        self.pci.add_status(spec.DRIVER_OK)
        self.pci.notify(RXQ)

    def ask(self, index: int, message: bytes) -> int:
        """Send and await the result, with the interrupt that tells of it."""
        self._queues[index].add([message], [1])
        self.pci.notify(index)
        ((_, result),) = self._used(index)
        return result[0]

    def received(self) -> Frame:
        ((_, message),) = self._used(RXQ)
        self._queues[RXQ].add([], [LONGEST])
        return Frame.of(message, RX)

    def _used(self, index: int) -> list[tuple[int, bytes]]:
        eventually(lambda: self.pci.isr() & ISR_QUEUE)
        return self._queues[index].collect()

    @property
    def status(self) -> int:
        return self.pci.device_config(0, 2)

    def close(self) -> None:
        for queue in self._queues:
            queue.close()
        self._ram.close()


Steps = Callable[[CanDriver, Controller, DeviceThread], None]


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Callable[[Steps], None]]:
    """Runs steps on a machine with the controller; its queues are those that the kind has by itself."""

    def run(steps: Steps) -> None:
        kernel = tmp_path / "vmlinux"
        kernel.write_bytes(pvh_elf(SPIN, base=BASE))
        controller = Controller()
        with DeviceThread(controller) as thread, EventLoop() as loop:
            device = cfg.GenericDevice("can", fd=os.dup(thread.take_socket().fileno()))
            payload, memory = cfg.PayloadConfig(str(kernel)), cfg.MemoryConfig(64 << 20)
            with Vm(cfg.VmConfig(payload, memory=memory, devices=(device,)), loop) as built:
                driver = CanDriver(built)
                try:
                    scenario(built, loop, lambda: steps(driver, controller, thread))
                finally:
                    driver.close()

    with leaves_nothing():
        yield run


def test_what_the_driver_finds(drive: Callable[[Steps], None]) -> None:
    def steps(driver: CanDriver, controller: Controller, thread: DeviceThread) -> None:
        driver.start()
        config = driver.pci.config
        assert config.read(pci.DEVICE_ID, 2) == 0x1040 + CAN_ID
        assert config.read(pci.CLASS_CODE + 1, 2) == CANBUS
        assert driver.pci.get(18, 2) == 3
        offered = driver.pci.device_features()
        assert offered & 0xFF_FFFF == F_CLASSIC | F_FD | F_RTR_FRAMES | F_LATE_TX_ACK
        assert controller.driver_features & 0xFF_FFFF == F_CLASSIC | F_FD
        assert driver.status == 0

    drive(steps)


def test_frames_pass_both_ways(drive: Callable[[Steps], None]) -> None:
    def steps(driver: CanDriver, controller: Controller, thread: DeviceThread) -> None:
        driver.start()
        assert driver.ask(CONTROLQ, struct.pack("<H", START)) == OK
        for _ in range(SIZE):  # around the rings, more than once in all
            for frame in FRAMES.values():
                assert driver.ask(TXQ, frame.message(TX)) == OK
                thread.call(lambda frame=frame: controller.receive(frame))  # type: ignore[misc]
                assert driver.received() == frame
        assert controller.bus == list(FRAMES.values()) * SIZE

    drive(steps)


def test_a_stopped_controller_sends_nothing(drive: Callable[[Steps], None]) -> None:
    def steps(driver: CanDriver, controller: Controller, thread: DeviceThread) -> None:
        driver.start()
        message = FRAMES["classic"].message(TX)
        assert driver.ask(TXQ, message) == NOT_OK
        results = [driver.ask(*each) for each in (
            (CONTROLQ, struct.pack("<H", START)), (TXQ, message),
            (CONTROLQ, struct.pack("<H", STOP)), (TXQ, message),
        )]  # fmt: skip
        assert results == [OK, OK, OK, NOT_OK]
        assert controller.bus == [FRAMES["classic"]]

    drive(steps)


def test_the_driver_is_told_when_the_bus_is_lost(drive: Callable[[Steps], None]) -> None:
    def steps(driver: CanDriver, controller: Controller, thread: DeviceThread) -> None:
        driver.start()
        before = driver.pci.get(21, 1)
        thread.call(controller.go_off_the_bus)
        eventually(lambda: driver.pci.isr() & ISR_CONFIG)
        assert driver.status == S_BUSOFF
        assert driver.pci.get(21, 1) != before

    drive(steps)
