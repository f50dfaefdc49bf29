"""The order of messages that starts and stops a device's rings; the same after a loss.

Functions over a `Client`: they keep nothing.  They own which message follows which, the order that
QEMU, rust-vmm, libvhost-user, DPDK and SPDK agree on.  What to start comes in as a `Wanted`;
they must not know why it is started, nor what happens when a message fails.
"""

from __future__ import annotations

import os

from ..errors import RemoteProtocolError
from ..record import Record
from .messages import F_PROTOCOL_FEATURES
from .payloads import U64, VringAddr, VringFile, VringState

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..virtio.queue import QueueSetup
    from .client import Client
    from .inflight import InflightBuffer
    from .memory import MemoryTable


class Wanted(Record):
    """What the driver wants of the device: the features it accepted, the queues it enabled."""

    features: int
    queues: tuple[QueueSetup, ...]

    def with_call(self, index: int, fd: int | None) -> Wanted:
        """The same with the interrupts of queue `index` going to `fd`."""
        return self.replace(queues=tuple(q.replace(call=fd) if q.index == index else q for q in self.queues))


def start(
    client: Client, memory: MemoryTable, wanted: Wanted, bases: Sequence[int], inflight: InflightBuffer
) -> None:
    """Start every ring of `wanted`, each at its available index in `bases`.

    Returns when the backend has carried out everything.
    """
    call = client.call
    protocol = (client.negotiation.virtio_offered or 0) & F_PROTOCOL_FEATURES
    # without bit 30 a backend enables all rings by itself and refuses SET_VRING_ENABLE
    call("SET_FEATURES", U64(wanted.features | protocol))
    call("SET_MEM_TABLE", memory.payload, memory.fds)
    for queue in wanted.queues:  # all sizes first: SPDK wants to know how many queues there are
        call("SET_VRING_NUM", VringState(queue.index, queue.size))
    inflight.share(client)
    for queue, base in zip(wanted.queues, bases, strict=True):
        _start_ring(client, memory, queue, base)
    if protocol:
        for queue in wanted.queues:
            call("SET_VRING_ENABLE", VringState(queue.index, 1))
    client.barrier()


def _start_ring(client: Client, memory: MemoryTable, queue: QueueSetup, base: int) -> None:
    address = memory.user_address
    parts = VringAddr(queue.index, 0, address(queue.desc), address(queue.used), address(queue.avail), 0)
    client.call("SET_VRING_BASE", VringState(queue.index, base))
    client.call("SET_VRING_ADDR", parts)
    # GET_VRING_BASE made the backend forget both descriptors, so they are sent at each start;
    # the kick is last because it starts the ring
    send_fd(client, "SET_VRING_CALL", queue.index, queue.call)
    send_fd(client, "SET_VRING_KICK", queue.index, queue.kick)


def stop(client: Client, queues: Sequence[QueueSetup]) -> None:
    """Stop these rings; the backend touches guest memory no more afterwards."""
    if client.negotiation.virtio_acked & F_PROTOCOL_FEATURES:
        for queue in queues:
            client.call("SET_VRING_ENABLE", VringState(queue.index, 0))
    for queue in queues:
        base = client.ask("GET_VRING_BASE", VringState(queue.index, 0), VringState)
        if base.index != queue.index:
            raise RemoteProtocolError(
                f"GET_VRING_BASE of ring {queue.index} was answered for ring {base.index}"
            )


def wake(queues: Sequence[QueueSetup]) -> None:
    """Make up for notifications that went to a backend that is gone, or were never sent by it.

    Backend and driver look at their rings again, and find nothing there at worst.
    """
    for fd in (fd for queue in queues for fd in (queue.kick, queue.call) if fd is not None):
        try:
            os.eventfd_write(fd, 1)
        except BlockingIOError:
            continue  # the counter is full: whoever reads it has plenty to wake up for


def send_fd(client: Client, name: str, index: int, fd: int | None) -> None:
    """Send an eventfd of ring `index`, or that it has none."""
    client.call(name, VringFile(index, fd is not None), () if fd is None else (fd,))
