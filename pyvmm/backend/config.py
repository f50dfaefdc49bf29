"""A device's configuration space: bytes, with names for the fields that have one.

It owns the layout and the current values; it must not know who reads them.  Fields are
little-endian (virtio 1.3, section 2.5).
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


class ConfigSpace:
    """A device's configuration space (virtio 1.3, section 2.5).

    `fields` are `(name, width in bytes)` in order, without gaps; they start as zero, or as in `data`.

    `space["name"]` gets and sets a field as an unsigned integer (OverflowError when it does
    not fit); `read` and `write` are what the driver does.
    """

    def __init__(self, fields: Iterable[tuple[str, int]] = (), data: bytes = b"") -> None:
        self._places: dict[str, slice] = {}
        at = 0
        for name, width in fields:
            self._places[name] = slice(at, at + width)
            at += width
        self.data = bytearray(at)
        self.data[: len(data)] = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, name: str) -> int:
        return int.from_bytes(self.data[self._places[name]], "little")

    def __setitem__(self, name: str, value: int) -> None:
        place = self._places[name]
        self.data[place] = value.to_bytes(place.stop - place.start, "little")

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from the byte `offset`; zeros beyond the end, as generic frontends ask for more."""
        return bytes(self.data[offset : offset + size]).ljust(size, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """Store `data` at the byte `offset`; what lies beyond the end is dropped."""
        room = max(0, len(self.data) - offset)
        self.data[offset : offset + min(len(data), room)] = data[:room]

    def place(self, name: str) -> slice:
        """Which bytes the field is; KeyError when there is none of that name."""
        return self._places[name]

    def covers(self, name: str, offset: int, size: int) -> bool:
        """Whether an access of `size` bytes at `offset` touches the field."""
        place = self._places[name]
        return bool(offset < place.stop and place.start < offset + size)
