"""Configuration space of one PCI function: a byte image, what a guest may change, and hooks.

It owns the header, the capability list and the BAR registers (PCI Local Bus 3.0, chapter 6).
It must not know what a BAR leads to or what a capability does: whoever does asks to be called
before a dword is read or after it was written.
"""

from __future__ import annotations

from ..record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Hook = Callable[[], None]

SIZE = 256  # nothing is offered in the extended space; it reads zero

# Offsets in a type 0 header
VENDOR_ID, DEVICE_ID, COMMAND, STATUS = 0x00, 0x02, 0x04, 0x06
REVISION, CLASS_CODE, HEADER_TYPE = 0x08, 0x09, 0x0E
BAR0, SUBSYSTEM_VENDOR_ID, SUBSYSTEM_ID = 0x10, 0x2C, 0x2E
CAPABILITIES, INTERRUPT_LINE, INTERRUPT_PIN = 0x34, 0x3C, 0x3D
FIRST_CAPABILITY = 0x40

COMMAND_MEMORY, COMMAND_MASTER, COMMAND_INTX_DISABLE = 0x2, 0x4, 0x400
COMMAND_WRITABLE = 0x547  # I/O, memory, master, parity, SERR#, INTx disable
STATUS_INTERRUPT, STATUS_CAPABILITIES = 0x08, 0x10
MULTIFUNCTION = 0x80

BAR_64BIT, BAR_PREFETCHABLE = 0x4, 0x8
BAR_MINIMUM = 16


class Identity(Record):
    """Who a function says that it is; `class_code` is base class, subclass and interface, 24 bits."""

    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0
    interrupt_pin: int = 0  # 1 is INTA, 0 none


class ConfigSpace:
    """The 256 bytes; not thread-safe, the function serialises its accesses."""

    def __init__(self, identity: Identity) -> None:
        self.data = bytearray(SIZE)
        self._mask = bytearray(SIZE)
        self._before_read: dict[int, Hook] = {}
        self._after_write: dict[int, Hook] = {}
        self._last_capability = 0
        self._free = FIRST_CAPABILITY
        self.put(VENDOR_ID, 2, identity.vendor)
        self.put(DEVICE_ID, 2, identity.device)
        self.put(REVISION, 1, identity.revision)
        self.put(CLASS_CODE, 3, identity.class_code)
        self.put(SUBSYSTEM_VENDOR_ID, 2, identity.subsystem_vendor)
        self.put(SUBSYSTEM_ID, 2, identity.subsystem)
        self.put(INTERRUPT_PIN, 1, identity.interrupt_pin)
        self.allow(COMMAND, 2, COMMAND_WRITABLE)
        self.allow(INTERRUPT_LINE, 1, 0xFF)

    # -- the guest's side ------------------------------------------------------------
    def read(self, offset: int, width: int) -> int:
        """`width` bytes at `offset`; zero beyond the space."""
        self._call(self._before_read, offset, width)
        return int.from_bytes(self.data[offset : offset + width], "little")

    def is_plain(self, offset: int, width: int) -> bool:
        """Whether reading there is no more than looking at `data`."""
        return self._before_read.keys().isdisjoint(_dwords(offset, width))

    def write(self, offset: int, width: int, value: int) -> None:
        """Change the writable ones of the bits at `offset`, then call the hooks there."""
        if offset + width > SIZE:
            return
        mask = self.get_mask(offset, width)
        if not mask:
            return
        self.put(offset, width, self.get(offset, width) & ~mask | value & mask)
        self._call(self._after_write, offset, width)

    @staticmethod
    def _call(hooks: dict[int, Hook], offset: int, width: int) -> None:
        for dword in _dwords(offset, width):
            hook = hooks.get(dword)
            if hook is not None:
                hook()

    # -- the device's side -----------------------------------------------------------
    def get(self, offset: int, width: int) -> int:
        """What is stored, with no hook."""
        return int.from_bytes(self.data[offset : offset + width], "little")

    def put(self, offset: int, width: int, value: int) -> None:
        """Store, whatever the guest may do, with no hook."""
        self.data[offset : offset + width] = value.to_bytes(width, "little")

    def get_mask(self, offset: int, width: int) -> int:
        """Which bits the guest may change."""
        return int.from_bytes(self._mask[offset : offset + width], "little")

    def allow(self, offset: int, width: int, mask: int) -> None:
        """Let the guest change the bits of `mask`."""
        self._mask[offset : offset + width] = mask.to_bytes(width, "little")

    def before_read(self, offset: int, hook: Hook) -> None:
        """Call `hook` before the dword that has `offset` is read."""
        self._before_read[offset & ~3] = hook

    def after_write(self, offset: int, hook: Hook) -> None:
        """Call `hook` after the guest wrote to the dword that has `offset`."""
        self._after_write[offset & ~3] = hook

    def add_capability(self, identifier: int, body: bytes) -> int:
        """Append a capability (`body` follows the identifier and the link); returns its offset."""
        offset = self._free
        size = 2 + len(body)
        if offset + size > SIZE:
            raise ValueError("the capabilities do not fit into configuration space")
        self.data[offset : offset + size] = bytes((identifier, 0)) + body
        self.put(self._last_capability + 1 if self._last_capability else CAPABILITIES, 1, offset)
        self.put(STATUS, 2, self.get(STATUS, 2) | STATUS_CAPABILITIES)
        self._last_capability = offset
        self._free = (offset + size + 3) & ~3
        return offset

    # -- BARs ------------------------------------------------------------------------
    def add_bar(self, index: int, size: int, *, wide: bool, prefetchable: bool) -> None:
        """Make memory BAR `index` (and the next one when `wide`) of a power-of-two `size`."""
        if size < BAR_MINIMUM or size & (size - 1):
            raise ValueError(f"BAR {index} has size {size:#x}, which is not a power of two from 16 up")
        width = 8 if wide else 4
        self.put(BAR0 + 4 * index, 4, wide * BAR_64BIT | prefetchable * BAR_PREFETCHABLE)
        # Sizing (all ones written, size mask read back) follows from which bits are writable.
        self.allow(BAR0 + 4 * index, width, -size & (1 << 8 * width) - 1)

    def bar_address(self, index: int) -> int:
        """Address that the guest has programmed into BAR `index`."""
        offset = BAR0 + 4 * index
        width = 8 if self.data[offset] & BAR_64BIT else 4
        return self.get(offset, width) & ~0xF

    def set_bar_address(self, index: int, address: int) -> None:
        """What firmware would do: assign BAR `index`, calling no hook."""
        offset = BAR0 + 4 * index
        width = 8 if self.data[offset] & BAR_64BIT else 4
        self.put(offset, width, address | self.data[offset] & 0xF)

    @property
    def command(self) -> int:
        """The command register."""
        return self.data[COMMAND] | self.data[COMMAND + 1] << 8


def _dwords(offset: int, width: int) -> range:
    """Where the dwords begin that an access touches: ECAM lets a guest touch three at once."""
    return range(offset & ~3, offset + width, 4)
