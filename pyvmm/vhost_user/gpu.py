"""The other half of a vhost-user GPU: the socket on which its backend shows what is to be seen.

It follows QEMU's docs/interop/vhost-user-gpu.rst, one row of `REQUESTS` a message, and owns that
socket, the picture of the first scanout and the PNG file in which it is kept.  It knows no guest, and
nothing of what draws.  There is no window: a backend is told of one display, and what it shows is
saved or dropped.
"""

from __future__ import annotations

from _socket import AF_UNIX, SOCK_STREAM, socketpair
from struct import Struct

from .. import log
from ..record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable, Iterator

    from ..loop import EventLoop, Timer
    from .client import Client

    Answer = Callable[["Screen", tuple[int, ...], memoryview], bytes | None]

WIDTH, HEIGHT = 1024, 768
MAX_SIDE = 8192
PIXEL = 4  # bytes: blue, green, red and one of no meaning
SAVE_SECONDS = 0.2  # from the first change to the file, so that many changes cost one
REPLY = 4  # the only flag
HEADER = Struct("=III")  # request, flags, size
U64 = Struct("=Q")
RESPONSE = Struct("=IIQIB3x")  # struct virtio_gpu_ctrl_hdr
MODE = Struct("=IIIIII")  # x, y, width, height, enabled, flags
MODES = 16  # VIRTIO_GPU_MAX_SCANOUTS
OK_DISPLAY_INFO, OK_EDID = 0x1101, 0x1104
EDID_BYTES = 1024
CURSOR_BYTES = 64 * 64 * PIXEL
LARGEST = MAX_SIDE * MAX_SIDE * PIXEL + 64
RECEIVE = 1 << 20


class Refused(Exception):
    """The backend sent what the protocol does not allow."""


class Request(Record):
    """One message of the backend's: its fixed part, how many bytes may follow, and what it does."""

    id: int
    name: str
    fixed: Struct = Struct("=")
    more: int = 0
    act: Answer | None = None


