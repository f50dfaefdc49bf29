"""A vhost-user proxy: any frontend on one side, any backend on the other, faults in between.

    python -m pyvmm.backend.proxy --socket-path S --to BACKEND_SOCKET --faults drop=0.01,seed=7

Messages and their descriptors are passed on, with what `CHANGES` and `ANSWERS` say.  Each virtqueue
gets rings of the proxy's own (`shadow`) towards the backend; buffers stay where they are.  It owns the
connection to the backend and those rings.  To the faults it is a device like any other; it must
not know what the backend does.

What cannot work with rings in between is not offered: packed rings, in-order use, dirty logging,
in-flight buffers, IOMMUs, postcopy, doorbell pages, shared objects.
"""

from __future__ import annotations

from _socket import AF_UNIX, SOCK_STREAM, socket

from .. import eventfd, log
from ..errors import LocalProtocolError, RemoteProtocolError
from ..vhost_user.channel import Channel
from ..vhost_user.client import Client, Refusal
from ..vhost_user.messages import ProtocolFeature
from ..vhost_user.payloads import (
    U64,
    Config,
    MemRegion,
    MemTable,
    SingleRegion,
    VringAddr,
    VringFile,
    VringState,
)
from .connection import HANDLERS, SECONDS, Connection
from .device import Device
from .queue import signal_eventfd
from .relay import Relay
from .running import F_EVENT_IDX, Refused
from .shadow import BYTES, GUEST_ADDRESS, MAX_SIZE, QUEUES, USER_ADDRESS, ShadowMemory, ShadowRing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from .._native.vring import Chain
    from ..vhost_user.codec import Message
    from ..vhost_user.payloads import Payload
    from ..vhost_user.recording import Recorder
    from .faulty import Hit
    from .loop import DeviceLoop
    from .queue import Queue

    Sent = tuple[Payload, Sequence[int]]

# virtio features that need what the proxy does not do: LOG_ALL, IOMMU_PLATFORM, PACKED, IN_ORDER
HIDDEN = 1 << 26 | 1 << 33 | 1 << 34 | 1 << 35
PASSED = (
    ProtocolFeature.MQ
    | ProtocolFeature.RARP
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.NET_MTU
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CRYPTO_SESSION
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_SEND_FD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.DEVICE_STATE
    | ProtocolFeature.SHMEM
)
SHADOW = (GUEST_ADDRESS, BYTES, USER_ADDRESS, 0)


class Behind(Client):
    """The connection to the backend."""

    def pass_on(self, name: str, payload: Payload, fds: Sequence[int]) -> tuple[Payload, list[int]]:
        """Send a request with its descriptors; the answer and those that came with it."""
        reply, message = self._exchange(name, payload, fds)
        return reply, message.take_fds() if message is not None else []


