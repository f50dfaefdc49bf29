"""The order of messages that starts and stops a device's rings; the same after a loss.

Functions over a `Client`: they keep nothing.  They own which message follows which, the order that
QEMU, rust-vmm, libvhost-user, DPDK and SPDK agree on.  What to start comes in as a `Wanted`;
they must not know why it is started, nor what happens when a message fails.
"""

from __future__ import annotations

from ..errors import RemoteProtocolError
from ..eventfd import signal
from ..record import Record
from ..virtio import spec
from .messages import F_PROTOCOL_FEATURES, ProtocolFeature
from .payloads import U64, Empty, SingleRegion, VringAddr, VringFile, VringState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..virtio.queue import QueueSetup
    from .client import Client
    from .inflight import InflightBuffer
    from .memory import MemoryTable


# What QEMU tells backends of the driver's progress; a driver that is not there yet is not shown.
AGREED = spec.ACKNOWLEDGE | spec.DRIVER | spec.FEATURES_OK
RUNNING = AGREED | spec.DRIVER_OK
PACKED_BASE = 0x8000_8000  # both indices are 0, both wrap counters 1 (virtio 1.3, 2.8.1)


class Wanted(Record):
    """What the driver wants of the device: the features it accepted, the queues it enabled."""

    features: int
    queues: tuple[QueueSetup, ...]

    @property
    def packed(self) -> bool:
        """Whether the rings are packed; else they are split."""
        return bool(self.features & spec.F_RING_PACKED)

    @property
    def first_bases(self) -> list[int]:
        """Where each ring of a device begins that was reset."""
        return [PACKED_BASE if self.packed else 0] * len(self.queues)

    def with_call(self, index: int, fd: int | None) -> Wanted:
        """The same with the interrupts of queue `index` going to `fd`."""
        return self.replace(queues=tuple(q.replace(call=fd) if q.index == index else q for q in self.queues))


def start(
    client: Client, memory: MemoryTable, wanted: Wanted, bases: Sequence[int], inflight: InflightBuffer
) -> None:
    """Start every ring of `wanted`, each at its base in `bases`: of split rings the available index.

    Returns when the backend has carried out everything.
    """
    call = client.call
    protocol = (client.negotiation.virtio_offered or 0) & F_PROTOCOL_FEATURES
    # without bit 30 a backend enables all rings by itself and refuses SET_VRING_ENABLE
    client.started, client.running = True, tuple(zip(wanted.queues, bases, strict=True))
    call("SET_FEATURES", U64(wanted.features | protocol))
    _agree(client)
    _share_memory(client, memory)
    for queue in wanted.queues:  # all sizes first: SPDK wants to know how many queues there are
        call("SET_VRING_NUM", VringState(queue.index, queue.size))
    if not wanted.packed:  # nobody goes on with those after a loss
        inflight.share(client)
    for queue, base in client.running:
        _start_ring(client, memory, queue, base)
    if protocol:
        for queue in wanted.queues:
            call("SET_VRING_ENABLE", VringState(queue.index, 1))
    client.barrier()
    _set_status(client, RUNNING)


def _agree(client: Client) -> None:
    """Tell a backend that wants to know that the driver has chosen, and see whether that is all right."""
    _set_status(client, AGREED)
    if client.negotiation.has(ProtocolFeature.STATUS):
        status = client.ask("GET_STATUS", Empty(), U64).value
        if not status & spec.FEATURES_OK:
            raise RemoteProtocolError(f"the backend refuses the driver's features (status {status:#x})")


def _set_status(client: Client, status: int) -> None:
    if client.negotiation.has(ProtocolFeature.STATUS):
        client.call("SET_STATUS", U64(status))


def _share_memory(client: Client, memory: MemoryTable) -> None:
    """Give the backend guest RAM: with memory slots what has changed since it was told, else all of it."""
    if not client.negotiation.has(ProtocolFeature.CONFIGURE_MEM_SLOTS):
        client.call("SET_MEM_TABLE", memory.payload, memory.fds)
        return
    known, client.regions = client.regions, memory.payload.regions
    for region in known:
        if region not in client.regions:
            client.call("REM_MEM_REG", SingleRegion(**region._asdict()))
    for region, fd in zip(client.regions, memory.fds, strict=True):
        if region not in known:
            client.call("ADD_MEM_REG", SingleRegion(**region._asdict()), (fd,))


def _start_ring(client: Client, memory: MemoryTable, queue: QueueSetup, base: int) -> None:
    address = memory.user_address
    parts = VringAddr(queue.index, 0, address(queue.desc), address(queue.used), address(queue.avail), 0)
    client.call("SET_VRING_BASE", VringState(queue.index, base))
    client.call("SET_VRING_ADDR", parts)
    # GET_VRING_BASE made the backend forget both descriptors, so they are sent at each start;
    # the kick is last because it starts the ring
    send_fd(client, "SET_VRING_CALL", queue.index, queue.call)
    send_fd(client, "SET_VRING_KICK", queue.index, queue.kick)


def stop(client: Client) -> None:
    """Stop every ring and reset the device; the backend touches guest memory no more afterwards."""
    if not client.started:
        return
    queues = [queue for queue, _ in client.running]
    client.started, client.running = False, ()
    if client.negotiation.virtio_acked & F_PROTOCOL_FEATURES:
        for queue in queues:
            client.call("SET_VRING_ENABLE", VringState(queue.index, 0))
    for queue in queues:
        base = client.ask("GET_VRING_BASE", VringState(queue.index, 0), VringState)
        if base.index != queue.index:
            raise RemoteProtocolError(
                f"GET_VRING_BASE of ring {queue.index} was answered for ring {base.index}"
            )
    if client.negotiation.has(ProtocolFeature.RESET_DEVICE):
        client.call("RESET_DEVICE")  # rust-vmm forgets the features then: they are sent at each start
    _set_status(client, 0)


def wake(queues: Sequence[QueueSetup]) -> None:
    """Make up for notifications that went to a backend that is gone, or were never sent by it.

    Backend and driver look at their rings again, and find nothing there at worst.
    """
    for fd in (fd for queue in queues for fd in (queue.kick, queue.call) if fd is not None):
        signal(fd)


def send_fd(client: Client, name: str, index: int, fd: int | None) -> None:
    """Send an eventfd of ring `index`, or that it has none."""
    client.call(name, VringFile(index, fd is not None), () if fd is None else (fd,))
