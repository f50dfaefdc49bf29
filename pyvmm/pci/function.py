"""One PCI function: configuration space, BARs, INTx, and what the host bridge calls.

It owns the lock of the function's configuration space and the level of its interrupt pin.
It must not know which device it is (subclasses do), nor where its BARs end up (the host
bridge decides that from the windows which it forwards).

Lock order: configuration lock of a function, then whatever the device takes in its hooks,
then the host bridge's map lock, then a bus's lock.
"""

from __future__ import annotations

from _thread import allocate_lock as Lock

from ..record import Record
from . import config as cfg
from .config import ConfigSpace, Identity

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..bus import BusDevice
    from ..irq import IrqLine


class Bar(Record):
    """A memory BAR: `size` bytes (a power of two) that `device` answers, offsets from its start."""

    index: int
    size: int
    device: BusDevice
    wide: bool = True  # 64-bit; takes the register after it too
    prefetchable: bool = False


class PciFunction:
    """Base of every function; complete as it is for one that does nothing."""

    def __init__(self, name: str, identity: Identity) -> None:
        self.name = name
        self.config = ConfigSpace(identity)
        self.bars: dict[int, Bar] = {}
        self.line: IrqLine | None = None
        self._remap: Callable[[PciFunction], None] = lambda _: None
        self._config_lock = Lock()
        self._line_lock = Lock()
        self._interrupt = False
        self.config.after_write(cfg.COMMAND, self._command_written)
        self.config.before_read(cfg.STATUS, self._show_interrupt)

    # -- for subclasses --------------------------------------------------------------
    def add_bar(self, bar: Bar) -> None:
        """Offer a BAR; before the function is given to a host bridge."""
        self.config.add_bar(bar.index, bar.size, wide=bar.wide, prefetchable=bar.prefetchable)
        self.bars[bar.index] = bar
        for register in range(bar.index, bar.index + 1 + bar.wide):
            self.config.after_write(cfg.BAR0 + 4 * register, self._bar_written)

    def set_interrupt(self, level: bool) -> None:
        """State of INTx before the command register's disable bit; from any thread."""
        with self._line_lock:
            self._interrupt = level
            self._drive_line()

    def bar_mapped(self, index: int, address: int | None) -> None:
        """BAR `index` is now decoded at `address`, or nowhere; called under the host's map lock."""

    def close(self) -> None:
        """Release what the function owns."""

    # -- for the host bridge ---------------------------------------------------------
    def config_read(self, offset: int, width: int) -> int:
        """Configuration read; `offset` below 4096.

        Linux reads thousands of times at boot, nearly always where nothing but bytes is.
        """
        config = self.config
        if config.is_plain(offset, width):
            return int.from_bytes(config.data[offset : offset + width], "little")
        with self._config_lock:
            return self.config.read(offset, width)

    def config_write(self, offset: int, width: int, value: int) -> None:
        """Configuration write; `offset` below 4096."""
        with self._config_lock:
            self.config.write(offset, width, value)

    def attach(self, remap: Callable[[PciFunction], None], line: IrqLine | None) -> None:
        """The host bridge takes the function in: whom to tell of BAR changes, where INTx goes."""
        self._remap = remap
        self.line = line

    def reset(self) -> None:
        """The machine restarts: whoever works for the function lets go of memory; no virtual CPU runs.

        Its registers stay as they are: the next machine has a new function.
        """

    def decoded(self, bar: Bar) -> int | None:
        """Address at which the guest wants `bar`, None while memory decoding is off."""
        if not self.config.command & cfg.COMMAND_MEMORY:
            return None
        return self.config.bar_address(bar.index)

    # -- hooks -----------------------------------------------------------------------
    def _command_written(self) -> None:
        self._remap(self)
        with self._line_lock:
            self._drive_line()

    def _bar_written(self) -> None:
        if self.config.command & cfg.COMMAND_MEMORY:
            self._remap(self)

    def _show_interrupt(self) -> None:
        bit = cfg.STATUS_INTERRUPT if self._interrupt else 0
        self.config.data[cfg.STATUS] = self.config.data[cfg.STATUS] & ~cfg.STATUS_INTERRUPT | bit

    def _drive_line(self) -> None:
        if self.line is not None:
            self.line.set(self._interrupt and not self.config.command & cfg.COMMAND_INTX_DISABLE)
