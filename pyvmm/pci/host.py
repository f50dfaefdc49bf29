"""The PCI host bridge: one bus of 32 slots, two ways to configuration space, two windows.

It owns which function is in which slot, where BARs are assigned at start and where they are
decoded now.  It must not know what the functions do.

Addresses outside the two windows are not forwarded to PCI, as on a real bridge: a BAR that a
guest puts on RAM, on an interrupt controller or on configuration space simply is not decoded.
A BAR on top of another one is not decoded either until the other one leaves.
"""

from __future__ import annotations

from _thread import allocate_lock as Lock

from .. import layout, log
from ..bus import Bus, BusConflict
from ..errors import ConfigError
from ..record import Record
from . import config as cfg
from .config import Identity
from .function import Bar, PciFunction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..irq import InterruptRouter

SLOTS, FUNCTIONS = 32, 8
CONFIG_ENABLE = 0x8000_0000
HOST_BRIDGE = Identity(  # what cloud-hypervisor shows; Linux has no quirk for it
    vendor=0x8086, device=0x0D57, class_code=0x06_00_00
)


def intx_gsi(slot: int, pin: int) -> int:
    """IOAPIC pin of a function's interrupt pin (1 is INTA) by the usual swizzle; _PRT says the same."""
    return layout.PCI_INTX_IRQS[(slot + pin - 1) % len(layout.PCI_INTX_IRQS)]


class Window(Record):
    """A range of guest addresses that the bridge forwards."""

    base: int
    size: int

    def holds(self, address: int, size: int) -> bool:
        """Whether the whole range lies inside."""
        return self.base <= address and address + size <= self.base + self.size