class ProxyConnection(Connection):
    """One frontend's dialogue, had with the backend as well."""

    device: Proxy

    def __init__(self, device: Proxy, sock: socket, loop: DeviceLoop, on_end: Callable[[str], None]) -> None:
        self.shadow = ShadowMemory()
        self.rings: dict[int, ShadowRing] = {}
        self.offered = 0  # by the backend
        self._shared = False  # whether the backend has the shadow rings' memory
        self._relay: Relay | None = None
        self.behind: Behind | None = None
        super().__init__(device, sock, loop, on_end)
        self.agreed.virtio_offered = self.agreed.protocol_offered = None  # the backend's to say
        try:
            self.behind = self._connected(device.to)
        except OSError as error:
            log.warn(f"proxy: {device.to}: {error.strerror or error}")
            loop.call_later(0, self.hang_up)

    def _connected(self, path: str) -> Behind:
        sock = socket(AF_UNIX, SOCK_STREAM)
        try:
            sock.setblocking(False)  # one that has too many clients already is not waited for
            sock.connect(path)
        except BaseException:
            sock.close()
            raise
        behind = Behind(Channel(sock), SECONDS)
        behind.negotiation.lenient = True  # what the backend takes is its own affair
        if self.device.recorder is not None:
            behind.observe = self.device.recorder.exchange
        self.loop.add_reader(behind.channel.fileno(), self._on_lost)
        return behind

    def _on_lost(self) -> None:
        """The backend closed the connection, or speaks though nobody asked."""
        self.hang_up("the backend is gone, or speaks out of turn")

    def _release(self) -> None:
        self._end_relay()
        super()._release()
        if self.behind is not None:
            self.loop.remove_reader(self.behind.channel.fileno())
            self.behind.close()
        for ring in self.rings.values():
            ring.close()
        self.shadow.close()

    def _end_relay(self) -> None:
        if self._relay is not None:
            if self._backend_channel is not None:
                self._backend_channel.shutdown()  # where it may wait for the frontend
            self._relay.close()

    def ring(self, index: int) -> ShadowRing:
        """The shadow ring of a virtqueue."""
        if index not in self.rings:
            self._queue(index)  # an index that there cannot be ends the connection
            self.rings[index] = ShadowRing(self.shadow, index)
        return self.rings[index]

    # -- passing on --------------------------------------------------------------------------

    def _handler(self, message: Message) -> Callable[..., Payload | None] | None:
        return ProxyConnection.through if message.request.known else None

    def through(self, payload: Payload, message: Message) -> Payload | None:
        """Ask the backend, then take notice; its answer, changed where the proxy must."""
        name = message.request.name
        change, answer = CHANGES.get(name), ANSWERS.get(name)
        reply = self.ask_behind(
            name, *(change(self, payload, message.fds) if change else (payload, message.fds))
        )
        if name in NOTICED:
            HANDLERS[message.request.id](self, payload, message)
        if not message.request.reply:
            return None
        return answer(self, reply) if answer else reply

    def ask_behind(self, name: str, payload: Payload, fds: Sequence[int] = ()) -> Payload:
        """What the backend answers; descriptors that come with it go with our own answer."""
        if self.behind is None:
            raise RemoteProtocolError("there is no backend to ask")
        try:
            reply, came = self.behind.pass_on(name, payload, fds)
        except Refusal as refusal:
            raise Refused(str(refusal)) from None
        except (RemoteProtocolError, LocalProtocolError) as error:
            raise RemoteProtocolError(f"the backend: {error}") from None
        self._reply_fds += came
        return reply

    # -- what is changed on the way to the backend

    def _to_features(self, payload: U64, fds: Sequence[int]) -> Sent:
        # every change must be told, on both sides of the shadow rings
        return U64(payload.value & self.offered & ~F_EVENT_IDX), fds

    def _to_mem_table(self, payload: MemTable, fds: Sequence[int]) -> Sent:
        self._shared = True
        return MemTable((*payload.regions, MemRegion(*SHADOW))), [*fds, self.shadow.fd]

    def _to_mem_reg(self, payload: SingleRegion, fds: Sequence[int]) -> Sent:
        if not self._shared:
            self.ask_behind("ADD_MEM_REG", SingleRegion(*SHADOW), [self.shadow.fd])
            self._shared = True
        return payload, fds

    def _to_addresses(self, payload: VringAddr, fds: Sequence[int]) -> Sent:
        ring, queue = self.ring(payload.index), self._queue(payload.index)
        if queue.ring is None:
            ring.restart(queue.base)
        return VringAddr(payload.index, 0, payload.desc, ring.used_address, ring.avail_address, 0), fds

    def _to_base(self, payload: VringState, fds: Sequence[int]) -> Sent:
        self.ring(payload.index).restart(payload.num)
        return payload, fds

    def _to_kick(self, payload: VringFile, fds: Sequence[int]) -> Sent:
        return VringFile(payload.index, True), [self.ring(payload.index).kick_fd]

    def _to_call(self, payload: VringFile, fds: Sequence[int]) -> Sent:
        return VringFile(payload.index, True), [self.ring(payload.index).call_fd]

    def _to_requests(self, payload: Payload, fds: Sequence[int]) -> Sent:
        self._end_relay()
        assert self.behind is not None
        self._relay = Relay(self, self.behind.negotiation, self.device.recorder)
        return payload, [self._relay.theirs.fileno()]

    # -- what is changed on the way back

    def _of_features(self, reply: Payload) -> Payload:
        assert isinstance(reply, U64)
        self.offered = reply.value & ~HIDDEN
        return U64(self.device.offer(self.offered | F_EVENT_IDX))

    def _of_protocol(self, reply: Payload) -> Payload:
        assert isinstance(reply, U64)
        return U64(reply.value & PASSED)

    def _of_count(self, reply: Payload) -> Payload:
        assert isinstance(reply, U64)
        return U64(min(reply.value, QUEUES))

    def _of_slots(self, reply: Payload) -> Payload:
        assert isinstance(reply, U64)
        return U64(max(reply.value - 1, 0))  # one is for the shadow rings

    def _of_config(self, reply: Payload) -> Payload:
        if not isinstance(reply, Config):
            return reply
        self.device.answer = reply.data
        return Config(reply.offset, reply.flags, self.device.on_config_read(reply.offset, len(reply.data)))


