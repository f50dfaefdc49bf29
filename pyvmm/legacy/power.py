"""Ports by which a guest ends or restarts: ACPI sleep and reset registers, the i8042's reset line.

It owns what a write to them means.  What then happens to the machine is the caller's; each
device only calls what it was given, on the thread of the virtual CPU that wrote.  All are bus
devices: `read(offset, width)` and `write(offset, width, value)`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SLEEP_TYPE_S5 = 5  # the first value of \_S5 in the DSDT
RESET_VALUE = 0x01  # the FADT's RESET_VALUE; other values do nothing

PORT_I8042 = 0x64
I8042_RESET = 0xFE  # pulse output line 0, which is the CPU's reset pin

# Sleep control register (ACPI 6.4 table 4.19): SLP_TYPx in bits 2-4, SLP_EN in bit 5.
_SLP_TYP_SHIFT, _SLP_TYP_MASK, _SLP_EN = 2, 0x7, 1 << 5


class SleepRegisters:
    """Sleep control at offset 0 and sleep status at offset 1 (ACPI 4.8.3.7), a byte each.

    The status is always 0: a machine that sleeps here never wakes, it is off.
    """

    SIZE = 2

    def __init__(self, power_off: Callable[[], None]) -> None:
        self._power_off = power_off

    def read(self, offset: int, width: int) -> int:
        return 0

    def write(self, offset: int, width: int, value: int) -> None:
        if offset == 0 and value & _SLP_EN and value >> _SLP_TYP_SHIFT & _SLP_TYP_MASK == SLEEP_TYPE_S5:
            self._power_off()


class ResetRegister:
    """The FADT's reset register: writing VALUE restarts the machine."""

    SIZE = 1
    VALUE = RESET_VALUE

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset

    def read(self, offset: int, width: int) -> int:
        return 0

    def write(self, offset: int, width: int, value: int) -> None:
        if value & 0xFF == self.VALUE:
            self._reset()


class I8042Reset(ResetRegister):
    """The command and status port of a keyboard controller that can only reset the CPU.

    `reboot=k`, and kernels that found no ACPI, restart by it.  The status reads as 0, input
    buffer empty, for which they wait before they write.
    """

    VALUE = I8042_RESET
