"""Moves GPIO lines through the kernel's character device, with its ioctls alone (<linux/gpio.h>, v2).

It owns the few structs that this takes.  The host's side uses the events' layout, too.
"""

from __future__ import annotations

import fcntl
import os
import struct

INPUT, OUTPUT, EDGES = 1 << 2, 1 << 3, 3 << 4
EDGE = {"1": 1, "0": 2}  # GPIO_V2_LINE_EVENT_RISING_EDGE and FALLING_EDGE, by the level after it
# gpio_v2_line_info: name, consumer, offset, attributes' number, flags, and the attributes
INFO = struct.Struct("=32s32sIIQ176x")
# gpio_v2_line_request: offsets, consumer, flags, no attributes, number of lines, events' buffer, descriptor
REQUEST = struct.Struct("=256s32sQI260xII20xi")
VALUES = struct.Struct("=QQ")  # bits, mask
EVENT = struct.Struct("=QIIII24x")  # gpio_v2_line_event: time, what, offset, number, number of the line's


def code(number: int, size: int) -> int:
    """_IOWR(0xB4, number, size)."""
    return 3 << 30 | size << 16 | 0xB4 << 8 | number


GET_INFO, GET_LINE = code(0x05, INFO.size), code(0x07, REQUEST.size)
GET_VALUES, SET_VALUES = code(0x0E, VALUES.size), code(0x0F, VALUES.size)


class Chip:
    """A chip's lines, which are requested, used and released."""

    def __init__(self, number: int) -> None:
        self._fd = os.open(f"/dev/gpiochip{number}", os.O_RDWR)

    def name(self, line: int) -> str:
        """What the device calls a line."""
        data = fcntl.ioctl(self._fd, GET_INFO, INFO.pack(b"", b"", line, 0, 0))
        name: bytes = INFO.unpack(data)[0]
        return name.rstrip(b"\0").decode()

    def request(self, lines: range, flags: int) -> Lines:
        """Have these lines as inputs or outputs."""
        offsets = struct.pack(f"={len(lines)}I", *lines)
        data = fcntl.ioctl(self._fd, GET_LINE, REQUEST.pack(offsets, b"test", flags, 0, len(lines), 0, 0))
        return Lines(REQUEST.unpack(data)[-1], len(lines))


class Lines:
    """Lines that are ours until `close`."""

    def __init__(self, fd: int, count: int) -> None:
        self._fd = fd
        self._count = count

    def set(self, levels: str) -> None:
        """Drive the lines: a digit each."""
        fcntl.ioctl(self._fd, SET_VALUES, VALUES.pack(int(levels[::-1], 2), (1 << self._count) - 1))

    def get(self) -> str:
        """The lines' levels: a digit each."""
        bits = VALUES.unpack(fcntl.ioctl(self._fd, GET_VALUES, VALUES.pack(0, (1 << self._count) - 1)))[0]
        return f"{bits:0{self._count}b}"[::-1]

    def event(self) -> list[int]:
        """The next edge: which line, and which EDGE."""
        _, what, offset, _, _ = EVENT.unpack(os.read(self._fd, EVENT.size))
        return [offset, what]

    def close(self) -> None:
        """Release them."""
        os.close(self._fd)