class Screen:
    """One display.  `path` is a PNG file for what is on it, or nothing.

    `attach` gives a backend its socket, at each connection.  All else happens in the thread of `loop`.
    """

    def __init__(self, name: str, path: str, loop: EventLoop) -> None:
        self.name = name
        self.size = (0, 0)
        self.pixels = bytearray()
        self._path = path
        self._loop = loop
        self._socket: socket | None = None
        self._received = bytearray()
        self._timer: Timer | None = None

    def attach(self, client: Client) -> None:
        """Hand a new socket to the backend (GPU_SET_SOCKET), from any thread.  Raises ProtocolError."""
        ours, theirs = socketpair(AF_UNIX, SOCK_STREAM)
        try:
            client.call("GPU_SET_SOCKET", fds=(theirs.fileno(),))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self._loop.call_soon_threadsafe(lambda: self._listen(ours))

    def close(self) -> None:
        """Save what is not saved yet and end the connection."""
        if self._timer is not None:
            self._timer.cancel()
            self._save()
        self._hang_up()

    # -- the connection ------------------------------------------------------------------
    def _listen(self, sock: socket) -> None:
        self._hang_up()
        self._socket = sock
        self._loop.add_reader(sock.fileno(), self._readable)

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        self._received.clear()

    def _readable(self) -> None:
        """Descriptors that come along (DMABUF_SCANOUT) are not wanted: plain reads drop them."""
        assert self._socket is not None
        try:
            data = self._socket.recv(RECEIVE)
            self._received += data
            for row, body in self._messages():
                self._serve(row, body)
        except BlockingIOError:
            return
        except (OSError, Refused) as error:
            log.warn(f"{self.name}: what the backend shows: {error}; its screen stays as it is")
            data = b""
        if not data:
            self._hang_up()

    def _messages(self) -> Iterator[tuple[Request, bytes]]:
        """Whole messages, as far as there are any."""
        while len(self._received) >= HEADER.size:
            number, flags, size = HEADER.unpack_from(self._received)
            row = _BY_ID.get(number)
            if row is None or flags & REPLY or not 0 <= size - row.fixed.size <= row.more:
                raise Refused(f"message {number} of {size} bytes with flags {flags:#x}")
            end = HEADER.size + size
            if len(self._received) < end:
                return
            body = bytes(self._received[HEADER.size : end])
            del self._received[:end]
            yield row, body

    def _serve(self, row: Request, body: bytes) -> None:
        fields = row.fixed.unpack_from(body)
        answer = row.act(self, fields, memoryview(body)[row.fixed.size :]) if row.act is not None else None
        if answer is not None and self._socket is not None:
            self._socket.send(HEADER.pack(row.id, REPLY, len(answer)) + answer)  # at most a kilobyte

    # -- what the messages do ------------------------------------------------------------
    def features(self, fields: tuple[int, ...], data: memoryview) -> bytes:
        """None of the optional ones: no EDID, no DMA buffers."""
        return U64.pack(0)

    def displays(self, fields: tuple[int, ...], data: memoryview) -> bytes:
        """One display, of a size that every driver takes."""
        off = MODE.pack(0, 0, 0, 0, 0, 0)
        return (
            RESPONSE.pack(OK_DISPLAY_INFO, 0, 0, 0, 0)
            + MODE.pack(0, 0, WIDTH, HEIGHT, 1, 0)
            + off * (MODES - 1)
        )

    def edid(self, fields: tuple[int, ...], data: memoryview) -> bytes:
        """Nothing is known about the display."""
        return RESPONSE.pack(OK_EDID, 0, 0, 0, 0) + bytes(8 + EDID_BYTES)

    def done(self, fields: tuple[int, ...], data: memoryview) -> bytes:
        """A buffer that cannot be shown has been shown."""
        return b""

    def scanout(self, fields: tuple[int, ...], data: memoryview) -> None:
        """The driver sets a mode; a size of 0 turns the display off."""
        number, width, height = fields
        if number:
            return
        if width > MAX_SIDE or height > MAX_SIDE:
            raise Refused(f"a screen of {width} x {height}")
        self.size = (width, height)
        self.pixels = bytearray(width * height * PIXEL)

    def update(self, fields: tuple[int, ...], data: memoryview) -> None:
        """Pixels of a rectangle, row by row."""
        number, x, y, width, height = fields
        if number:
            return
        columns, rows = self.size
        if x + width > columns or y + height > rows or len(data) != width * height * PIXEL:
            raise Refused(f"{len(data)} bytes for {width} x {height} at {x}, {y} of {columns} x {rows}")
        length = width * PIXEL
        for row in range(height):
            at = ((y + row) * columns + x) * PIXEL
            self.pixels[at : at + length] = data[row * length : (row + 1) * length]
        if self._path and self._timer is None:
            self._timer = self._loop.call_later(SAVE_SECONDS, self._save)

    def _save(self) -> None:
        from ..cache import whole_file

        self._timer = None
        try:
            with whole_file(self._path) as file:
                file.write(png(*self.size, self.pixels))
        except OSError as error:
            log.once((self.name, "display"), f"{self.name}: display={self._path}: {error.strerror}")


_CURSOR = Struct("=III")  # scanout, x, y
REQUESTS = (
    Request(1, "GET_PROTOCOL_FEATURES", act=Screen.features),
    Request(2, "SET_PROTOCOL_FEATURES", U64),
    Request(3, "GET_DISPLAY_INFO", act=Screen.displays),
    Request(4, "CURSOR_POS", _CURSOR),
    Request(5, "CURSOR_POS_HIDE", _CURSOR),
    Request(6, "CURSOR_UPDATE", Struct("=IIIII"), CURSOR_BYTES),
    Request(7, "SCANOUT", Struct("=III"), act=Screen.scanout),
    Request(8, "UPDATE", Struct("=IIIII"), LARGEST, Screen.update),
    Request(9, "DMABUF_SCANOUT", Struct("=10I")),
    Request(10, "DMABUF_UPDATE", Struct("=IIIII"), act=Screen.done),
    Request(11, "GET_EDID", Struct("=I"), act=Screen.edid),
    Request(12, "DMABUF_SCANOUT2", Struct("=10IQ")),
)
_BY_ID = {row.id: row for row in REQUESTS}


def png(width: int, height: int, pixels: bytes | bytearray) -> bytes:
    """A PNG file of pixels as UPDATE has them (PNG specification, 5 and 11)."""
    from zlib import compress, crc32

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = crc32(kind + data)
        return len(data).to_bytes(4, "big") + kind + data + checksum.to_bytes(4, "big")

    rgb = bytearray(width * height * 3)
    for colour in range(3):  # blue, green, red become red, green, blue
        rgb[2 - colour :: 3] = pixels[colour::PIXEL]
    length = width * 3
    rows = b"".join(b"\0" + rgb[at : at + length] for at in range(0, len(rgb), length or 1))  # no filter
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))  # 8 bits, RGB
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", compress(rows, 1)) + chunk(b"IEND", b"")
    )
