"""Only the documented values end or restart the machine."""

from __future__ import annotations

import pytest

from pyvmm.legacy.power import RESET_VALUE, I8042Reset, ResetRegister, SleepRegisters

# What ACPICA's acpi_hw_extended_sleep writes for S5: SLP_TYP 5 and SLP_EN.
S5 = 5 << 2 | 1 << 5


def test_only_s5_with_enable_powers_off() -> None:
    calls: list[str] = []
    registers = SleepRegisters(lambda: calls.append("off"))
    for value in range(256):
        before = len(calls)
        registers.write(0, 1, value)
        assert (len(calls) > before) == (value & 0x3C == S5)


def test_sleep_status_is_harmless() -> None:
    registers = SleepRegisters(pytest.fail)
    registers.write(1, 1, 0x80)  # ACPICA clears WAK_STS first
    registers.write(1, 1, S5)
    assert (registers.read(0, 1), registers.read(1, 1)) == (0, 0)


@pytest.mark.parametrize(("kind", "value"), [(ResetRegister, RESET_VALUE), (I8042Reset, 0xFE)])
def test_only_the_reset_value_resets(kind: type[ResetRegister] | type[I8042Reset], value: int) -> None:
    calls: list[str] = []
    device = kind(lambda: calls.append("reset"))
    for other in range(256):
        if other != value:
            device.write(0, 1, other)
    assert calls == []
    device.write(0, 1, value)
    assert calls == ["reset"]


def test_linux_need_not_wait_for_the_keyboard_controller() -> None:
    assert I8042Reset(pytest.fail).read(0, 1) & 2 == 0
