"""The other half of a vhost-user GPU: the socket on which its backend shows what is to be seen.

It follows QEMU's docs/interop/vhost-user-gpu.rst, one row of `REQUESTS` a message, and owns that
socket.  It knows no guest, and nothing of what draws.  There is no window: a backend is told of one
display, and what it shows there goes into a `Picture`.
"""

from __future__ import annotations

from _socket import AF_UNIX, SOCK_STREAM, socketpair
from struct import Struct
from time import monotonic

from .. import log
from ..record import Record
from .picture import PIXEL, Picture

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable

    from ..loop import EventLoop
    from .client import Client

    Answer = Callable[["Screen", tuple[int, ...], memoryview], bytes | None]

WIDTH, HEIGHT = 1024, 768
MAX_SIDE, MAX_PIXELS = 8192, 3840 * 2160
TURN = 0.01  # seconds in one turn of the loop; it has other things to do
REPLY = 4  # the only flag
HEADER = Struct("=III")  # request, flags, size
U64 = Struct("=Q")
RESPONSE = Struct("=IIQIB3x")  # struct virtio_gpu_ctrl_hdr
MODE = Struct("=IIIIII")  # x, y, width, height, enabled, flags
MODES = 16  # VIRTIO_GPU_MAX_SCANOUTS
OK_DISPLAY_INFO, OK_EDID = 0x1101, 0x1104
EDID_BYTES = 1024
CURSOR_BYTES = 64 * 64 * PIXEL
RECEIVE = 1 << 18  # bytes at a time


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
        self.picture = Picture(name, path, loop)
        self._loop = loop
        self._handed: list[socket] = []  # our ends, until the loop listens there
        self._socket: socket | None = None
        self._received = bytearray()  # of one message, never more

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
        self._handed.append(ours)
        self._loop.call_soon_threadsafe(self._listen)

    def close(self) -> None:
        """End the connection and save what is not saved yet; nobody attaches any more."""
        self._hang_up()
        while self._handed:
            self._handed.pop().close()
        self.picture.close()

    # -- the connection ------------------------------------------------------------------
    def _listen(self) -> None:
        while self._handed:
            self._hang_up()
            self._socket = self._handed.pop(0)
            self._loop.add_reader(self._socket.fileno(), self._readable)

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        self._received.clear()

    def _readable(self) -> None:
        """Do what has come, as far as there is time."""
        until = monotonic() + TURN
        try:
            while self._socket is not None and monotonic() < until:
                if not self._receive(self._socket):
                    return
        except (OSError, Refused) as error:
            log.warn(f"{self.name}: what the backend shows: {error}; its screen stays as it is")
            self._hang_up()

    def _receive(self, sock: socket) -> bool:
        """Read once, of a header or of what its message lacks; whether there may be more.

        Descriptors that come along (DMABUF_SCANOUT) are not wanted: plain reads drop them.
        """
        try:
            data = sock.recv(min(self._missing(), RECEIVE))
        except BlockingIOError:
            return False
        if not data:
            self._hang_up()
            return False
        self._received += data
        if not self._missing():
            message, self._received = self._received, bytearray()
            self._serve(sock, message)
        return True

    def _missing(self) -> int:
        """How many bytes are to come of the header, or then of its message."""
        have = len(self._received)
        if have < HEADER.size:
            return HEADER.size - have
        number, flags, size = HEADER.unpack_from(self._received)
        row = _BY_ID.get(number)
        if row is None or flags & REPLY or not 0 <= size - row.fixed.size <= row.more:
            raise Refused(f"message {number} of {size} bytes with flags {flags:#x}")
        return HEADER.size + int(size) - have

    def _serve(self, sock: socket, message: bytearray) -> None:
        row = _BY_ID[HEADER.unpack_from(message)[0]]
        if row.act is None:
            return
        fields = row.fixed.unpack_from(message, HEADER.size)
        answer = row.act(self, fields, memoryview(message)[HEADER.size + row.fixed.size :])
        if answer is not None:  # at most a kilobyte; who does not read them has filled the socket's buffer
            sock.send(HEADER.pack(row.id, REPLY, len(answer)) + answer)

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
        if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
            raise Refused(f"a screen of {width} x {height}")
        self.picture.resize(width, height)

    def update(self, fields: tuple[int, ...], data: memoryview) -> None:
        """Pixels of a rectangle, row by row."""
        number, x, y, width, height = fields
        if number:
            return
        if not self.picture.fits(x, y, width, height) or len(data) != width * height * PIXEL:
            columns, rows = self.picture.size
            raise Refused(f"{len(data)} bytes for {width} x {height} at {x}, {y} of {columns} x {rows}")
        self.picture.draw(x, y, width, data)


_CURSOR = Struct("=III")  # scanout, x, y
REQUESTS = (
    Request(1, "GET_PROTOCOL_FEATURES", act=Screen.features),
    Request(2, "SET_PROTOCOL_FEATURES", U64),
    Request(3, "GET_DISPLAY_INFO", act=Screen.displays),
    Request(4, "CURSOR_POS", _CURSOR),
    Request(5, "CURSOR_POS_HIDE", _CURSOR),
    Request(6, "CURSOR_UPDATE", Struct("=IIIII"), CURSOR_BYTES),
    Request(7, "SCANOUT", Struct("=III"), act=Screen.scanout),
    Request(8, "UPDATE", Struct("=IIIII"), MAX_PIXELS * PIXEL, Screen.update),
    Request(9, "DMABUF_SCANOUT", Struct("=10I")),
    Request(10, "DMABUF_UPDATE", Struct("=IIIII"), act=Screen.done),
    Request(11, "GET_EDID", Struct("=I"), act=Screen.edid),
    Request(12, "DMABUF_SCANOUT2", Struct("=10IQ")),
)
_BY_ID = {row.id: row for row in REQUESTS}