class PciHost:
    """Answers ECAM on the memory bus by itself (`read`, `write`) and CF8/CFC through `ports`."""

    def __init__(self, mmio: Bus, router: InterruptRouter, mmio64_base: int) -> None:
        self._mmio = mmio
        self._router = router
        self._functions: dict[int, PciFunction] = {}
        self._reads: dict[int, Callable[[int, int], int]] = {}
        self._map_lock = Lock()
        self._mapped: dict[tuple[PciFunction, int], int] = {}
        self.window32 = Window(layout.MMIO32_BASE, layout.MMIO32_SIZE)
        self.window64 = Window(mmio64_base, layout.MMIO64_SIZE)
        self._next = {self.window32: self.window32.base, self.window64: self.window64.base}
        self.ports = ConfigPorts(self)
        mmio.insert(layout.ECAM_BASE, layout.ECAM_SIZE, self, "PCI configuration (ECAM)")
        self.add(PciFunction("host bridge", HOST_BRIDGE), 0)

    def add(self, function: PciFunction, slot: int | None = None, number: int = 0) -> tuple[int, int]:
        """Put `function` into `slot` (default: the first free one) and assign its BARs.

        Function 0 of a slot must be there for a guest to look for others.  Returns slot and
        function number; from then on the host closes it.  Raises ConfigError when there is no such
        place or no room for a BAR.
        """
        slot = self._free_slot() if slot is None else slot
        place = slot * FUNCTIONS + number
        if not (0 <= slot < SLOTS and 0 <= number < FUNCTIONS):
            raise ConfigError(f"PCI address {slot}.{number}: slots are 0 to 31, functions 0 to 7")
        if place in self._functions:
            taken = self._functions[place].name
            raise ConfigError(f"PCI address {slot}.{number} is taken by {taken}; choose another slot")
        for bar in function.bars.values():
            function.config.set_bar_address(bar.index, self._assign(bar, function.name))
        pin = function.config.data[cfg.INTERRUPT_PIN]
        gsi = intx_gsi(slot, pin) if pin else 0
        function.config.put(cfg.INTERRUPT_LINE, 1, gsi)
        function.attach(self._remap, self._router.line(gsi) if pin else None)
        self._functions[place] = function
        self._reads[place] = function.config_read
        self._mark_multifunction(slot)
        return slot, number

    def functions(self) -> Iterator[tuple[int, int, PciFunction]]:
        """Slot, function number and function, in order."""
        for place, function in sorted(self._functions.items()):
            yield *divmod(place, FUNCTIONS), function

    def describe(self) -> list[str]:
        """One line a function, as lspci would print it, and one for each BAR."""
        lines = []
        for slot, number, function in self.functions():
            get = function.config.get
            lines.append(
                f"00:{slot:02x}.{number} {get(cfg.CLASS_CODE + 1, 2):04x}: "
                f"{get(cfg.VENDOR_ID, 2):04x}:{get(cfg.DEVICE_ID, 2):04x} {function.name}"
            )
            for bar in function.bars.values():
                state = "" if (function, bar.index) in self._mapped else " [disabled]"
                address = function.config.bar_address(bar.index)
                lines.append(f"        BAR {bar.index}: {address:#x} size {bar.size:#x}{state}")
        return lines

    def reset(self) -> None:
        """The machine restarts: see `PciFunction.reset`."""
        for function in self._functions.values():
            function.reset()

    def close(self) -> None:
        """Close every function."""
        for function in self._functions.values():
            function.close()

    # -- ECAM (PCI Express 7.2.2): bits 19..12 device and function, 11..0 register ----------
    def read(self, offset: int, width: int) -> int:
        """Configuration read through ECAM; all ones where no function is."""
        read = self._reads.get(offset >> 12)
        return read(offset & 0xFFF, width) if read else (1 << 8 * width) - 1

    def write(self, offset: int, width: int, value: int) -> None:
        """Configuration write through ECAM."""
        function = self._functions.get(offset >> 12)
        if function is not None:
            function.config_write(offset & 0xFFF, width, value)

    # -- BARs ------------------------------------------------------------------------------
    def _assign(self, bar: Bar, name: str) -> int:
        window = self.window64 if bar.wide else self.window32
        address = -(-self._next[window] // bar.size) * bar.size
        if not window.holds(address, bar.size):
            raise ConfigError(
                f"{name}: no room for {bar.size:#x} bytes in the PCI window of {window.size:#x} bytes; "
                "use fewer devices or smaller shared memory"
            )
        self._next[window] = address + bar.size
        return address

    def _remap(self, function: PciFunction) -> None:
        """Decode a function's BARs where its registers say, and nowhere else."""
        with self._map_lock:
            freed = [self._update(function, bar) for bar in function.bars.values()]
            if any(freed):
                self._retry()

    def _update(self, function: PciFunction, bar: Bar) -> bool:
        """Move one BAR; True when it left a place that another one may want."""
        before = self._mapped.get((function, bar.index))
        wanted = function.decoded(bar)
        if wanted is not None and not self._forwarded(wanted, bar.size):
            wanted = None
        if wanted == before:
            return False
        if before is not None:
            function.bar_mapped(bar.index, None)
            self._mmio.remove(before)
            del self._mapped[function, bar.index]
        if wanted is not None:
            self._map(function, bar, wanted)
        return before is not None

    def _map(self, function: PciFunction, bar: Bar, address: int) -> None:
        try:
            self._mmio.insert(address, bar.size, bar.device, f"{function.name} BAR {bar.index}")
        except BusConflict as conflict:
            log.once((function.name, "overlap"), f"the guest made BARs overlap: {conflict}; not decoded")
            return
        self._mapped[function, bar.index] = address
        function.bar_mapped(bar.index, address)

    def _retry(self) -> None:
        for function in self._functions.values():
            for bar in function.bars.values():
                if (function, bar.index) not in self._mapped:
                    self._update(function, bar)

    def _forwarded(self, address: int, size: int) -> bool:
        return self.window32.holds(address, size) or self.window64.holds(address, size)

    # -- slots -----------------------------------------------------------------------------
    def _free_slot(self) -> int:
        used = {place // FUNCTIONS for place in self._functions}
        for slot in range(SLOTS):
            if slot not in used:
                return slot
        raise ConfigError(f"all {SLOTS - 1} PCI slots are taken; use fewer devices")

    def _mark_multifunction(self, slot: int) -> None:
        """Function 0 says in its header that there are others (PCI 6.2.1)."""
        first = self._functions.get(slot * FUNCTIONS)
        others = any(slot * FUNCTIONS + number in self._functions for number in range(1, FUNCTIONS))
        if first is not None and others:
            first.config.put(cfg.HEADER_TYPE, 1, cfg.MULTIFUNCTION)


class ConfigPorts:
    """Configuration mechanism 1 at ports 0xCF8 (address) and 0xCFC..0xCFF (data); PCI 3.2.2.3.2."""

    def __init__(self, host: PciHost) -> None:
        self._host = host
        self._address = 0

    def read(self, offset: int, width: int) -> int:
        """Read the address register (32 bits only) or the data window."""
        if offset >= 4:
            place = self._place(offset, width)
            if place is not None:
                return self._host.read(place, width)
        elif (offset, width) == (0, 4):
            return self._address
        return (1 << 8 * width) - 1

    def write(self, offset: int, width: int, value: int) -> None:
        """Write the address register (32 bits only) or the data window."""
        if offset >= 4:
            place = self._place(offset, width)
            if place is not None:
                self._host.write(place, width, value)
        elif (offset, width) == (0, 4):
            self._address = value & 0x80FF_FFFC

    def _place(self, offset: int, width: int) -> int | None:
        """ECAM offset of a data access; None when disabled, on another bus, or past the dword."""
        address = self._address
        if address < CONFIG_ENABLE or address & 0x00FF_0000 or offset + width > 8:
            return None
        return (address & 0xFF00) << 4 | address & 0xFC | offset & 3
