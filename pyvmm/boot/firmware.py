"""All the firmware there is: nine bytes of real-mode code at the reset vector.

Linux kernels with EFI support restart a hardware-reduced ACPI machine by EFI first, whatever
the FADT says of a reset register (reboot_init and efi_reboot_required in arch/x86), and
without EFI they jump to the BIOS in real mode, at F000:FFF0.  There they find a write to the
reset register.  It owns that code; who answers the port is legacy/power.py.
"""

from __future__ import annotations

from struct import pack

from .. import layout
from ..legacy.power import RESET_VALUE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .ram import GuestRam

RESET_VECTOR = 0xF_FFF0


def reset_code() -> bytes:
    """mov dx, PORT_RESET; mov al, RESET_VALUE; out dx, al; 1: hlt; jmp 1b."""
    return pack("<BHBBBBBB", 0xBA, layout.PORT_RESET, 0xB0, RESET_VALUE, 0xEE, 0xF4, 0xEB, 0xFD)


def write(ram: GuestRam) -> None:
    """Put the code where a real-mode jump to the BIOS ends."""
    ram.write(RESET_VECTOR, reset_code())
