"""One vhost-user connection, seen from the backend: messages in, device calls out.

It owns the negotiated state, the guest's memory and the queues of one frontend.  Every
request that we serve is a method named like its row in `FRONTEND_REQUESTS`; rows decide the
payload, the reply, the ack and what must have been negotiated.  It must not know what the
device does, nor where the connection came from (`server`).

What the frontend cannot have done right ends the connection (`RemoteProtocolError`).
What a guest may have caused, such as ring addresses outside its memory, is refused:
a non-zero ack, and the connection lives.
"""

from __future__ import annotations

import os
from _socket import socket

from .. import log
from ..errors import BackendLost, RemoteProtocolError
from ..vhost_user.channel import Channel
from ..vhost_user.codec import encode_request
from ..vhost_user.messages import (
    BACKEND_REQUESTS,
    F_PROTOCOL_FEATURES,
    FRONTEND_REQUESTS,
    ProtocolFeature,
)
from ..vhost_user.payloads import U64, Config, Empty, VringState
from ..vhost_user.session import Negotiation, Responder
from .loop import can_poll
from .memory import MAX_SLOTS, MemoryTable
from .queue import Queue, close_fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..vhost_user.codec import Message
    from ..vhost_user.payloads import MemTable, Payload, SingleRegion, VringAddr, VringFile
    from .device import Device
    from .loop import DeviceLoop

F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32
TRANSPORT_FEATURES = F_INDIRECT_DESC | F_EVENT_IDX | F_PROTOCOL_FEATURES | F_VERSION_1
PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)
MESSAGES_A_TURN = 64  # a flood of messages must not keep the queues from their turn
POLL_SECONDS = 0.001  # a queue without a kick descriptor is looked at so often


class Refused(Exception):
    """The request was understood and cannot be done; the connection goes on."""


