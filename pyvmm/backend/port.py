"""One port of the console device: bytes between its two queues and its endpoint.

It owns the port's flow in both directions and its listening socket.  It must not know the
control queue (`console`) or descriptors' kinds (`endpoints`).

Nothing is stored without a bound: input waits in its descriptor until the guest has opened
the port and offers buffers, output waits in the guest's queue until the descriptor takes it.
Only a console port has a cushion, as Linux spins with interrupts off until its console's
bytes are taken (drivers/char/virtio_console.c, put_chars).  When the queues stop, what the
guest had queued is taken over and flushed before the process ends.
"""

from __future__ import annotations

import select
from _socket import socket
from time import monotonic

from .endpoints import Endpoint, Stream, endpoint_of
from .loop import can_poll
from .server import accept

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .._native.vring import Chain
    from ..loop import Timer
    from .endpoints import PortConfig
    from .loop import DeviceLoop
    from .queue import Queue

CUSHION = 1 << 20  # bytes of console output that may wait outside the guest
LAST_CUSHION = 8 << 20  # and when the queue ends, as it cannot wait in there any more
FLUSH_SECONDS = 2.0  # how long the end waits for an output that takes nothing
TURNS = 16  # reads from one endpoint before others have their turn


class Port:
    """One port: its two queues, its endpoint, and whether each side has it open."""

    def __init__(
        self, number: int, config: PortConfig, announce: Callable[[Port], None], loop: DeviceLoop
    ) -> None:
        self.number = number
        self.config = config
        self.guest_open = False
        self.size: tuple[int, int] | None = None  # columns, rows
        self.rx: Queue | None = None
        self.tx: Queue | None = None
        self._announce = announce
        self._loop = loop
        self._rx_chain: Chain | None = None
        self._tx_chain: Chain | None = None
        self._backlog = bytearray()
        self._input_ended = False
        self._polls = False
        self._turn: Timer | None = None  # the next read of an input that cannot be polled
        self._listener = socket(fileno=config.listen_fd) if config.listen_fd >= 0 else None
        self._endpoint: Endpoint | None = None
        if self._listener is None:
            self._attach(endpoint_of(config))
        else:
            loop.add_reader(self._listener.fileno(), self._accept)

    @property
    def host_open(self) -> bool:
        """Whether something on the host carries the port's bytes."""
        return self._endpoint is not None

    def close(self) -> None:
        """Flush what the guest wrote, then release the descriptors."""
        self.flush(FLUSH_SECONDS)
        self._detach()
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()

    # -- endpoint ------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client = accept(self._listener)
        except OSError:
            return  # it went away before we looked
        self._loop.remove_reader(self._listener.fileno())
        self._attach(Stream(client))
        self._announce(self)
        self.resume_input()

    def _attach(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._input_ended = endpoint.input_fd < 0
        self._polls = not self._input_ended and can_poll(endpoint.input_fd)

    def _detach(self) -> None:
        self.pause_input()
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is None:
            return
        self._loop.remove_writer(endpoint.output_fd)
        endpoint.close()
        self._backlog.clear()

    def _lose(self) -> None:
        """The host's side is gone: tell the guest, and wait for the next client if any can come."""
        self._detach()
        self._announce(self)
        self.pump_out()  # what the guest has queued for nobody
        if self._listener is not None:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    # -- host to guest ---------------------------------------------------------------------

    def resume_input(self) -> None:
        """Read from the host again, if there is anything to read and somewhere to put it."""
        endpoint = self._endpoint
        if endpoint is None or self._input_ended or not self.guest_open or not self._room():
            return
        if self._polls:
            self._loop.add_reader(endpoint.input_fd, self.pump_in)
        elif self._turn is None:
            self._turn = self._loop.call_later(0, self._pump_file)

    def pause_input(self) -> None:
        """Leave the host's bytes where they are."""
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        elif self._endpoint is not None and self._polls:
            self._loop.remove_reader(self._endpoint.input_fd)

    def pump_in(self) -> None:
        """Move bytes from the endpoint into the guest's buffers."""
        endpoint, turns = self._endpoint, TURNS
        while turns and endpoint is not None and self._room():
            chain = self._rx_chain
            assert chain is not None and self.rx is not None
            count = endpoint.read(chain.writable_views())
            if not count:
                if count == 0:
                    self._end_input(endpoint)
                break
            chain.wrote(count)
            chain.push()
            self._rx_chain = None
            # only sockets can be read without blocking when they have no more
            turns = turns - 1 if isinstance(endpoint, Stream) else 0
        if self.rx is not None:
            self.rx.notify()

    def _pump_file(self) -> None:
        self._turn = None
        self.pump_in()
        self.resume_input()

    def _room(self) -> bool:
        """Have a guest's buffer in hand; without one, input pauses until the guest kicks."""
        while self._rx_chain is None or not self._rx_chain.writable:
            if self._rx_chain is not None:
                self._rx_chain.push()
            self._rx_chain = self.rx.pop() if self.rx is not None else None
            if self._rx_chain is None:
                self.pause_input()
                return False
        return True

    def _end_input(self, endpoint: Endpoint) -> None:
        self.pause_input()
        self._input_ended = True
        if endpoint.lost:
            self._lose()
        else:
            endpoint.watch_loss(self._loop, self._lose)

    # -- guest to host ---------------------------------------------------------------------

    def pump_out(self) -> None:
        """Move bytes from the guest's queue to the endpoint, as far as both allow."""
        tx = self.tx
        for _ in range(tx.size if tx is not None else 1):
            if not self._send_backlog() or not self._send_chain():
                break
        else:
            if tx is not None:
                tx.again = True
        if tx is not None:
            tx.notify()
        if self._endpoint is not None and self._endpoint.lost:
            self._lose()

    def _send_backlog(self) -> bool:
        """Write what was taken from the guest before; false while the endpoint is blocked."""
        while self._backlog:
            count = self._write([self._backlog])
            if count is None:
                if self.config.console:
                    self._absorb(CUSHION)
                return False
            del self._backlog[:count]
        return True

    def _send_chain(self) -> bool:
        """Write the next chain; false when there is none or the endpoint is blocked."""
        chain = self._next_chain()
        if chain is None:
            if self._endpoint is not None:
                self._loop.remove_writer(self._endpoint.output_fd)
            return False
        while chain.readable:
            count = self._write(chain.readable_views())
            if count is None:
                if self.config.console:
                    self._absorb(CUSHION)
                return False
            chain.skip(count)
        self._finish(chain)
        return True

    def _write(self, views: Sequence[memoryview | bytearray]) -> int | None:
        """Write to the endpoint; None after asking to be called when it can take more."""
        endpoint = self._endpoint
        if endpoint is None:
            return sum(len(view) for view in views)  # nobody listens: bytes vanish
        count = endpoint.write(views)
        if count is None:
            self._loop.add_writer(endpoint.output_fd, self.pump_out)
        return count

    def _next_chain(self) -> Chain | None:
        if self._tx_chain is None and self.tx is not None:
            self._tx_chain = self.tx.pop()
        return self._tx_chain

    def _finish(self, chain: Chain) -> None:
        chain.push(0)
        self._tx_chain = None

    def _absorb(self, limit: int) -> None:
        """Take chains over into the backlog while that stays within `limit` bytes."""
        while (chain := self._next_chain()) is not None:
            if len(self._backlog) + chain.readable > limit:
                return
            self._backlog += chain.read()
            self._finish(chain)

    def emergency(self, data: bytes) -> None:
        """Write a byte that came through the configuration space, if the cushion has room."""
        if len(self._backlog) < CUSHION:
            self._backlog += data
            self.pump_out()

    def flush(self, seconds: float) -> None:
        """Write the backlog out; give up when nothing moves for `seconds`."""
        endpoint = self._endpoint
        if endpoint is None:
            return
        poll = select.poll()
        if endpoint.output_fd >= 0:
            poll.register(endpoint.output_fd, select.POLLOUT)
        deadline = monotonic() + seconds
        while self._backlog and monotonic() < deadline:
            count = endpoint.write([self._backlog])
            if count is None:
                poll.poll(100)
            else:
                del self._backlog[:count]
                deadline = monotonic() + seconds

    # -- queues ------------------------------------------------------------------------------

    def stop_rx(self, queue: Queue) -> None:
        """The input queue ends: an unused buffer in hand goes back."""
        self.pause_input()
        if self._rx_chain is not None:
            self._rx_chain = None
            queue.rewind(1)
        self.rx = None

    def stop_tx(self, queue: Queue) -> None:
        """The output queue ends: take over what is in it."""
        self._absorb(LAST_CUSHION)
        self._tx_chain = self.tx = None
        self.pump_out()
