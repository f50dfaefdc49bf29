"""A guest's accesses as a list, done by a real virtual CPU or by the test on the machine's buses.

It owns the translation into instructions of 32-bit protected mode without paging, which is how a PVH
guest starts.  What the accesses are for it must not know.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

JUMP_TO_SELF = bytes.fromhex("ebfe")
PACK = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}
WIDE = 8  # bytes: no single instruction of this mode stores so many


class Access(NamedTuple):
    """`value` is None for a read; `port` tells the two address spaces apart."""

    port: bool
    address: int
    width: int
    value: int | None


class Accesses(list[Access]):
    """The list, and words to write it with; values are cut to their width."""

    def load(self, address: int, width: int = 4) -> None:
        self.append(Access(False, address, width, None))

    def store(self, address: int, width: int, value: int) -> None:
        self.append(Access(False, address, width, value & (1 << 8 * width) - 1))

    def inp(self, port: int, width: int = 4) -> None:
        self.append(Access(True, port, width, None))

    def out(self, port: int, width: int, value: int) -> None:
        self.append(Access(True, port, width, value & (1 << 8 * width) - 1))

    def put(self, address: int, data: bytes) -> None:
        """Bytes in RAM."""
        for at in range(0, len(data), 4):
            self.store(address + at, 4, int.from_bytes(data[at : at + 4], "little"))


def instructions(accesses: Iterable[Access], times: int, mark: int) -> bytes:
    """Code that does all of it `times` times, stores 1 at `mark`, and stands still.

    What is too wide, or beyond 4 GiB, is left out.
    """
    body = b"".join(
        _port(access) if access.port else _memory(access)
        for access in accesses
        if access.width < WIDE and access.address < 1 << 32
    )
    loop = b"\xb9" + struct.pack("<I", times) + body  # mov ecx, times
    loop += b"\x49\x0f\x85" + struct.pack("<i", -len(body) - 7)  # dec ecx; jnz body
    return loop + b"\xc7\x05" + struct.pack("<II", mark, 1) + JUMP_TO_SELF


def _memory(access: Access) -> bytes:
    prefix = b"\x66" if access.width == 2 else b""
    address = struct.pack("<I", access.address)
    if access.value is None:  # mov al / ax / eax, [address]
        return prefix + (b"\x8a" if access.width == 1 else b"\x8b") + b"\x05" + address
    store = b"\xc6" if access.width == 1 else b"\xc7"  # mov [address], value
    return prefix + store + b"\x05" + address + struct.pack(PACK[access.width], access.value)


def _port(access: Access) -> bytes:
    prefix = b"\x66" if access.width == 2 else b""
    code = b"\x66\xba" + struct.pack("<H", access.address)  # mov dx, port
    if access.value is None:
        return code + prefix + (b"\xec" if access.width == 1 else b"\xed")
    load = b"\xb0" if access.width == 1 else b"\xb8"  # mov al / ax / eax, value
    code += prefix + load + struct.pack(PACK[access.width], access.value)
    return code + prefix + (b"\xee" if access.width == 1 else b"\xef")


def on_buses(accesses: Iterable[Access], built: Any, ram_size: int) -> None:
    """The same from this thread: RAM is written to, everything else goes over the buses."""
    for access in accesses:
        if not access.port and access.address + access.width <= ram_size:
            if access.value is not None:
                with memoryview(built.ram) as ram:
                    struct.pack_into(PACK[access.width], ram, access.address, access.value)
            continue
        _on_bus(built.board.pio if access.port else built.board.mmio, access)


def _on_bus(bus: Any, access: Access) -> None:
    if access.value is None:
        value = bus.read(access.address, access.width)
        assert 0 <= value < 1 << 8 * access.width
    else:
        bus.write(access.address, access.width, access.value)
