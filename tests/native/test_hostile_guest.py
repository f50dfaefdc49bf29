"""A table of everything that a guest can do to its registers, each in a machine with real devices.

Each case is done twice: by a virtual CPU that runs it as instructions, and by the test on the same
buses, where 64-bit accesses are possible too.  After each time the event loop and every
register answer, a driver that comes then finds the victim working (real data from a real backend),
the other device has gone on working, and nothing is left when the machine is closed.

In one file because it is one table.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.accesses import Accesses, instructions, on_buses
from fakes.census import leaves_nothing
from fakes.entropy import Entropy, loop_answers, scenario
from fakes.program import LIMIT, SPIN, pvh_elf

from pyvmm import config as cfg
from pyvmm import layout
from pyvmm.loop import EventLoop
from pyvmm.pci import config as pci
from pyvmm.virtio import spec
from pyvmm.virtio.pci import BAR_SIZE, COMMON, DEVICE, ISR, NOTIFY, PENDING, TABLE
from pyvmm.vm import Vm

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("need_kvm")]

RAM = 64 << 20
BASE, CODE, MARK = 0x40_0000, 0x41_0000, 0x50_0000  # of the kernel; of a case; where it says that it is over
RINGS, OTHER_RINGS = 0x10_0000, 0x20_0000
DESC, AVAIL, USED = RINGS, RINGS + 0x80, RINGS + 0xC0  # of the 8 descriptors that the driver gave
VICTIM, OTHER, ABSENT = 1, 2, 9  # slots
BAR, OTHER_BAR, ELSEWHERE = (layout.MMIO32_BASE + 0x10_0000 * i for i in range(3))
CONFIG = layout.ECAM_BASE + (VICTIM << 15)
OTHER_CONFIG = layout.ECAM_BASE + (OTHER << 15)
ADDRESS, DATA = layout.PORT_PCI_ADDRESS, layout.PORT_PCI_DATA
ONES = (1 << 64) - 1
WIDTHS = (1, 2, 4, 8)
PLACES = ((COMMON, 68), (ISR, 8), (DEVICE, 16), (NOTIFY, 16), (TABLE, 48), (PENDING, 16))
STATUS, SELECT, SIZE, VECTOR, ENABLE, RING = BAR + 20, BAR + 22, BAR + 24, BAR + 26, BAR + 28, BAR + 32
RUNNING = spec.ACKNOWLEDGE | spec.DRIVER | spec.FEATURES_OK | spec.DRIVER_OK
MSIX_ON, MSIX_MASKED = 0x8000, 0xC000
STOP_PORTS = (*range(layout.PORT_SLEEP, layout.PORT_SLEEP + 2), layout.PORT_RESET, 0x64)


# -- pieces of cases ---------------------------------------------------------------------


def every_register(a: Accesses, value: int | None) -> None:
    """Read, or write `value` to, each offset of each structure at each width."""
    for start, length in PLACES:
        for offset in range(start, start + length):
            for width in WIDTHS:
                a.load(BAR + offset, width) if value is None else a.store(BAR + offset, width, value)


def every_config_byte(a: Accesses, value: int | None, first: int = 0, last: int = 256) -> None:
    for offset in range(first, last):
        for width in WIDTHS:
            a.load(CONFIG + offset, width) if value is None else a.store(CONFIG + offset, width, value)


def reset(a: Accesses) -> None:
    a.store(STATUS, 1, 0)
    a.load(STATUS, 1)


def negotiate(a: Accesses) -> None:
    """From nothing to FEATURES_OK with all that is offered in the upper word, VERSION_1."""
    reset(a)
    a.store(STATUS, 1, 1)
    a.store(STATUS, 1, 3)
    a.store(BAR + 8, 4, 1)
    a.store(BAR + 12, 4, 1)
    a.store(STATUS, 1, 0xB)


def ring(a: Accesses, desc: int = DESC, avail: int = AVAIL, used: int = USED, size: int = 8) -> None:
    a.store(SELECT, 2, 0)
    a.store(SIZE, 2, size)
    for offset, address in ((0, desc), (8, avail), (16, used)):
        a.store(RING + offset, 4, address)
        a.store(RING + offset + 4, 4, address >> 32)
    a.store(ENABLE, 2, 1)


def start(a: Accesses, **places: int) -> None:
    """A driver's start with these rings."""
    negotiate(a)
    ring(a, **places)
    a.store(STATUS, 1, RUNNING)
    a.load(STATUS, 1)


