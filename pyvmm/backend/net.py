"""A virtio network device (virtio 1.3, section 5.1): one pair of virtqueues and a wire of the host's.

It owns the way of frames between the two, the rules for what a driver sends and gets, and
the link's status.  It must not know what the wire is (`wire`) or who runs it.

Nothing is stored but one frame each way.  When the driver has no buffers, frames wait in the wire,
which is not watched until the driver gives some; when the wire takes no more, they wait in the
driver's queue.  A wire that is cut sets the link down, and what the driver sends is lost.
A stream is tried again each second; a TAP interface that somebody deleted is not made again.
"""

from __future__ import annotations

from .. import log, options
from ..errors import ConfigError
from .config import ConfigSpace
from .device import Device
from .wire import (
    F_GUEST_CSUM,
    F_GUEST_TSO4,
    F_GUEST_TSO6,
    HEADER,
    LEAST,
    MOST,
    Gone,
    Wire,
    plug,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any

    from .._native.vring import Chain
    from ..loop import Timer
    from .loop import DeviceLoop
    from .queue import Queue

RX, TX = 0, 1
F_MTU, F_MAC, F_STATUS = (1 << bit for bit in (3, 5, 16))
S_LINK_UP = 1
CONFIG = (("mac", 6), ("status", 2), ("max_virtqueue_pairs", 2), ("mtu", 2))

HDR_F_NEEDS_CSUM = 1
GSO = {1: F_GUEST_TSO4, 4: F_GUEST_TSO6}  # gso_type: the feature that it needs
NUM_BUFFERS = slice(10, HEADER)
ONE_BUFFER = b"\1\0"

TURN = 64  # frames for the driver before others have their turn
RETRY_SECONDS = 1.0


class Net(Device):
    """A network card at the wire that `connect` makes, now and whenever it is plugged in again.

    Without `mac` the driver makes an address up; without `mtu` it takes what is usual.  ConfigError of
    `connect`.  `dropped` counts frames that could not be handed on.
    """

    device_id = 1

    def __init__(
        self, connect: Callable[[], Wire], *, mac: bytes = b"", mtu: int = 0, size: int = 256
    ) -> None:
        super().__init__()
        self.queue_sizes = (size, size)
        self.dropped = 0
        self._connect = connect
        self._frame: memoryview | None = None  # has no buffer yet
        self._retry: Timer | None = None
        self._wire: Wire | None = connect()
        self.features = F_STATUS | self._wire.features | (F_MAC if mac else 0) | (F_MTU if mtu else 0)
        self.config = ConfigSpace(CONFIG)
        for name, value in (
            ("mac", int.from_bytes(mac, "little")),
            ("status", S_LINK_UP),
            ("max_virtqueue_pairs", 1),
            ("mtu", mtu),
        ):
            self.config[name] = value

    @property
    def queue_num(self) -> int:
        return 1

    def open(self, loop: DeviceLoop) -> None:
        self._loop = loop

    def close(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
        self._unplug()

    def on_features(self, features: int) -> None:
        if self._wire is not None:
            self._wire.accept(features)

    def on_config_write(self, offset: int, data: bytes) -> None:
        """Every field is the device's (section 5.1.4)."""

    def on_queue(self, queue: Queue) -> None:
        if queue.index == RX:
            self._receive()
        else:
            self._transmit(queue)

    def on_stop(self, queue: Queue) -> None:
        if queue.index == RX:
            self._frame = None
            self._watch(False)

    # -- wire to driver --------------------------------------------------------------------

    def _receive(self) -> None:
        """What the wire has, for at most a turn; the wire is watched while the driver has buffers."""
        wire, queues = self._wire, self.queues
        if wire is None:
            return
        try:
            self._watch(bool(queues) and self._deliver(queues[RX], wire))
        except Gone as gone:
            self._lose(gone)
        if queues:
            queues[RX].notify()

    def _watch(self, wanted: bool) -> None:
        if self._wire is None:
            return
        if wanted:
            self._loop.add_reader(self._wire.fileno(), self._receive)
        else:
            self._loop.remove_reader(self._wire.fileno())

    def _deliver(self, queue: Queue, wire: Wire) -> bool:
        """Fill the driver's buffers; false when there are no more of them."""
        for _ in range(TURN):
            frame = self._frame or wire.receive()
            if frame is None:
                return True
            self._frame = None
            if not self._admits(frame):
                continue
            chain = queue.pop()
            if chain is None:
                self._frame = frame
                return False
            self._fill(chain, frame)
        return True

    def _admits(self, frame: memoryview) -> bool:
        """Complete the header; false for what this driver must not get (section 5.1.6.4.1).

        A TAP interface may still have frames that it took in for another one.
        """
        flags, gso, accepted = frame[0], frame[1], self.driver_features
        if gso and not accepted & GSO.get(gso, 0):
            return self._drop("a segment that the driver cannot take")
        if not accepted & F_GUEST_CSUM:
            if flags & HDR_F_NEEDS_CSUM:
                return self._drop("a frame whose checksum the driver cannot complete")
            frame[0] = 0
        frame[NUM_BUFFERS] = ONE_BUFFER
        return True

    def _fill(self, chain: Chain, frame: memoryview) -> None:
        """One frame into one chain; a chain that is too small goes back empty, which drivers count."""
        if len(frame) > chain.writable:
            self._drop("a frame longer than the driver's buffer")
        else:
            chain.write(frame)
        chain.push()

    # -- driver to wire --------------------------------------------------------------------

    def _transmit(self, queue: Queue) -> None:
        """What the driver has sent, for at most one round of the queue, as far as the wire takes it."""
        for _ in range(queue.size):
            if self._blocked or (chain := queue.pop()) is None:
                break
            self._send(chain)
            chain.push()
        else:
            queue.again = True
        queue.notify()

    @property
    def _blocked(self) -> bool:
        return self._wire is not None and self._wire.full

    def _send(self, chain: Chain) -> None:
        """One frame, or none: nobody is told when a network loses one."""
        wire = self._wire
        if not LEAST <= chain.readable <= MOST:
            self._drop("a frame of the driver's that is too short or too long")
        elif wire is not None:
            try:
                wire.send(chain.read())
            except Gone as gone:
                self._lose(gone)
            except OSError as error:
                self._drop(f"a frame of the driver's: {error.strerror}")
            else:
                if wire.full:
                    self._loop.add_writer(wire.fileno(), self._flush)

    def _flush(self) -> None:
        wire = self._wire
        assert wire is not None
        try:
            wire.flush()
        except Gone as gone:
            self._lose(gone)
            return
        if not wire.full:
            self._loop.remove_writer(wire.fileno())
            self._resume()

    def _drop(self, what: str) -> bool:
        self.dropped += 1
        log.once(("net", what), f"net: dropped {what}")
        return False

    # -- the link ----------------------------------------------------------------------------

    def _resume(self) -> None:
        for queue in self.queues:
            if queue.running:
                self.on_queue(queue)

    def _unplug(self) -> bool:
        """Let go of the wire; whether it may come back."""
        wire, self._wire, self._frame = self._wire, None, None
        if wire is None:
            return False
        self._loop.remove_reader(wire.fileno())
        self._loop.remove_writer(wire.fileno())
        wire.close()
        return wire.returns

    def _lose(self, gone: Gone) -> None:
        log.warn(f"net: {gone}; the link is down")
        if self._unplug():
            self._retry = self._loop.call_later(RETRY_SECONDS, self._plug)
        self._set_link(0)
        self._loop.call_later(0, self._resume)  # what the driver sent meanwhile goes nowhere

    def _plug(self) -> None:
        try:
            self._wire = self._connect()
        except ConfigError:
            self._retry = self._loop.call_later(RETRY_SECONDS, self._plug)
            return
        log.warn("net: the link is up again")
        self._set_link(S_LINK_UP)
        self._resume()

    def _set_link(self, status: int) -> None:
        self.config["status"] = status
        self.config_changed()


def make(arguments: argparse.Namespace) -> Net:
    """The device for the command line; ConfigError when it makes no sense."""
    if bool(arguments.tap) == bool(arguments.stream):
        raise ConfigError("one of --tap and --stream must be given")
    mac, mtu = (_converted(arguments, name) for name in ("mac", "mtu"))
    return Net(lambda: plug(arguments.tap, arguments.stream), mac=mac or b"", mtu=mtu or 0)


def _converted(arguments: argparse.Namespace, name: str) -> Any:
    """The value of an option that has a converter of the same name; None when it was not given."""
    text = getattr(arguments, name)
    try:
        return getattr(options, name)(text) if text else None
    except ValueError as error:
        raise ConfigError(f"--{name} {text}: {error}") from None


if __name__ == "__main__":
    from .program import main

    main(
        "net",
        make,
        [
            ("--tap", "", "a TAP interface, made if there is none"),
            ("--stream", "", "a Unix socket of passt, or of another end of QEMU's -netdev stream"),
            ("--mac", "", "the card's address; without, the driver makes one up"),
            ("--mtu", "", "the largest packet that the driver may send"),
        ],
    )
