"""One vhost-user connection, seen from the backend: messages in, device calls out.

It owns the dialogue with one frontend and what was negotiated.  Every
request that we serve is a method named like its row in `FRONTEND_REQUESTS`; rows decide the
payload, the reply, the ack and what must have been negotiated.  It must not know what the
device does, how queues run (`running`), nor where the connection came from (`server`).

What the frontend cannot have done right ends the connection (`RemoteProtocolError`).
What a guest may have caused is `Refused`: a non-zero ack, and the connection lives.
"""

from __future__ import annotations

import os
from _socket import socket
from time import monotonic

from .. import eventfd, log
from ..errors import BackendLost, LocalProtocolError, RemoteProtocolError
from ..vhost_user.channel import Channel
from ..vhost_user.codec import encode_request
from ..vhost_user.messages import (
    BACKEND_REQUESTS,
    F_PROTOCOL_FEATURES,
    FRONTEND_REQUESTS,
    ProtocolFeature,
)
from ..vhost_user.payloads import SHMEM_REGIONS, U64, Config, Empty, ShmemConfig, VringState
from ..vhost_user.session import Negotiation, Requester, Responder
from .device import Device, config_bytes
from .inflight import create
from .memory import MAX_SLOTS
from .queue import Queue, close_fd
from .running import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED, Refused, RunningQueues
from .state import FAILED, LOAD, PHASE_STOPPED, SAVE, USE_YOURS, Transfer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..vhost_user.codec import Message
    from ..vhost_user.payloads import (
        DeviceState,
        Inflight,
        MemTable,
        Payload,
        SingleRegion,
        VringAddr,
        VringFile,
    )
    from .loop import DeviceLoop

F_VERSION_1 = 1 << 32
TRANSPORT_FEATURES = F_INDIRECT_DESC | F_EVENT_IDX | F_PROTOCOL_FEATURES | F_VERSION_1 | F_RING_PACKED
WITH_MEMORY = ProtocolFeature.SHMEM | ProtocolFeature.BACKEND_SEND_FD
PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.DEVICE_STATE
    | WITH_MEMORY
)
SECONDS = 10.0  # how long the frontend may take to answer
MESSAGES_A_TURN = 64  # a flood of messages must not keep the queues from their turn


