"""What is on a display: its pixels, and the PNG file in which they are kept.

It owns the picture and the thread that writes the file, which takes longer than an event loop has.
It must not know where the pixels come from.
"""

from __future__ import annotations

from .. import log
from ..lean import Thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..loop import EventLoop, Timer

PIXEL = 4  # bytes: blue, green, red and one of no meaning
SAVE_SECONDS = 0.2  # from the first change to the file, so that many changes cost one


class Picture:
    """The display of the device `name`.  `path` is a file for it, or nothing.

    All methods are for the thread of `loop`; the file is written beside it, one after the other.
    """

    def __init__(self, name: str, path: str, loop: EventLoop) -> None:
        self.size = (0, 0)
        self.pixels = bytearray()
        self._name, self._path, self._loop = name, path, loop
        self._unsaved = False
        self._timer: Timer | None = None
        self._writer: Thread | None = None

    def resize(self, width: int, height: int) -> None:
        """Become black, of so many pixels; what has this size, or is turned off by one of 0, stays."""
        if (width, height) != self.size and width and height:
            self.size = (width, height)
            self.pixels = bytearray(width * height * PIXEL)

    def fits(self, x: int, y: int, width: int, height: int) -> bool:
        """Whether this rectangle is on the display."""
        columns, rows = self.size
        return x + width <= columns and y + height <= rows

    def draw(self, x: int, y: int, width: int, data: memoryview) -> None:
        """Put a rectangle that `fits` at `x`, `y`: rows of `width` pixels."""
        if not data:
            return
        length, line = width * PIXEL, self.size[0] * PIXEL
        at = y * line + x * PIXEL
        for start in range(0, len(data), length):
            self.pixels[at : at + length] = data[start : start + length]
            at += line
        if self._path:
            self._unsaved = True
            self._save_later()

    def close(self) -> None:
        """Write what is not in the file yet."""
        if self._timer is not None:
            self._timer.cancel()
        if self._writer is not None:
            self._writer.join()
        if self._unsaved:
            self._unsaved = False
            self._write(*self.size, self.pixels)

    # -- the file ------------------------------------------------------------------------
    def _save_later(self) -> None:
        if self._timer is None and self._writer is None:
            self._timer = self._loop.call_later(SAVE_SECONDS, self._save)

    def _save(self) -> None:
        self._timer, self._unsaved = None, False
        self._writer = Thread(self._run, *self.size, bytes(self.pixels))

    def _run(self, width: int, height: int, pixels: bytes) -> None:
        """In the thread."""
        try:
            self._write(width, height, pixels)
        finally:
            self._loop.call_soon_threadsafe(self._saved)

    def _saved(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._unsaved:
            self._save_later()

    def _write(self, width: int, height: int, pixels: bytes | bytearray) -> None:
        from ..cache import whole_file

        try:
            with whole_file(self._path) as file:
                file.write(png(width, height, pixels))
        except OSError as error:
            log.once((self._name, "display"), f"{self._name}: display={self._path}: {error.strerror}")


def png(width: int, height: int, pixels: bytes | bytearray) -> bytes:
    """A PNG file of `pixels` (PNG specification, 5 and 11)."""
    from zlib import compressobj, crc32

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = crc32(kind + data)
        return len(data).to_bytes(4, "big") + kind + data + checksum.to_bytes(4, "big")

    rows, packer = bytearray(), compressobj(1)
    row = bytearray(1 + 3 * width)  # its first byte says that there is no filter
    length = width * PIXEL
    for start in range(0, len(pixels), length):  # row by row, so that other threads get their turn
        for colour in range(3):  # blue, green, red become red, green, blue
            row[3 - colour :: 3] = pixels[start + colour : start + length : PIXEL]
        rows += packer.compress(row)
    rows += packer.flush()
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))  # 8 bits, RGB
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", bytes(rows)) + chunk(b"IEND", b"")
