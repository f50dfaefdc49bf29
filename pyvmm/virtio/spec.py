"""Numbers of the virtio 1.3 specification that the transport needs, and nothing else.

Plain integers: they are used on every register access, where an enum would cost more than
the access.  It must not know about PCI configuration space or about any device kind.
"""

from __future__ import annotations

# Device status (2.1)
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 0x01, 0x02, 0x04, 0x08
NEEDS_RESET, FAILED = 0x40, 0x80

# Reserved feature bits (6)
F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32
F_ACCESS_PLATFORM = 1 << 33
F_RING_PACKED = 1 << 34
F_IN_ORDER = 1 << 35
F_ORDER_PLATFORM = 1 << 36
F_SR_IOV = 1 << 37
F_NOTIFICATION_DATA = 1 << 38
F_NOTIF_CONFIG_DATA = 1 << 39
F_RING_RESET = 1 << 40
F_ADMIN_VQ = 1 << 41

# Split virtqueues (2.7): alignment of the three areas, and their sizes
QUEUE_SIZE_MAX = 32768
DESC_ALIGN, AVAIL_ALIGN, USED_ALIGN = 16, 2, 4


def desc_bytes(size: int) -> int:
    """Bytes of a descriptor table of `size` entries."""
    return 16 * size


def avail_bytes(size: int) -> int:
    """Bytes of an available ring, `used_event` included."""
    return 6 + 2 * size


def used_bytes(size: int) -> int:
    """Bytes of a used ring, `avail_event` included."""
    return 6 + 8 * size


# Packed virtqueues (2.8): the descriptor area is as above, the others are event suppression structures
EVENT_ALIGN = EVENT_BYTES = 4


# Virtio over PCI (4.1)
PCI_VENDOR_ID = 0x1AF4
PCI_DEVICE_BASE = 0x1040
PCI_DEVICE_LAST = 0x107F
PCI_REVISION = 1
PCI_CAP_VENDOR = 0x09
CAP_COMMON, CAP_NOTIFY, CAP_ISR, CAP_DEVICE, CAP_PCI, CAP_SHARED_MEMORY = 1, 2, 3, 4, 5, 8
ISR_QUEUE, ISR_CONFIG = 1, 2
NO_VECTOR = 0xFFFF
MAX_DEVICE_ID = PCI_DEVICE_LAST - PCI_DEVICE_BASE