def restart(a: Accesses) -> None:
    start(a)
    a.store(BAR + NOTIFY, 2, 0)


def move(a: Accesses, address: int, config: int = CONFIG) -> None:
    a.store(config + pci.BAR0, 4, address)
    a.store(config + pci.BAR0 + 4, 4, address >> 32)


def decode(a: Accesses, on: bool, config: int = CONFIG) -> None:
    a.store(config + pci.COMMAND, 2, pci.COMMAND_MEMORY | pci.COMMAND_MASTER if on else 0)


def control(a: Accesses, value: int) -> None:
    """The message control register of the victim's MSI-X capability, which is its last."""
    a.store(CONFIG + MSIX + 2, 2, value)


def window(a: Accesses, bar: int, offset: int, length: int, value: int | None = None) -> None:
    """An access through virtio_pci_cfg_cap."""
    a.store(CONFIG + PCI_CFG + 4, 1, bar)
    a.store(CONFIG + PCI_CFG + 8, 4, offset)
    a.store(CONFIG + PCI_CFG + 12, 4, length)
    if value is None:
        a.load(CONFIG + PCI_CFG + 16, 4)
    else:
        a.store(CONFIG + PCI_CFG + 16, 4, value)


def offer(a: Accesses, chain: bytes, head: int = 0, index: int = 1) -> None:
    """Start afresh, put descriptors and an available entry into the rings, and ring."""
    start(a)
    a.put(DESC, chain)
    a.put(AVAIL, struct.pack("<HHHH", 0, index, head, head))
    a.store(BAR + NOTIFY, 2, 0)


def descriptor(address: int, length: int, flags: int = 2, following: int = 0) -> bytes:
    return struct.pack("<QIHH", address, length, flags, following)


MSIX, PCI_CFG = 0x88, 0x74  # checked by the fixture


# -- the table ---------------------------------------------------------------------------


class Case(NamedTuple):
    """`fill` lists the accesses, which are done `times` times; `beside` happens in another thread."""

    fill: Callable[[Accesses], object]
    times: int = 1
    beside: Callable[[Accesses], object] | None = None
    ram: int = RAM


def each(*actions: Callable[[Accesses], object]) -> Callable[[Accesses], None]:
    def fill(a: Accesses) -> None:
        for action in actions:
            action(a)

    return fill


def at(action: Callable[..., object], *arguments: Any, **named: Any) -> Callable[[Accesses], object]:
    return lambda a: action(a, *arguments, **named)


def store(address: int, width: int, *values: int) -> Callable[[Accesses], None]:
    return lambda a: [a.store(address, width, value) for value in values] and None


def load(address: int, *widths: int) -> Callable[[Accesses], None]:
    return lambda a: [a.load(address, width) for width in widths] and None


def out(port: int, width: int, *values: int) -> Callable[[Accesses], None]:
    return lambda a: [a.out(port, width, value) for value in values] and None


def inp(port: int, *widths: int) -> Callable[[Accesses], None]:
    return lambda a: [a.inp(port, width) for width in widths] and None


def select(function: int, offset: int = 0, enable: int = 0x8000_0000) -> Callable[[Accesses], None]:
    return out(ADDRESS, 4, enable | function << 11 | offset)


