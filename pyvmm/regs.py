"""Register tables: the width and alignment rules of memory-mapped registers, once.

A device lists its registers as `Register` rows and has methods named after them; a
`RegisterFile` finds the methods when it is made (a missing one is an error then, not when
a guest comes by) and answers a bus.  It must not know what any register means.

An access must be exactly as wide as its register.  A 64-bit register also takes
two 32-bit accesses (virtio 4.1.3.1), each of which reads or replaces its half.  Everything
else is a guest's mistake: said once, reads zero, writes nothing.
"""

from __future__ import annotations

from . import log
from .record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Reader = Callable[[], int]
    Writer = Callable[[int], None]

LOW = 0xFFFF_FFFF


class Register(Record):
    """One row: byte offset, width in bytes (1, 2, 4 or 8), name, and `ro` or `rw`.

    The device has `read_<name>() -> int` and, when `rw`, `write_<name>(value)`.
    """

    offset: int
    width: int
    name: str
    access: str = "rw"


def _ignore(value: int) -> None:
    """Writing to a read-only register changes nothing (PCI habit; virtio 4.1.4.3.2)."""


def _halves(register: Register, read: Reader, write: Writer) -> list[tuple[int, Reader, Writer]]:
    """The two 32-bit views of a 64-bit register."""
    return [
        (register.offset, lambda: read() & LOW, lambda value: write(read() & ~LOW | value)),
        (register.offset + 4, lambda: read() >> 32, lambda value: write(read() & LOW | value << 32)),
    ]


class RegisterFile:
    """Answers a bus from a register table; `device` has the handlers, `name` is for messages."""

    def __init__(self, registers: Sequence[Register], device: object, name: str) -> None:
        self._name = name
        self._reads: dict[tuple[int, int], Reader] = {}
        self._writes: dict[tuple[int, int], Writer] = {}
        for register in registers:
            read: Reader = getattr(device, f"read_{register.name}")
            write: Writer = getattr(device, f"write_{register.name}") if register.access == "rw" else _ignore
            self._add(register.offset, register.width, read, write)
            if register.width == 8:
                for offset, read_half, write_half in _halves(register, read, write):
                    self._add(offset, 4, read_half, write_half)

    def read(self, offset: int, width: int) -> int:
        """Value of the register of `width` bytes at `offset`, or 0 when there is none."""
        handler = self._reads.get((offset, width))
        if handler is None:
            self._complain("read", offset, width)
            return 0
        return handler()

    def write(self, offset: int, width: int, value: int) -> None:
        """Write the register of `width` bytes at `offset`; nothing when there is none."""
        handler = self._writes.get((offset, width))
        if handler is None:
            self._complain("write", offset, width)
            return
        handler(value)

    def _add(self, offset: int, width: int, read: Reader, write: Writer) -> None:
        if offset % min(width, 4) or (offset, width) in self._reads:
            raise ValueError(f"{self._name}: bad register table at offset {offset:#x}")
        self._reads[offset, width] = read
        self._writes[offset, width] = write

    def _complain(self, what: str, offset: int, width: int) -> None:
        log.once(
            (self._name, what),
            f"{self._name}: the guest made a {8 * width}-bit {what} at {offset:#x}, where no register "
            "of that width is; ignored, as will be others",
        )