class Connection:
    """Serves `device` to the frontend behind `sock` until either end closes."""

    def __init__(self, device: Device, sock: socket, loop: DeviceLoop, on_end: Callable[[str], None]) -> None:
        self.device = device
        self.loop = loop
        self.agreed = Negotiation(
            device.offer(device.features | TRANSPORT_FEATURES), protocol_features(device)
        )
        self.agreed.lenient = True
        self._running = RunningQueues(device, loop, lambda: self.agreed.virtio_acked, self.hang_up)
        self.queues = self._running.queues
        self._on_end = on_end
        self._channel = Channel(sock)
        self._responder = Responder(FRONTEND_REQUESTS, self.agreed, os.close)
        self._reply_fds: list[int] = []  # what goes with the answer to the request in hand
        self._transfer: Transfer | None = None
        self._backend_channel: Channel | None = None
        self.closed = False
        device.connection = self
        loop.add_reader(self._channel.fileno(), self._on_readable)
        device.on_connect()

    def close(self) -> None:
        """End the connection: every queue is stopped as if the frontend had asked for it."""
        if self.closed:
            return
        self.closed = True
        try:
            self._end_device()
        finally:
            self._release()

    def _end_device(self) -> None:
        try:
            self._running.stop_all()
        except RemoteProtocolError as error:
            log.warn(f"{type(self.device).__name__.lower()} backend: at the end of a connection: {error}")
        finally:
            self.device.on_disconnect()

    def _release(self) -> None:
        """Let go of everything, so that the frontend sees the end."""
        self.device.connection = None
        self.loop.remove_reader(self._channel.fileno())
        self._channel.close()
        self._responder.decoder.close()
        self._running.close()
        if self._backend_channel is not None:
            self._backend_channel.close()
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None

    def hang_up(self, reason: str = "") -> None:
        """End the connection from our side, with whatever the frontend makes of that."""
        if not self.closed:
            self.close()
            self._on_end(reason)

    def send_config_change(self) -> None:
        """CONFIG_CHANGE_MSG, when the frontend listens for it."""
        row = BACKEND_REQUESTS.by_name["CONFIG_CHANGE_MSG"]
        if self._backend_channel is None or not self.agreed.has(row.needs):
            return
        try:
            self._backend_channel.send(encode_request(row, Empty()))
        except BackendLost:
            return  # full of unread notifications, which say the same, or the frontend is gone

    def ask(self, name: str, payload: Payload, fds: Sequence[int] = ()) -> int:
        """Send a request of the backend's own and wait for the status; 0 where the frontend gives none.

        LocalProtocolError when it was not negotiated, BackendLost when there is no answer.
        """
        if self._backend_channel is None:
            raise LocalProtocolError(f"{name} before SET_BACKEND_REQ_FD")
        requester = Requester(BACKEND_REQUESTS, self.agreed, os.close)
        due = monotonic() + SECONDS
        self._backend_channel.send(requester.request(name, payload, len(fds)), fds, due)
        if requester.awaiting is None:
            return 0
        reply = requester.reply(self._backend_channel.receive(requester.decoder, due))
        return reply.value if isinstance(reply, U64) else 0

    # -- messages --------------------------------------------------------------------------

    def _on_readable(self) -> None:
        decoder = self._responder.decoder
        try:
            for _ in range(MESSAGES_A_TURN):
                message = self._channel.receive_now(decoder)
                if message is None:
                    return
                self._handle(message)
                if self.closed:
                    return  # the device hung up
        except RemoteProtocolError as error:
            # a frontend may go at any time between messages: nothing to report
            silent = isinstance(error, BackendLost) and decoder.idle
            self.hang_up("" if silent else str(error))

    def _handle(self, message: Message) -> None:
        try:
            self._responder.received(message)
            handler = self._handler(message)
            if handler is None:
                raise RemoteProtocolError(f"{message.request.name} is not served")
            data = self._outcome(handler, message)
            if not self.closed:
                self._channel.send(data, self._reply_fds)
        finally:
            message.close()
            while self._reply_fds:
                os.close(self._reply_fds.pop())

    def _handler(self, message: Message) -> Callable[..., Payload | None] | None:
        return HANDLERS.get(message.request.id)

    def _outcome(self, handler: Callable[..., Payload | None], message: Message) -> bytes:
        """Do what the message asks for; the answer's bytes, if one is due."""
        try:
            reply = handler(self, message.payload, message)
        except Refused as refusal:
            log.once(message.request.name, f"{message.request.name} refused: {refusal}")
            return self._responder.ack(1)
        if reply is None:
            return self._responder.ack()
        return self._responder.reply(reply, len(self._reply_fds))

    def _queue(self, index: int) -> Queue:
        if index >= len(self.queues):
            raise RemoteProtocolError(f"virtqueue {index} of {len(self.queues)}")
        return self.queues[index]

    # -- requests: one method a row, by its name -----------------------------------------

    def get_features(self, payload: Empty, message: Message) -> Payload:
        return U64(self.agreed.virtio_offered or 0)

    def set_features(self, payload: U64, message: Message) -> None:
        self.device.driver_features = payload.value & ~F_PROTOCOL_FEATURES
        self.device.on_features(self.device.driver_features)

    def set_owner(self, payload: Empty, message: Message) -> None:
        """Nothing to own: the connection says it all."""

    def reset_owner(self, payload: Empty, message: Message) -> None:
        """Deprecated; QEMU's documents let it stop all rings."""
        self._running.stop_all()

    def reset_device(self, payload: Empty, message: Message) -> None:
        self._running.stop_all()
        self.device.driver_features = self.agreed.virtio_acked = 0
        self.device.on_reset()

    def get_protocol_features(self, payload: Empty, message: Message) -> Payload:
        return U64(self.agreed.protocol_offered or 0)

    def set_protocol_features(self, payload: U64, message: Message) -> None:
        """The negotiation has kept them already."""

    def get_queue_num(self, payload: Empty, message: Message) -> Payload:
        return U64(self.device.queue_num)

    def set_backend_req_fd(self, payload: Empty, message: Message) -> None:
        if self._backend_channel is not None:
            self._backend_channel.close()
        self._backend_channel = channel_of(message.take_fds()[0])

    # -- memory

    def set_mem_table(self, payload: MemTable, message: Message) -> None:
        self._running.memory.replace(payload.regions, message.take_fds())
        self._running.moved()

    def add_mem_reg(self, payload: SingleRegion, message: Message) -> None:
        self._running.memory.add(payload, message.take_fds()[0])
        self._running.moved()

    def rem_mem_reg(self, payload: SingleRegion, message: Message) -> None:
        self._running.memory.remove(payload)
        self._running.moved()

    def get_max_mem_slots(self, payload: Empty, message: Message) -> Payload:
        return U64(MAX_SLOTS)

    # -- configuration space

    def get_config(self, payload: Config, message: Message) -> Payload:
        data = config_bytes(self.device, payload.offset, len(payload.data))
        return Config(payload.offset, payload.flags, data)

    def set_config(self, payload: Config, message: Message) -> None:
        # frontends disagree on what flags 1 means (migration, or writable): both write
        self.device.on_config_write(payload.offset, payload.data)

    # -- queues

    def set_vring_num(self, payload: VringState, message: Message) -> None:
        queue, size = self._queue(payload.index), payload.num
        split = not self.agreed.virtio_acked & F_RING_PACKED
        if not 0 < size <= queue.max_size or (split and size & (size - 1)):
            rule = "a power of two" if split else "any number"
            raise Refused(
                f"virtqueue {queue.index} of {size} entries; it takes {rule} up to {queue.max_size}"
            )
        queue.size = size

    def set_vring_addr(self, payload: VringAddr, message: Message) -> None:
        queue = self._queue(payload.index)
        self._running.set_addresses(queue, payload.desc, payload.avail, payload.used)

    def set_vring_base(self, payload: VringState, message: Message) -> None:
        self._queue(payload.index).base = payload.num  # the format decides what its bits mean

    def get_vring_base(self, payload: VringState, message: Message) -> Payload:
        queue = self._queue(payload.index)
        return VringState(queue.index, self._running.stop(queue))

    def set_vring_kick(self, payload: VringFile, message: Message) -> None:
        queue = self._queue(payload.index)
        if not self.agreed.virtio_acked & F_PROTOCOL_FEATURES:
            queue.enabled = True  # without the feature there is no SET_VRING_ENABLE to wait for
        self._running.set_kick(queue, taken_fd(message))

    def set_vring_call(self, payload: VringFile, message: Message) -> None:
        queue, fd = self._queue(payload.index), taken_fd(message)
        self._running.change(queue, lambda: queue.set_call(fd))

    def set_vring_err(self, payload: VringFile, message: Message) -> None:
        queue, fd = self._queue(payload.index), taken_fd(message)
        self._running.change(queue, lambda: queue.set_error(fd))

    def set_vring_enable(self, payload: VringState, message: Message) -> None:
        self._running.enable(self._queue(payload.index), bool(payload.num))

    def get_inflight_fd(self, payload: Inflight, message: Message) -> Payload:
        description, fd = create(payload.num_queues, payload.queue_size)
        self._reply_fds.append(fd)
        return description

    def set_inflight_fd(self, payload: Inflight, message: Message) -> None:
        self._running.track(payload, message.fds[0])

    # -- shared memory

    def get_shmem_config(self, payload: Empty, message: Message) -> Payload:
        sizes = self.device.shared_memory
        return ShmemConfig(len(sizes), tuple(sizes.get(shmid, 0) for shmid in range(SHMEM_REGIONS)))

    # -- state

    def set_device_state_fd(self, payload: DeviceState, message: Message) -> Payload:
        if payload.phase != PHASE_STOPPED or payload.direction not in (SAVE, LOAD):
            raise RemoteProtocolError(f"state in direction {payload.direction}, phase {payload.phase}")
        if self._running.busy() or self._transfer is not None:
            return U64(FAILED)
        data = self.device.save_state() if payload.direction == SAVE else None
        self._transfer = Transfer(message.take_fds()[0], data)
        return U64(USE_YOURS)

    def check_device_state(self, payload: Empty, message: Message) -> Payload:
        transfer, self._transfer = self._transfer, None
        if transfer is None or not transfer.finish():
            return U64(1)
        if transfer.loads:
            try:
                self.device.load_state(bytes(transfer.data))
            except ValueError as error:
                log.warn(f"{type(self.device).__name__.lower()} backend: unusable state: {error}")
                return U64(1)
        return U64(0)