class Connection:
    """Serves `device` to the frontend behind `sock` until either end closes."""

    def __init__(self, device: Device, sock: socket, loop: DeviceLoop, on_end: Callable[[str], None]) -> None:
        self.device = device
        self.loop = loop
        self.queues = tuple(Queue(index, size) for index, size in enumerate(device.queue_sizes))
        lacking = 0 if len(device.config) else ProtocolFeature.CONFIG
        self.agreed = Negotiation(device.features | TRANSPORT_FEATURES, PROTOCOL_FEATURES & ~lacking)
        self._on_end = on_end
        self._channel = Channel(sock)
        self._memory = MemoryTable()
        self._responder = Responder(FRONTEND_REQUESTS, self.agreed, os.close)
        self._backend_channel: Channel | None = None
        self._polled: set[Queue] = set()
        self.closed = False
        device.connection = self
        loop.add_reader(self._channel.fileno(), self._on_readable)
        device.on_connect()

    def close(self) -> None:
        """End the connection: every queue is stopped as if the frontend had asked for it."""
        if self.closed:
            return
        self.closed = True
        self._stop_all()
        self.device.on_disconnect()
        self.device.connection = None
        self.loop.remove_reader(self._channel.fileno())
        self._channel.close()
        self._responder.decoder.close()
        for queue in self.queues:
            queue.forget()
        self._memory.clear()
        if self._backend_channel is not None:
            self._backend_channel.close()

    def send_config_change(self) -> None:
        """CONFIG_CHANGE_MSG, when the frontend listens for it."""
        row = BACKEND_REQUESTS.by_name["CONFIG_CHANGE_MSG"]
        if self._backend_channel is None or not self.agreed.has(row.needs):
            return
        try:
            self._backend_channel.send(encode_request(row, Empty()))
        except BackendLost:
            return  # full of unread notifications, which say the same, or the frontend is gone

    # -- messages --------------------------------------------------------------------------

    def _on_readable(self) -> None:
        decoder = self._responder.decoder
        try:
            for _ in range(MESSAGES_A_TURN):
                message = self._channel.receive_now(decoder)
                if message is None:
                    return
                self._handle(message)
        except RemoteProtocolError as error:
            # a frontend may go at any time between messages: nothing to report
            silent = isinstance(error, BackendLost) and decoder.idle
            self.close()
            self._on_end("" if silent else str(error))

    def _handle(self, message: Message) -> None:
        try:
            self._responder.received(message)
            handler = HANDLERS.get(message.request.id)
            if handler is None:
                raise RemoteProtocolError(f"{message.request.name} is not served")
            self._channel.send(self._outcome(handler, message))
        finally:
            message.close()

    def _outcome(self, handler: Callable[..., Payload | None], message: Message) -> bytes:
        """Do what the message asks for; the answer's bytes, if one is due."""
        try:
            reply = handler(self, message.payload, message)
        except Refused as refusal:
            log.once(message.request.name, f"{message.request.name} refused: {refusal}")
            return self._responder.ack(1)
        return self._responder.ack() if reply is None else self._responder.reply(reply)

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
        self._stop_all()

    def reset_device(self, payload: Empty, message: Message) -> None:
        self._stop_all()
        self.device.driver_features = self.agreed.virtio_acked = 0
        self.device.on_reset()

    def get_protocol_features(self, payload: Empty, message: Message) -> Payload:
        return U64(self.agreed.protocol_offered or 0)

    def set_protocol_features(self, payload: U64, message: Message) -> None:
        """The negotiation has kept them already."""

    def get_queue_num(self, payload: Empty, message: Message) -> Payload:
        return U64(len(self.queues))

    def set_backend_req_fd(self, payload: Empty, message: Message) -> None:
        if self._backend_channel is not None:
            self._backend_channel.close()
        self._backend_channel = channel_of(message.take_fds()[0])

    # -- memory

    def set_mem_table(self, payload: MemTable, message: Message) -> None:
        self._memory.replace(payload.regions, message.take_fds())
        self._move_all()

    def add_mem_reg(self, payload: SingleRegion, message: Message) -> None:
        self._memory.add(payload, message.take_fds()[0])
        self._move_all()

    def rem_mem_reg(self, payload: SingleRegion, message: Message) -> None:
        self._memory.remove(payload)
        self._move_all()

    def get_max_mem_slots(self, payload: Empty, message: Message) -> Payload:
        return U64(MAX_SLOTS)

    # -- configuration space

    def get_config(self, payload: Config, message: Message) -> Payload:
        data = self.device.on_config_read(payload.offset, len(payload.data))
        return Config(payload.offset, payload.flags, data)

    def set_config(self, payload: Config, message: Message) -> None:
        # frontends disagree on what flags 1 means (migration, or writable): both write
        self.device.on_config_write(payload.offset, payload.data)

    # -- queues

    def set_vring_num(self, payload: VringState, message: Message) -> None:
        queue, size = self._queue(payload.index), payload.num
        if not 0 < size <= queue.max_size or size & (size - 1):
            raise Refused(
                f"virtqueue {queue.index} of {size} entries; it takes a power of two up to {queue.max_size}"
            )
        queue.size = size

    def set_vring_addr(self, payload: VringAddr, message: Message) -> None:
        queue = self._queue(payload.index)
        queue.addresses = (payload.desc, payload.avail, payload.used)
        if queue.ring is not None:
            self._move(queue)

    def set_vring_base(self, payload: VringState, message: Message) -> None:
        self._queue(payload.index).base = payload.num & 0xFFFF

    def get_vring_base(self, payload: VringState, message: Message) -> Payload:
        queue = self._queue(payload.index)
        return VringState(queue.index, self._stop(queue))

    def set_vring_kick(self, payload: VringFile, message: Message) -> None:
        queue = self._queue(payload.index)
        self._unwatch(queue)
        queue.set_kick(taken_fd(message))
        if queue.kick_fd >= 0 and not can_poll(queue.kick_fd):
            raise RemoteProtocolError(f"the kick descriptor of virtqueue {queue.index} is no eventfd")
        queue.kicked = True
        if not self.agreed.virtio_acked & F_PROTOCOL_FEATURES:
            queue.enabled = True  # without the feature there is no SET_VRING_ENABLE to wait for
        self._start(queue)

    def set_vring_call(self, payload: VringFile, message: Message) -> None:
        queue = self._queue(payload.index)
        self._change(queue, lambda: queue.set_call(taken_fd(message)))

    def set_vring_err(self, payload: VringFile, message: Message) -> None:
        self._queue(payload.index).set_error(taken_fd(message))

    def set_vring_enable(self, payload: VringState, message: Message) -> None:
        queue = self._queue(payload.index)
        queue.enabled = bool(payload.num)
        self._start(queue)

    # -- running queues ----------------------------------------------------------------------

    def _start(self, queue: Queue) -> None:
        """Run `queue` if it may run now: kick set and enabled."""
        if not (queue.kicked and queue.enabled):
            return
        if queue.ring is None:
            try:
                queue.start(
                    self._memory.memory,
                    event_idx=bool(self.agreed.virtio_acked & F_EVENT_IDX),
                    indirect=bool(self.agreed.virtio_acked & F_INDIRECT_DESC),
                )
            except ValueError as error:
                raise Refused(f"virtqueue {queue.index}: {error}") from None
            self.device.on_start(queue)
        if self.device.threaded:
            return
        self._watch(queue)
        self._serve(queue)  # what came before the kick descriptor did

    def _stop(self, queue: Queue) -> int:
        if queue.ring is not None and queue.ring.running:
            queue.ending = True
            self.device.on_stop(queue)
            queue.ending = False
            queue.notify()
        self._unwatch(queue)
        return queue.stop()

    def _stop_all(self) -> None:
        for queue in self.queues:
            self._stop(queue)

    def _move_all(self) -> None:
        for queue in self.queues:
            if queue.ring is not None:
                self._move(queue)

    def _move(self, queue: Queue) -> None:
        """Find a running ring again after its address or the memory changed."""
        ring, addresses = queue.ring, queue.addresses
        assert ring is not None and addresses is not None
        try:
            self._change(queue, lambda: ring.move(self._memory.memory, *addresses))
        except ValueError as error:
            ring.stop()
            raise Refused(f"virtqueue {queue.index}: {error}") from None

    def _change(self, queue: Queue, change: Callable[[], None]) -> None:
        """Do `change` to a queue; a thread of the device's must not be in there meanwhile."""
        pause = self.device.threaded and queue.ring is not None
        if pause:
            self.device.on_stop(queue)
        change()
        if pause:
            self.device.on_start(queue)

    def _watch(self, queue: Queue) -> None:
        if queue.kick_fd < 0:
            if queue not in self._polled:
                self._polled.add(queue)
                self.loop.call_later(POLL_SECONDS, lambda: self._poll(queue))
            return
        self.loop.add_reader(queue.kick_fd, lambda: self._on_kick(queue))

    def _unwatch(self, queue: Queue) -> None:
        if queue.kick_fd >= 0:
            self.loop.remove_reader(queue.kick_fd)

    def _poll(self, queue: Queue) -> None:
        if queue.running and queue.kick_fd < 0:
            self._serve(queue)
            self.loop.call_later(POLL_SECONDS, lambda: self._poll(queue))
        else:
            self._polled.discard(queue)

    def _on_kick(self, queue: Queue) -> None:
        if drain_eventfd(queue.kick_fd):
            self._serve(queue)
        else:
            self._unwatch(queue)
            log.warn(f"virtqueue {queue.index} stopped: its kick descriptor is not an eventfd")

    def _serve(self, queue: Queue) -> None:
        if not queue.running:
            return
        queue.again = False
        self.device.on_queue(queue)
        if queue.again:
            self.loop.call_later(0, lambda: self._serve(queue))


def drain_eventfd(fd: int) -> bool:
    """Reset an eventfd of the frontend's; false when it cannot be one."""
    try:
        return len(os.read(fd, 8)) == 8
    except BlockingIOError:
        return True  # somebody else was faster
    except OSError:
        return False


def taken_fd(message: Message) -> int:
    """The eventfd that came with a `VringFile`, or -1."""
    fds = message.take_fds()
    return fds[0] if fds else -1


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
