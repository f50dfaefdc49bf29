"""What a virtio device written in Python is: a subclass of `Device`.

It owns the contract between a device and whatever serves it.  It must not know sockets,
messages or rings.
"""

from __future__ import annotations

from .config import ConfigSpace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from .connection import Connection
    from .faulty import Hit
    from .loop import DeviceLoop
    from .queue import Queue


class Device:
    """Base of all devices; only `on_queue` must be written.  Sections are those of virtio 1.3.

    `device_id` is the number of section 5, `features` the bits that the device kind defines
    there (0-23 and 50-63; the transport's bits are added by themselves), `queue_sizes` the
    largest size of each virtqueue in entries (section 2.6), `config` the configuration space
    (section 2.5), `shared_memory` the size of each shared memory region in bytes by its id
    (section 2.10; `SharedMemory` maps files there).  `driver_features` are what the driver accepted.

    While `inflight` is true, chains in hand are noted where they outlive the process, if the
    frontend agrees: whoever serves the device next gets them again, before new ones and in
    their order.  That is at least once, not exactly once: a device whose work must not be done
    twice says False, and then what it held when it was killed is lost to the driver.

    All methods are called in the serving thread.  An exception from one is taken for a bug in
    the device and ends the serving.  A RemoteProtocolError is a peer's fault, such as the BackendLost of
    a frontend that does not answer `SharedMemory`: from `on_queue` or `on_stop` it costs the connection.
    """

    device_id = 0
    features = 0
    queue_sizes: tuple[int, ...] = (256,)
    shared_memory: Mapping[int, int] = {}
    inflight = True
    connection_class: type[Connection] | None = None  # one that does more with messages
    threaded = False  # True: `on_start` runs its own thread, which alone touches ring and kick

    def __init__(self) -> None:
        self.config = ConfigSpace()
        self.driver_features = 0
        self.connection: Connection | None = None

    @property
    def queues(self) -> tuple[Queue, ...]:
        """The virtqueues (section 2.6) in their order, while a frontend is connected; else none."""
        return self.connection.queues if self.connection is not None else ()

    @property
    def queue_num(self) -> int:
        """What GET_QUEUE_NUM tells: the number of queues, or of pairs for network devices, as QEMU has it."""
        return len(self.queue_sizes)

    # -- life ----------------------------------------------------------------------------

    def open(self, loop: DeviceLoop) -> None:
        """Serving begins; `loop` watches the device's own descriptors until `close`."""

    def close(self) -> None:
        """Serving ends; release everything and remove own descriptors from the loop."""

    def on_connect(self) -> None:
        """A frontend has connected."""

    def on_disconnect(self) -> None:
        """The frontend is gone; every queue that ran has been stopped before."""

    # -- driver --------------------------------------------------------------------------

    def offer(self, features: int) -> int:
        """What a frontend is offered of `features`, the device's bits and the transport's (section 2.2)."""
        return features

    def on_features(self, features: int) -> None:
        """The driver accepted `features` (section 2.2), which are also in `driver_features`."""

    def on_start(self, queue: Queue) -> None:
        """`queue` begins to run ("Ring states" in QEMU's docs/interop/vhost-user.rst).

        Anew when it is `fresh`, else it goes on from before a pause.

        A `threaded` device is asked to stop and start again when an eventfd or memory changes, and to
        stop for as long as the queue is disabled.
        """

    def on_queue(self, queue: Queue) -> None:
        """The driver may have made chains available in `queue` (section 2.9)."""
        raise TypeError(f"{type(self).__name__} has no on_queue")

    def on_stop(self, queue: Queue) -> None:
        """`queue` is about to end ("Ring states" in vhost-user.rst).

        Last chance to push, or to `rewind`, the chains in hand, and to take what is still available,
        although the queue may be disabled already.
        """

    def on_reset(self) -> None:
        """The frontend reset the device (section 2.4; RESET_DEVICE); all queues are stopped."""

    def on_config_read(self, offset: int, size: int) -> bytes:
        """Give `size` bytes of the configuration space (section 2.5) from the byte `offset`."""
        return self.config.read(offset, size)

    def on_config_write(self, offset: int, data: bytes) -> None:
        """The driver writes `data` at the byte `offset` of the configuration space (section 2.5)."""
        self.config.write(offset, data)

    def on_fault(self, hit: Hit) -> None:
        """`Faults` has the device misbehave now: what its driver sees is not what it did."""

    # -- state -----------------------------------------------------------------------------

    def save_state(self) -> bytes:
        """What another instance needs to go on where this one is; all queues are stopped.

        Rings are not part of it.  A device without this method is not asked ("Migrating back-end state"
        in vhost-user.rst, DEVICE_STATE).
        """
        raise TypeError(f"{type(self).__name__} has no save_state")

    def load_state(self, data: bytes) -> None:
        """Go on where the instance was that saved `data`; ValueError when it makes no sense."""
        raise TypeError(f"{type(self).__name__} has no load_state")

    # -- device to driver ------------------------------------------------------------------

    def config_changed(self) -> None:
        """Tell the driver that the configuration space changed, if anybody listens (section 3.2.1)."""
        if self.connection is not None:
            self.connection.send_config_change()


def config_bytes(device: Device, offset: int, size: int) -> bytes:
    """What `on_config_read` gives; ValueError when that is not what was asked for: a bug in the device."""
    data = device.on_config_read(offset, size)
    if len(data) != size:
        raise ValueError(f"{type(device).__name__}.on_config_read gave {len(data)} bytes, not {size}")
    return data