CHANGES: dict[str, Callable[[ProxyConnection, Any, Sequence[int]], Sent]] = {
    "SET_FEATURES": ProxyConnection._to_features,
    "SET_MEM_TABLE": ProxyConnection._to_mem_table,
    "ADD_MEM_REG": ProxyConnection._to_mem_reg,
    "SET_VRING_ADDR": ProxyConnection._to_addresses,
    "SET_VRING_BASE": ProxyConnection._to_base,
    "SET_VRING_KICK": ProxyConnection._to_kick,
    "SET_VRING_CALL": ProxyConnection._to_call,
    "SET_BACKEND_REQ_FD": ProxyConnection._to_requests,
}
ANSWERS: dict[str, Callable[[ProxyConnection, Payload], Payload]] = {
    "GET_FEATURES": ProxyConnection._of_features,
    "GET_PROTOCOL_FEATURES": ProxyConnection._of_protocol,
    "GET_QUEUE_NUM": ProxyConnection._of_count,
    "GET_MAX_MEM_SLOTS": ProxyConnection._of_slots,
    "GET_CONFIG": ProxyConnection._of_config,
}
# What the driver's side of the rings must know, too
NOTICED = {
    *("SET_FEATURES", "RESET_OWNER", "RESET_DEVICE", "SET_BACKEND_REQ_FD"),
    *("SET_MEM_TABLE", "ADD_MEM_REG", "REM_MEM_REG"),
    *("SET_VRING_NUM", "SET_VRING_ADDR", "SET_VRING_BASE", "GET_VRING_BASE", "SET_VRING_ENABLE"),
    *("SET_VRING_KICK", "SET_VRING_CALL", "SET_VRING_ERR"),
}


class Proxy(Device):
    """Stands for the backend at the socket `to`; `record` is a file for what is said and used."""

    queue_sizes = (MAX_SIZE,) * QUEUES
    connection_class = ProxyConnection

    def __init__(self, to: str, record: str = "") -> None:
        super().__init__()
        self.to = to
        self.answer = b""  # of the configuration space, the last
        self.recorder: Recorder | None = None
        self._chains: dict[tuple[int, int], Chain] = {}
        if record:
            from ..vhost_user.recording import Recorder

            self.recorder = Recorder(record)

    def close(self) -> None:
        if self.recorder is not None:
            self.recorder.close()

    def on_connect(self) -> None:
        if self.recorder is not None:
            self.recorder.add("connect")

    def on_fault(self, hit: Hit) -> None:
        if self.recorder is not None:
            about = {"message": hit.fault, "number": hit.number, "detail": hit.detail}
            self.recorder.add("fault", queue=hit.queue, head=hit.head, **about)

    def on_config_read(self, offset: int, size: int) -> bytes:
        return self.answer

    def on_start(self, queue: Queue) -> None:
        connection = self._proxied()
        connection.loop.add_reader(connection.ring(queue.index).call_fd, lambda: self._on_call(queue))

    def on_queue(self, queue: Queue) -> None:
        ring = self._proxied().ring(queue.index)
        for chain in queue:
            queue.keep(chain)
            self._chains[queue.index, chain.head] = chain
            self._record_chain(queue, chain)
            ring.put(chain.head, queue.size)
        signal_eventfd(ring.kick_fd)

    def on_stop(self, queue: Queue) -> None:
        connection = self._proxied()
        connection.loop.remove_reader(connection.ring(queue.index).call_fd)
        try:
            self._collect(queue)
        finally:
            self._chains = {key: chain for key, chain in self._chains.items() if key[0] != queue.index}

    def _proxied(self) -> ProxyConnection:
        assert isinstance(self.connection, ProxyConnection)
        return self.connection

    def _on_call(self, queue: Queue) -> None:
        connection = self._proxied()
        eventfd.drain(connection.ring(queue.index).call_fd)
        try:
            self._collect(queue)
        except RemoteProtocolError as error:
            connection.hang_up(f"the backend: {error}")

    def _collect(self, queue: Queue) -> None:
        """Give the driver what the backend has given back."""
        for head, length in self._proxied().ring(queue.index).taken(queue.size):
            chain = self._chains.pop((queue.index, head), None)
            if chain is None:
                raise RemoteProtocolError(f"virtqueue {queue.index}: the backend does not have chain {head}")
            if self.recorder is not None:
                self.recorder.add("used", queue=queue.index, head=head, length=length)
            self._give_back(queue, chain, length)
        queue.notify()

    def _give_back(self, queue: Queue, chain: Chain, length: int) -> None:
        assert queue.ring is not None
        if length <= chain.writable:  # which is all its room: the proxy writes nothing
            chain.push(length)
        else:
            queue.ring.use(chain.head, length, chain.slots)  # the backend's lie, for the driver to see

    def _record_chain(self, queue: Queue, chain: Chain) -> None:
        if self.recorder is not None:
            sizes = {
                "readable": [len(view) for view in chain.readable_views()],
                "writable": [len(view) for view in chain.writable_views()],
            }
            self.recorder.add("chain", queue=queue.index, head=chain.head, **sizes)


if __name__ == "__main__":
    from .program import main

    main(
        "proxy",
        lambda options: Proxy(options.to, options.record),
        [
            ("--to", None, "the socket of the backend behind"),
            ("--record", "", "file for what is said and used"),
        ],
    )