BAD_RINGS = {
    "descriptors outside RAM": {"desc": RAM},
    "available ring outside RAM": {"avail": RAM + 0x1000},
    "used ring outside RAM": {"used": 0xB000_0000},
    "descriptors across the end of RAM": {"desc": RAM - 16},
    "used ring across the end of RAM": {"used": RAM - 4},
    "rings at the end of addresses": {"desc": ONES - 15, "avail": ONES - 15, "used": ONES - 15},
    "rings on registers": {"desc": BAR, "avail": layout.ECAM_BASE, "used": layout.LAPIC_BASE},
    "misaligned descriptors": {"desc": DESC + 8},
    "misaligned available ring": {"avail": AVAIL + 1},
    "misaligned used ring": {"used": USED + 2},
    "size 0": {"size": 0},
    "size 3": {"size": 3},
    "size 512, of 256": {"size": 512},
    "size 65535": {"size": 0xFFFF},
}
STRANGE_RINGS = {
    "rings on top of one another": {"desc": DESC, "avail": DESC, "used": DESC},
    "size 1": {"size": 1},
    "rings at address 0": {"desc": 0, "avail": 0x80, "used": 0xC0},
}
BUFFER = 0x30_0000
CHAINS = {
    "a chain that is a loop": (descriptor(BUFFER, 64, 3, 0), 0, 1),
    "a chain that leaves the table": (descriptor(BUFFER, 64, 3, 60000), 0, 1),
    "a head outside the table": (descriptor(BUFFER, 64), 60000, 1),
    "a buffer outside RAM": (descriptor(RAM + 0x1000, 64), 0, 1),
    "a buffer across the end of RAM": (descriptor(RAM - 16, 64), 0, 1),
    "a buffer of 4 GiB": (descriptor(BUFFER, 0xFFFF_FFFF), 0, 1),
    "a buffer at the end of addresses": (descriptor(ONES - 15, 64), 0, 1),
    "an empty buffer": (descriptor(BUFFER, 0), 0, 1),
    "a buffer that cannot be written": (descriptor(BUFFER, 64, 0), 0, 1),
    "an indirect table outside RAM": (descriptor(ONES & ~0xF, 16, 4), 0, 1),
    "an indirect table of odd size": (descriptor(BUFFER, 17, 4), 0, 1),
    "30000 chains at once, of 8": (descriptor(BUFFER, 64), 0, 30000),
}
KICK, LOOK = store(BAR + NOTIFY, 2, 0), load(STATUS, 1)
MASKS = tuple(BAR + TABLE + 16 * vector + 12 for vector in range(2))
TWO_PIECES = layout.RAM_HOLE + RAM
TABLE_OF_CASES = {
    # registers
    "each register is read at each width": Case(at(every_register, None)),
    "each register becomes 0 at each width": Case(at(every_register, 0)),
    "each register becomes ones at each width": Case(at(every_register, ONES)),
    "configuration is read at each offset and width": Case(at(every_config_byte, None)),
    "configuration becomes 0 at each offset and width": Case(at(every_config_byte, 0)),
    "configuration becomes ones at each offset and width": Case(at(every_config_byte, ONES)),
    "extended configuration": Case(each(at(every_config_byte, ONES, 256, 320), load(CONFIG + 4094, *WIDTHS),
                                        store(CONFIG + 4094, 4, ONES), load(CONFIG + 4093, 8))),
    "configuration of absent devices": Case(each(
        *(store(layout.ECAM_BASE + (ABSENT << 15) + offset, 4, ONES) for offset in (0, 4, 16, 0x3C)),
        *(load(layout.ECAM_BASE + (place << 12), 4) for place in range(256)))),
    "the end of configuration space": Case(each(
        *(load(layout.ECAM_BASE + layout.ECAM_SIZE - 2 + i, *WIDTHS) for i in range(4)),
        *(store(layout.ECAM_BASE + layout.ECAM_SIZE - 2 + i, 8, ONES) for i in range(4)))),
    "the host bridge is overwritten": Case(lambda a: [
        a.store(layout.ECAM_BASE + offset, width, value)
        for offset in range(0, 256) for width in (1, 4) for value in (ONES, 0)]),
    "configuration ports at every width": Case(each(
        select(VICTIM << 3), *(inp(DATA + i, 1, 2, 4) for i in range(4)), *(out(DATA + i, 4, ONES) for i in
        (1, 2, 3)), *(inp(ADDRESS + i, 1, 2, 4) for i in range(4)),
        *(out(ADDRESS + i, 1, 0xFF) for i in range(4)))),
    "configuration ports, other buses and switched off": Case(each(
        *(each(select(VICTIM << 3, 4, enable), inp(DATA, 4), out(DATA, 4, ONES)) for enable in
          (0, 0x8001_0000, 0x80FF_0000, 0x7F00_0000)))),
    "ports all over": Case(lambda a: [a.inp(port, width) for width in (1, 4)
                                      for port in (*range(0, 0x1000, 3), *range(0x1000, 0x1_0000, 61))
                                      if port not in STOP_PORTS]),
    # queues
    **{name: Case(at(start, **places)) for name, places in (BAD_RINGS | STRANGE_RINGS).items()},
    "rings across two pieces of RAM": Case(at(start, desc=layout.RAM_HOLE - 64), ram=TWO_PIECES),
    "rings in the hole between two": Case(at(start, used=layout.RAM_HOLE), ram=TWO_PIECES),
    "rings across the second piece's end": Case(at(start, used=layout.HIGH_RAM + RAM - 4), ram=TWO_PIECES),
    **{name: Case(at(offer, *chain)) for name, chain in CHAINS.items()},
    "a queue that does not exist": Case(each(
        *(each(store(SELECT, 2, queue), *(load(BAR + offset, 2) for offset in range(24, 32, 2)),
               *(store(BAR + offset, 2, 1, 0xFFFF) for offset in range(24, 32, 2)), store(RING, 4, ONES))
          for queue in (1, 0x7FFF, 0xFFFF)))),
    "a queue is enabled twice": Case(each(negotiate, ring, ring, store(STATUS, 1, RUNNING))),
    "strange values enable a queue": Case(each(negotiate, store(ENABLE, 2, 0, 2, 0xFFFF, 1, 0))),
    "a start without queues": Case(each(negotiate, store(STATUS, 1, RUNNING))),
    "a running queue is changed": Case(each(restart, at(ring, desc=0, avail=ONES, used=7, size=16)), 20),
    "vectors that do not exist": Case(each(
        *(each(store(BAR + 16, 2, vector), load(BAR + 16, 2), store(VECTOR, 2, vector), load(VECTOR, 2))
          for vector in (2, 3, 0x7FF, 0xFFFE, 0xFFFF)))),
    "vectors of a running queue": Case(each(store(SELECT, 2, 0), store(VECTOR, 2, 1, 0xFFFF, 0, 7)), 50),
    # status
    "every status in turn": Case(store(STATUS, 1, *range(256))),
    "every status after a reset": Case(each(*(each(reset, store(STATUS, 1, value)) for value in range(256)))),
    "a reset storm": Case(reset, 500),
    "a storm of starts": Case(start, 20),
    "a storm of starts with doorbells": Case(restart, 20),
    "a running device is started": Case(each(restart, store(STATUS, 1, *[RUNNING] * 50))),
    "a device is declared failed": Case(each(restart, store(STATUS, 1, 0x8F, 0xC0, 0x40, 0x80))),
    "no features": Case(each(reset, store(STATUS, 1, 1, 3, 0xB, 0xF))),
    "all features": Case(each(
        reset, store(STATUS, 1, 1, 3),
        *(each(store(BAR + 8, 4, word), store(BAR + 12, 4, ONES)) for word in (0, 1, 2, 0xFFFF_FFFF)),
        store(STATUS, 1, 0xB), LOOK, store(STATUS, 1, 0xF))),
    "features after FEATURES_OK": Case(each(negotiate, store(BAR + 8, 4, 0), store(BAR + 12, 4, ONES),
                                            ring, store(STATUS, 1, RUNNING))),
    "words of features that do not exist": Case(each(
        store(BAR, 4, 2, 0xFFFF_FFFF), load(BAR + 4, 4), store(BAR + 8, 4, 0xFFFF_FFFF), load(BAR + 12, 4))),
    # doorbells
    "doorbells of absent queues": Case(lambda a: [
        a.store(BAR + NOTIFY + offset, width, ONES) for offset in range(4, 4096, 60) for width in (1, 2, 4)]),
    "doorbells before the start": Case(each(negotiate, ring, KICK), 50),
    "a storm of doorbells": Case(store(BAR + NOTIFY, 4, 0, ONES, 1), 500),
    "doorbells where the BAR was": Case(each(at(move, ELSEWHERE), KICK,
                                             store(ELSEWHERE + NOTIFY, 2, 0)), 20),
    "doorbells of every width": Case(each(*(store(BAR + NOTIFY + i, width, 0)
                                            for i in range(4) for width in WIDTHS))),
    # device configuration and ISR
    "configuration past its end": Case(each(
        *(load(BAR + DEVICE + offset, *WIDTHS) for offset in (0, 1, 63, 255, 4088, 4095)),
        *(store(BAR + DEVICE + offset, 8, ONES) for offset in (0, 1, 63, 255, 4088, 4095)))),
    "an ISR storm": Case(each(load(BAR + ISR, 1), store(BAR + ISR, 1, 0xFF)), 500),
    "an ISR storm without MSI-X": Case(each(at(control, 0), restart, *[load(BAR + ISR, 1)] * 20), 10),
    # MSI-X
    "the vector table at wrong widths and places": Case(lambda a: [
        a.store(BAR + TABLE + offset, width, ONES)
        for offset in (*range(0, 40), 4080, 8176, 8191) for width in WIDTHS]),
    "vectors that lead nowhere": Case(each(
        *(store(BAR + TABLE + 4 * word, 4, ONES) for word in range(8)),
        *(store(BAR + TABLE + 16 * vector + 12, 4, 0) for vector in range(2)), restart)),
    "messages to every address": Case(each(
        *(each(store(BAR + TABLE + 16, 4, address), store(BAR + TABLE + 28, 4, 0), KICK)
          for address in (0, BAR, RINGS, layout.IOAPIC_BASE, 0xFEE0_0000, 0xFEEF_F000, ONES)))),
    "pending bits are written": Case(lambda a: [
        a.store(BAR + PENDING + offset, 8, ONES) for offset in range(0, 4096, 64)]),
    "a storm of masks": Case(each(*(store(mask, 4, 1, 0) for mask in MASKS)), 300),
    "masks from two sides": Case(each(*(store(mask, 4, 1, 0) for mask in MASKS)), 300,
                                 beside=each(*(store(mask, 4, 0, 1) for mask in MASKS[::-1]), KICK)),
    "MSI-X on and off": Case(each(at(control, 0), at(control, MSIX_ON), KICK), 100),
    "MSI-X on and off from two sides": Case(
        each(at(control, MSIX_MASKED), at(control, MSIX_ON), at(control, 0)), 100,
        beside=each(store(MASKS[0], 4, 0, 1), store(VECTOR, 2, 0, 1), at(control, MSIX_ON))),
    "resets from two sides": Case(restart, 20, beside=each(reset, LOOK, KICK)),
    # BARs
    **{f"a BAR on {what}": Case(each(at(move, address), load(address, 4))) for what, address in (
        ("RAM", BASE), ("address 0", 0), ("configuration space", layout.ECAM_BASE),
        ("the local APIC", layout.LAPIC_BASE), ("the IOAPIC", layout.IOAPIC_BASE),
        ("its own ring", RINGS & ~(BAR_SIZE - 1)), ("the last addresses", ONES),
        ("half of the window", layout.MMIO32_BASE - BAR_SIZE // 2))},
    "a BAR on another one": Case(each(at(move, OTHER_BAR), load(OTHER_BAR + 20, 1), load(BAR + 20, 1))),
    "a BAR on another one, which leaves": Case(each(
        at(move, OTHER_BAR), at(decode, False, OTHER_CONFIG), load(OTHER_BAR + 20, 1),
        at(move, BAR), at(decode, True, OTHER_CONFIG))),
    "a BAR is sized while it is decoded": Case(each(
        at(decode, True), at(move, ONES), load(CONFIG + pci.BAR0, 4), load(CONFIG + pci.BAR0 + 4, 4),
        at(move, BAR)), 50),
    "half of a BAR": Case(each(store(CONFIG + pci.BAR0 + 4, 4, 1, ONES, 0),
                               store(CONFIG + pci.BAR0, 2, 0xFFFF)), 20),
    "a BAR that wanders": Case(each(at(move, ELSEWHERE), load(ELSEWHERE + 20, 1), at(move, BAR), LOOK),
                               100),
    "decoding on and off": Case(each(at(decode, False), LOOK, at(decode, True), LOOK), 100),
    "a BAR that wanders from two sides": Case(
        each(at(move, ELSEWHERE), at(move, BAR)), 100,
        beside=each(at(decode, False), at(decode, True), KICK, LOOK)),
    # the window in configuration space
    "the window leads nowhere": Case(each(
        *(at(window, bar, offset, length, value) for value in (None, ONES) for bar, offset, length in (
            (0, 0, 0), (0, 0, 3), (0, 0, 8), (0, 0, ONES), (0, 1, 2), (0, BAR_SIZE - 1, 4), (0, BAR_SIZE, 4),
            (0, ONES, 4), (1, 0, 4), (2, 0, 4), (5, 0, 4), (6, 0, 4), (255, 0, 4))))),
    "the window resets the device": Case(each(at(window, 0, 20, 1, 0), at(window, 0, 20, 1)), 20),
    "the window rings": Case(each(at(window, 0, NOTIFY, 2, 0), at(window, 0, NOTIFY + 400, 4, 0)), 50),
    "the window masks": Case(each(*(at(window, 0, TABLE + 12, 4, mask) for mask in (0, 1))), 50),
}  # fmt: skip


# -- the stage ---------------------------------------------------------------------------


class Stage:
    """A machine with two sources of random numbers, the first of which is the victim."""

    def __init__(self, built: Vm, loop: EventLoop) -> None:
        self.built, self.loop = built, loop
        self.victim, self.other = Entropy(built, VICTIM, RINGS), Entropy(built, OTHER, OTHER_RINGS)

    def serve(self) -> None:
        """Both are in service, with MSI-X, and their registers are where 32-bit code reaches them."""
        for device, address in ((self.victim, BAR), (self.other, OTHER_BAR)):
            self.place(device, address)
            device.start()
            device.driver.enable_msix()
            assert device.ask()
        assert (self.victim.driver.msix, self.victim.driver.pci_cfg) == (MSIX, PCI_CFG)

    def place(self, device: Entropy, address: int) -> None:
        """What firmware does."""
        config = device.driver.config
        config.write(pci.COMMAND, 2, 0)
        config.write(pci.BAR0, 4, address)
        config.write(pci.BAR0 + 4, 4, address >> 32)

    def await_cpu(self) -> None:
        due = time.monotonic() + LIMIT
        while True:
            with memoryview(self.built.ram) as ram:
                if ram[MARK]:
                    return
            assert time.monotonic() < due, "the virtual CPU does not come to the end"
            time.sleep(0.002)

    def check(self) -> None:
        """See the module."""
        assert loop_answers(self.loop)
        assert self.built.board.pci.describe()
        self.check_bars()
        for device, address in ((self.victim, BAR), (self.other, OTHER_BAR)):
            self.place(device, address)
            device.driver.probe()
        assert self.other.ask() and not self.other.driver.status & spec.NEEDS_RESET
        self.start_again()
        assert self.victim.ask() and self.victim.driver.status == RUNNING

    def check_bars(self) -> None:
        """Nothing but configuration space is decoded outside the two windows."""
        host = self.built.board.pci
        for base, size, name in self.built.board.mmio.ranges():
            inside = any(window.holds(base, size) for window in (host.window32, host.window64))
            assert inside or base == layout.ECAM_BASE, f"{name} at {base:#x}"

    def start_again(self) -> None:
        """The driver empties its rings and takes the victim into service."""
        self.victim.driver.set_control(0)
        self.victim.driver.reset()
        with memoryview(self.built.ram) as ram:
            ram[RINGS : RINGS + 0x1000] = bytes(0x1000)
        self.victim = Entropy(self.built, VICTIM, RINGS)
        self.victim.start()


def listed(fill: Callable[[Accesses], object]) -> Accesses:
    accesses = Accesses()
    fill(accesses)
    return accesses


@pytest.fixture
def machine(tmp_path: Any) -> Callable[[Case], cfg.VmConfig]:
    """Makes configurations around a guest that waits for a case and then does it."""

    def make(case: Case) -> cfg.VmConfig:
        kernel = tmp_path / "vmlinux"
        kernel.write_bytes(pvh_elf(SPIN, base=BASE))
        devices = (cfg.RngDevice("/dev/zero"), cfg.RngDevice("/dev/zero"))
        payload, memory = cfg.PayloadConfig(str(kernel)), cfg.MemoryConfig(case.ram)
        return cfg.VmConfig(payload, memory=memory, devices=devices)

    return make


def test_the_table_is_long_enough() -> None:
    assert len(TABLE_OF_CASES) >= 40


def by_cpu(case: Case, stage: Stage) -> None:
    """Let the guest, which spins, jump to the case's code."""
    with memoryview(stage.built.ram) as ram:
        ram[BASE + 2 : BASE + 6] = struct.pack("<i", CODE - BASE - 6)
        ram[BASE : BASE + 2] = b"\x90\xe9"  # nop; jmp
    stage.await_cpu()


def by_test(case: Case, stage: Stage) -> None:
    """The same from this thread, 64-bit accesses included."""
    accesses = listed(case.fill)
    for _ in range(case.times):
        on_buses(accesses, stage.built, case.ram)


def play(case: Case, stage: Stage, player: Callable[[Case, Stage], None]) -> None:
    """The case, and what happens beside it in another thread."""
    over = threading.Event()
    failures: list[BaseException] = []

    def beside() -> None:
        accesses = listed(case.beside or (lambda a: None))
        try:
            while not over.is_set():
                on_buses(accesses, stage.built, case.ram)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=beside if case.beside else lambda: None)
    thread.start()
    try:
        player(case, stage)
    finally:
        over.set()
        thread.join()
    assert not failures


@pytest.mark.parametrize("case", TABLE_OF_CASES.values(), ids=TABLE_OF_CASES)
def test_hostile_guest(case: Case, machine: Any) -> None:
    with leaves_nothing(), EventLoop() as loop, Vm(machine(case), loop) as built:
        stage = Stage(built, loop)
        code = instructions(listed(case.fill), case.times, MARK)
        assert CODE + len(code) < MARK
        with memoryview(built.ram) as ram:
            ram[CODE : CODE + len(code)] = code

        def steps() -> None:
            stage.serve()
            for player in (by_cpu, by_test):
                play(case, stage, player)
                stage.check()

        scenario(built, loop, steps)
