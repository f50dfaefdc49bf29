"""What a network card is plugged into: a TAP interface of the host, or a stream socket of frames.

It owns the host's descriptor and the form that frames have there.  It must not know virtqueues or
who sends (`net`).  On both sides of it a frame begins with a struct virtio_net_hdr of 12 bytes
(virtio 1.3, section 5.1.6); a TAP interface takes and gives that as it is.
"""

from __future__ import annotations

import errno
import fcntl
import os
from _socket import AF_UNIX, MSG_NOSIGNAL, SOCK_STREAM, socket
from struct import Struct

from .. import log
from ..errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

HEADER = 12  # struct virtio_net_hdr as VERSION_1 has it
LEAST = HEADER + 14  # and an Ethernet header
MOST = HEADER + 14 + 4 + 65535  # and a VLAN tag, and the longest IP packet

F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6 = (
    1 << bit for bit in (0, 1, 7, 8, 11, 12)
)

# linux/if_tun.h
TUN = "/dev/net/tun"
TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
IFREQ = Struct("@16sH22x")
NAME_MAX = 15  # IFNAMSIZ without its zero
TUN_F_CSUM = 1
OFFLOADS = ((F_GUEST_CSUM, TUN_F_CSUM), (F_GUEST_TSO4, 2), (F_GUEST_TSO6, 4))
CURES = {
    errno.EPERM: "CAP_NET_ADMIN is needed, or an interface made for this user with"
    " ip tuntap add dev NAME mode tap user USER",
    errno.EBUSY: "another program has it",
    errno.EINVAL: "no name for an interface, or not a TAP interface with one queue",
}


class Gone(Exception):
    """The wire has been cut at its other end; the text says how."""


class Wire:
    """What carries frames; nothing here blocks.

    `features` are the virtio_net features that it makes possible, `returns` says whether it may be
    plugged in again.
    """

    features = 0
    returns = False

    @property
    def full(self) -> bool:
        """Whether a frame was sent in part: `flush` comes before the next `send`."""
        return False

    def fileno(self) -> int:
        """What to watch."""
        raise TypeError(f"{type(self).__name__} has no fileno")

    def close(self) -> None:
        """Pull the plug."""

    def accept(self, features: int) -> None:
        """The driver accepted these features."""

    def receive(self) -> memoryview | None:
        """The next frame, good until the next call; None when there is none yet.  Raises Gone."""
        raise TypeError(f"{type(self).__name__} has no receive")

    def send(self, frame: bytes) -> None:
        """Send a frame, or OSError when it cannot be sent.  Raises Gone."""

    def flush(self) -> None:
        """Send more of what made the wire full.  Raises Gone."""


class TapWire(Wire):
    """The TAP interface `name`, made if there is none, and then gone with us.  ConfigError."""

    features = F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_HOST_TSO4 | F_HOST_TSO6

    def __init__(self, name: str) -> None:
        self._fd = open_tap(name)
        self._frame = memoryview(bytearray(MOST))

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)

    def accept(self, features: int) -> None:
        """Frames that come are checksummed and segmented for the driver where it does not do so."""
        wanted = sum(flag for feature, flag in OFFLOADS if features & feature)
        set_offload(self._fd, wanted if wanted & TUN_F_CSUM else 0)

    def receive(self) -> memoryview | None:
        try:
            count = os.readv(self._fd, [self._frame])
        except BlockingIOError:
            return None
        except OSError as error:
            raise Gone(f"the TAP interface: {error.strerror}") from None
        return self._frame[:count]

    def send(self, frame: bytes) -> None:
        try:
            os.write(self._fd, frame)
        except OSError as error:
            if error.errno == errno.EBADFD:
                raise Gone(f"the TAP interface: {error.strerror}") from None
            raise


def open_tap(name: str) -> int:
    """A descriptor of the interface; ConfigError when it cannot be had."""
    if not 0 < len(name.encode()) <= NAME_MAX:
        raise ConfigError(f"TAP interface {name}: an interface's name has 1 to {NAME_MAX} bytes")
    fd = -1
    try:
        fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        given = fcntl.ioctl(fd, TUNSETIFF, IFREQ.pack(name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, HEADER.to_bytes(4, "little"))
        set_offload(fd, 0)
    except OSError as error:
        why = f"{error.strerror}; {TUN}" if fd < 0 else CURES.get(error.errno or 0, error.strerror)
        if fd >= 0:
            os.close(fd)
        raise ConfigError(f"TAP interface {name}: {why}") from None
    log.info(f"net: at {IFREQ.unpack(given)[0].rstrip(bytes(1)).decode()}")
    return fd


def set_offload(fd: int, flags: int) -> None:
    """What frames may be like that the interface gives; nothing once it is gone, which `receive` tells."""
    try:
        fcntl.ioctl(fd, TUNSETOFFLOAD, flags)
    except OSError as error:
        if error.errno != errno.EBADFD:
            raise


class StreamWire(Wire):
    """A Unix stream socket that speaks as QEMU's `-netdev stream` does, such as passt's.

    Each frame comes after its length in 32 bits, big-endian.  ConfigError when nobody listens.
    """

    returns = True
    LENGTH = Struct(">I")

    def __init__(self, path: str) -> None:
        self._sock = connected(path)
        # Where a frame's header will be there is its length until the frame is whole.
        self._frame = memoryview(bytearray(MOST))
        self._at, self._end = HEADER - self.LENGTH.size, HEADER
        self._rest = b""

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    @property
    def full(self) -> bool:
        return bool(self._rest)

    def receive(self) -> memoryview | None:
        while self._fill():
            if self._end > HEADER:
                whole = self._frame[: self._end]
                whole[:HEADER] = bytes(HEADER)
                self._at, self._end = HEADER - self.LENGTH.size, HEADER
                return whole
            (size,) = self.LENGTH.unpack(self._frame[HEADER - self.LENGTH.size : HEADER])
            if not LEAST <= HEADER + size <= MOST:
                raise Gone(f"the stream: a frame of {size} bytes")
            self._end += size
        return None

    def _fill(self) -> bool:
        """Read up to where the length, or the frame, ends: nothing is stored beyond that."""
        while self._at < self._end:
            count = self._do(self._sock.recv_into, self._frame[self._at : self._end])
            if count is None:
                return False
            if not count:
                raise Gone("the stream was closed")
            self._at += count
        return True

    def send(self, frame: bytes) -> None:
        self._rest = self.LENGTH.pack(len(frame) - HEADER) + frame[HEADER:]
        self.flush()

    def flush(self) -> None:
        count = self._do(self._sock.send, self._rest, MSG_NOSIGNAL)
        self._rest = self._rest[count or 0 :]

    def _do(self, call: Callable[..., int], *arguments: object) -> int | None:
        """The outcome of a call of the socket's, None when it would block."""
        try:
            return call(*arguments)
        except BlockingIOError:
            return None
        except OSError as error:
            raise Gone(f"the stream: {error.strerror}") from None


def connected(path: str) -> socket:
    """A socket at the other end of which somebody listens at `path`; ConfigError otherwise."""
    sock = socket(AF_UNIX, SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise ConfigError(f"stream {path}: {error.strerror or error}") from None
    return sock


def plug(tap: str, stream: str) -> Wire:
    """The wire of that name, or at that path.  ConfigError when it cannot be had."""
    return TapWire(tap) if tap else StreamWire(stream)