def protocol_features(device: Device) -> int:
    """The protocol features that make sense for `device`."""
    lacking = 0 if len(device.config) else ProtocolFeature.CONFIG
    if not device.inflight:
        lacking |= ProtocolFeature.INFLIGHT_SHMFD
    if type(device).save_state is Device.save_state:
        lacking |= ProtocolFeature.DEVICE_STATE
    if not device.shared_memory:
        lacking |= WITH_MEMORY
    return PROTOCOL_FEATURES & ~lacking


def taken_fd(message: Message) -> int:
    """The eventfd that came with a `VringFile`, or -1; RemoteProtocolError when it is something else."""
    if not message.fds:
        return -1
    if not eventfd.is_eventfd(message.fds[0]):
        raise RemoteProtocolError(f"the descriptor of {message.request.name} is no eventfd")
    return message.take_fds()[0]


def channel_of(fd: int) -> Channel:
    """The channel over a received descriptor."""
    try:
        return Channel(socket(fileno=fd))
    except OSError as error:
        close_fd(fd)
        raise RemoteProtocolError(f"SET_BACKEND_REQ_FD without a socket: {error.strerror}") from None


HANDLERS: dict[int, Callable[..., Payload | None]] = {
    row.id: handler
    for row in FRONTEND_REQUESTS
    if (handler := getattr(Connection, row.name.lower(), None)) is not None
}
