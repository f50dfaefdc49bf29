"""The control socket: a running machine tells about itself to who connects.

It owns the socket and the form of what is told: one JSON object and, beside it, a read-only
descriptor of the guest's memory; then the connection ends.  There are no requests, so nothing
that a peer sends can matter; who is neither this process's user nor root is told nothing.  It
must not know what the facts are for, and only reads the machine.
"""

from __future__ import annotations

import os

from .errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

    from .layout import RamRange
    from .loop import EventLoop
    from .virtio.device import VirtioDevice

    Facts = dict[str, Any]

MOST = 1 << 20  # bytes of JSON: 31 devices with 256 queues have less
PATIENCE = 5.0  # seconds for a machine to answer


class ControlSocket:
    """Listens at `path`; tells everyone who connects what `describe` returns, in the thread of `loop`.

    `ram_fd` stays the caller's.  Raises ConfigError when it cannot listen there.
    """

    def __init__(self, path: str, describe: Callable[[], Facts], ram_fd: int, loop: EventLoop) -> None:
        from .streams import ListeningStream

        self._stream = ListeningStream("--control", path)
        self._describe, self._ram_fd, self._loop = describe, ram_fd, loop
        loop.add_reader(self._stream.listener.fileno(), self._connected)

    def close(self) -> None:
        """Stop listening and remove the socket."""
        self._loop.remove_reader(self._stream.listener.fileno())
        self._stream.close()

    def _connected(self) -> None:
        """Who has gone again, or does not listen, is not told; nor is anybody while descriptors are short."""
        listener = self._stream.listener
        try:
            peer, _ = listener.accept()
        except OSError:
            self._loop.pause(listener.fileno(), self._stream.PATIENCE)
            return
        with peer:
            try:
                self._tell(peer)
            except OSError:
                return

    def _tell(self, peer: socket.socket) -> None:
        import json
        import socket

        if _user(peer) not in (0, os.geteuid()):
            return
        data = json.dumps(self._describe()).encode()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST)
        peer.setblocking(False)
        memory = os.open(f"/proc/self/fd/{self._ram_fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            socket.send_fds(peer, [data], [memory])
        finally:
            os.close(memory)


def _user(peer: socket.socket) -> int:
    """The user at the other end (struct ucred)."""
    import socket
    from struct import unpack

    user: int = unpack("=iII", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
    return user


def describe(devices: Iterable[VirtioDevice], ranges: Sequence[RamRange]) -> Facts:
    """What is told of a machine: its RAM, its devices, and where the queues lie that run.

    Taken while virtual CPUs run: each fact is true by itself, two may be from different moments.
    """
    return {
        "pid": os.getpid(),
        "ram": [[piece.address, piece.size, piece.offset] for piece in ranges],
        "devices": [_device(device) for device in devices],
    }


def _device(device: VirtioDevice) -> Facts:
    return {
        "name": device.name,
        "id": device.backend.device_id,
        "status": device.status,
        "features": device.driver_features,
        "queues": [
            {
                "index": queue.index,
                "size": queue.size,
                "desc": queue.desc,
                "avail": queue.avail,
                "used": queue.used,
            }
            for queue in device.queues
            if queue.enabled and device.running
        ],
    }


def ask(path: str) -> tuple[Facts, int]:
    """What the machine at the control socket `path` tells, and its memory, which is the caller's to close."""
    import json
    import socket
    from struct import pack
    from time import monotonic

    with socket.socket(socket.AF_UNIX) as sock:
        limit = pack("@ll", int(PATIENCE), int(PATIENCE % 1 * 1_000_000))  # struct timeval
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)  # of connecting, too
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        try:
            sock.connect(path)
            data, fds, _, _ = socket.recv_fds(sock, MOST, 1)
            end = monotonic() + PATIENCE
            while 0 < len(data) <= MOST and monotonic() < end and (more := sock.recv(MOST)):
                data += more
        except OSError as error:
            raise ConfigError(
                f"{path}: {error.strerror or error}; name the --control socket of a running machine"
            ) from None
    if len(fds) != 1:
        raise ConfigError(f"{path}: no machine answers there; name the --control socket of a running machine")
    try:
        facts: Facts = json.loads(data)
    except (ValueError, RecursionError):
        os.close(fds[0])
        raise ConfigError(f"{path}: this is no control socket of pyvmm") from None
    return facts, fds[0]
