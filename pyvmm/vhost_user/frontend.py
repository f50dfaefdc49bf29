"""The generic vhost-user frontend: makes one backend into a device for virtio.

It owns the device's state, the lock that serialises virtual CPUs, and what happens when the
backend is lost.  What must be agreed upon is in `opening`, the order of messages in `rings`.  What
the device is comes in as data (`kind`); it must not know about PCI, registers or interrupts.
"""

from __future__ import annotations

from time import monotonic

from .. import log
from ..errors import BackendLost, ProtocolError, RemoteProtocolError
from ..lean import Lock
from . import rings
from .attempt import Attempt
from .client import Refusal
from .endpoint import endpoint
from .inflight import InflightBuffer
from .link import Link
from .memory import MemoryTable
from .opening import Agreed, Opening
from .progress import moved, obstacle
from .recovery import FAIL, RECONNECT, STOP, Abandoned, Recovery
from .rings import Wanted
from .shared_memory import SharedMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    from ..loop import EventLoop
    from ..virtio.queue import QueueSetup
    from .client import Client
    from .codec import Message
    from .endpoint import Endpoint
    from .memory import GuestRam
    from .notices import Handler
    from .opening import Kind
    from .trace import DeviceTrace

    Result = TypeVar("Result")

LONG_LIFE = 2.0  # seconds
DEATH = 5.0  # seconds for a process that is killed: the kernel may be at work for it


class Frontend:
    """One backend, connected and negotiated; see `pyvmm.virtio.device.Backend` for the methods.

    `connect` is an Endpoint, a socket's path, an inherited descriptor, or a function that gets
    the seconds allowed and returns a connected socket.  `config` is a configuration space to use
    instead of the backend's.  `deadline` is in seconds and holds for each request.  Raises
    ConfigError when there is no backend, or one that does not fit; `force` lets a device have
    fewer queues than its drivers can do with.

    `on_loss` is what happens when the backend is lost: it is looked for again (RECONNECT, for
    `patience` seconds, 0: for ever), the event loop ends with BackendLost (STOP), or the device is
    given up (FAIL).  `on_config_change`, `on_away`, `on_back` and `on_lost` are called in the thread of
    `loop`, once `start_watching` was; `on_config_refused` in the thread that accesses the configuration.
    `trace` sees every message; `greet` is called with each connection that was agreed on.
    """

    def __init__(
        self,
        connect: Endpoint | str | int | Callable[[float], socket],
        kind: Kind,
        queue_sizes: Sequence[int],
        config: bytes | None,
        ram: GuestRam,
        loop: EventLoop,
        deadline: float = 10.0,
        name: str = "",
        *,
        connect_timeout: float = 10.0,
        force: bool = False,
        on_loss: str = FAIL,
        patience: float = 0.0,
        greet: Callable[[Client], object] | None = None,
        trace: DeviceTrace | None = None,
    ) -> None:
        self._endpoint = endpoint(connect)
        self.name = name or f"{kind.name} at {self._endpoint.name}"
        self.device_id = kind.device_id
        self.queue_sizes = tuple(queue_sizes)
        self.on_config_change: Callable[[], None] = _nothing
        self.on_config_refused: Callable[[], None] = _nothing
        self.on_lost: Callable[[str], None] = _nothing
        self.on_away: Callable[[], None] = _nothing
        self.on_back: Callable[[], None] = _nothing
        self._loop, self._deadline, self._trace = loop, deadline, trace
        self._lock = Lock()
        self._on_loss, self._replaced = on_loss, on_loss == RECONNECT and not self._endpoint.final
        self._retired: Link | None = None
        self._attempt: Attempt | None = None
        self._lost = self._stranded = ""
        self._ending = self._given_up = self._worked = self._config_changed = False
        self._changed_at, self._outage = monotonic(), 0.0
        self._accepted = self._writes = 0  # features; how often the driver wrote to the configuration space
        self._wanted: Wanted | None = None
        packed = on_loss != RECONNECT  # nobody has to go on with them
        self._opening = Opening(self.name, kind, queue_sizes, config, force, len(ram.ranges), packed)
        self._opening.greet = greet or _nothing
        self._inflight = InflightBuffer(len(self.queue_sizes), max(self.queue_sizes))
        self._memory = MemoryTable(ram)
        self._recovery = Recovery(self.name, loop, self._endpoint, self._restore, self._recovered, patience)
        self._link: Link | None = Link(self._endpoint.connect(connect_timeout), deadline, trace)
        self._holder = self._endpoint.holder()  # who got guest memory last, if it is a process of ours
        self._handlers: dict[str, Handler] = {"CONFIG_CHANGE_MSG": self._note_config_change}
        agreed = self._opening.first(self._link, self._handlers, self._endpoint)
        self.shared_memory = agreed.shared_memory
        self.mappings = SharedMemory(self.name, agreed.shared_memory, self._memory_broke)
        self._handlers.update(self.mappings.handlers)
        self.features, self._config, self.config_size = agreed.features, agreed.config, agreed.config.size

    # -- start and stop ----------------------------------------------------------------
    def agree(self, features: int) -> bool:
        """The driver settles on `features`: whether it can.  Until a reset, 0, no backend may lack them."""
        with self._lock:
            possible = not features & ~self.features
            self._accepted = features if possible else self._accepted
            if not features:
                self._config.forget()
            return possible

    def activate(self, features: int, queues: Sequence[QueueSetup]) -> None:
        """Start the device with the driver's `features` and its enabled `queues`.

        Returns when the backend has carried out everything.  While one is looked for it returns at
        once, and that one is started as soon as it is there.  Raises ProtocolError when the backend
        is lost for good.
        """
        with self._lock:
            self._abandon()
            self._accepted, self._wanted = features, Wanted(features, tuple(queues))
            self._carry_out(self._start)

    def reset(self) -> None:
        """Stop the rings; the backend touches guest memory no more, or else it is lost.

        If that is a process of ours, it is killed before this returns, and so is one that was lost before.
        Guest memory cannot be taken away from somebody else's: whoever runs that has to end it.
        """
        with self._lock:
            self._abandon()
            self._accepted, self._wanted, self._stranded = 0, None, ""
            try:
                self._on_link(Link.stop)
            except ProtocolError as error:
                log.debug(f"{self.name}: reset: {error}")
            self._inflight.drop()
            self._config.forget()
            self.mappings.clear()
            holder = None if self._link is not None or self._ending else self._holder  # it may end in order
        if holder is not None:
            if not holder.ended():
                log.warn(f"{self.name}: the lost backend is killed, lest it write to guest memory later")
            if not holder.destroy(DEATH):
                log.warn(f"{self.name}: it does not end within {DEATH:g} s, and may write to memory later")

    def set_call(self, index: int, fd: int | None) -> None:
        """Send the interrupts of a running queue elsewhere.  Raises ProtocolError, as `activate` does."""
        with self._lock:
            wanted = self._wanted
            if wanted is not None and any(queue.index == index for queue in wanted.queues):
                self._wanted = wanted.with_call(index, fd)
                self._carry_out(lambda link: rings.send_fd(link.client, "SET_VRING_CALL", index, fd))

    def _start(self, link: Link) -> None:
        rings.stop(link.client)
        wanted = self._wanted
        if wanted is not None:
            rings.start(link.client, self._memory, wanted, wanted.first_bases, self._inflight)

    # -- configuration space -----------------------------------------------------------
    def read_config(self, offset: int, length: int) -> bytes:
        """`length` bytes; the last known ones when the backend does not give them."""
        try:
            with self._lock:
                return self._on_link(lambda link: self._read_config(link, offset, length))
        except ProtocolError:
            return self._config.last(offset, length)

    def _read_config(self, link: Link, offset: int, length: int) -> bytes:
        try:
            return self._config.read(link.client, offset, length)
        except Refusal as error:
            self._config_refused("read", f"{length} bytes at {offset}: {error}")
            return self._config.last(offset, length)

    def write_config(self, offset: int, data: bytes) -> None:
        """Hand a driver's write on."""
        with self._lock:
            self._config.keep(offset, data)
            self._writes += 1
            try:
                self._on_link(lambda link: self._write_config(link, offset, data))
            except ProtocolError as error:
                log.debug(f"{self.name}: configuration write: {error}")

    def _write_config(self, link: Link, offset: int, data: bytes) -> None:
        try:
            self._config.write(link.client, offset, data)
        except Refusal as error:
            self._config_refused("write", f"{len(data)} bytes at {offset}: {error}")

    def _config_refused(self, access: str, what: str) -> None:
        """The dialogue goes on, but the driver may take for true what is not."""
        text = f"{self.name}: configuration {access} of {what}; the device asks the guest for a reset"
        log.once((self.name, "config", access), text)
        self.on_config_refused()

    # -- the event loop's side ---------------------------------------------------------
    def start_watching(self) -> None:
        """Notice from now on, in the loop's thread, when the backend ends or asks."""
        if (link := self._link) is not None:
            link.watch(self._loop, self._hung_up, self._noticed)

    def _hung_up(self) -> None:
        # a thread that holds the lock sees the end of the connection too, and lets go
        with self._lock:
            if self._link is not None:
                self._lose(self._link, "the backend closed the connection")

    def _noticed(self) -> None:
        """Serve the backend's requests, without the lock: see `notices`."""
        link = self._link
        if link is None or link.notices is None:
            return
        try:
            link.notices.serve()
        except ProtocolError as error:
            link.shutdown(str(error))
            self._hung_up()
            return
        if link.notices.ended:
            link.drop_notices(self._loop)

    def _memory_broke(self) -> None:
        """On a virtual CPU's thread: what the backend has mapped is of no use."""
        link = self._link
        if link is not None:
            link.shutdown("what it mapped into shared memory has no memory; was a file cut short?")

    def _note_config_change(self, message: Message) -> int:
        if not self._config_changed:
            self._config_changed = True
            self._loop.call_soon_threadsafe(self._tell_config_change)
        return 0

    def _tell_config_change(self) -> None:
        if self._config_changed and self._link is not None:
            self._config_changed = False
            self.on_config_change()

    # -- loss --------------------------------------------------------------------------
    def _on_link(self, action: Callable[[Link], Result]) -> Result:
        link = self._link
        if link is None:
            raise BackendLost(self._lost)
        try:
            return action(link)
        except ProtocolError as error:
            self._lose(link, str(error))
            raise

    def _carry_out(self, action: Callable[[Link], None]) -> None:
        """Do what `_wanted` says already; a backend that is still to come does it at its start."""
        try:
            self._on_link(action)
        except RemoteProtocolError:
            if not self._replaced or self._given_up:
                raise

    def _lose(self, link: Link, reason: str) -> None:
        """Give the connection up; the lock is held.  The rest is done in the loop's thread."""
        self._link, self._retired = None, link
        self._lost = link.fault or reason
        # one that neither lived for a while nor used a buffer may have failed at its start
        self._worked = monotonic() - self._changed_at > LONG_LIFE or moved(self._memory, link.client.running)
        self._changed_at = monotonic()
        link.shutdown()
        self._loop.call_soon_threadsafe(self._announce_loss)

    def _announce_loss(self) -> None:
        link, self._retired = self._retired, None
        if link is None:
            return
        link.unwatch(self._loop)
        link.close()
        self.mappings.lose()
        if self._replaced:
            self.on_away()
        self._endpoint.explain_later(self._loop, self._take_loss)

    def _take_loss(self, known: str) -> None:
        """Do what is to be done about it; `known` is what the backend's end tells of the reason."""
        self._lost += known
        if self._ending:
            return
        if self._on_loss == STOP:
            raise BackendLost(f"{self.name}: the backend is lost: {self._lost} (--on-backend-loss stop)")
        if self._replaced:
            log.warn(f"{self.name}: the backend is lost: {self._lost}; reconnecting")
            self._recovery.begin(self._worked)
            return
        if self._on_loss == RECONNECT:
            self._lost += f"; it cannot be reconnected: {self._endpoint.final}"
        self.on_lost(self._lost)

    # -- recovery ----------------------------------------------------------------------
    def _restore(self, sock: socket) -> None:
        """Make the device of a new connection, in a thread of its own; raises what is wrong with it."""
        attempt = self._attempt = Attempt(Link(sock, self._deadline, self._trace), self._inflight)
        try:
            if self._ending:
                raise BackendLost(self._lost)
            attempt.agreed = self._opening.open(attempt.link, self._handlers)
            while not self._adopt(attempt):
                attempt.follow(self._memory)
        except BaseException:
            with self._lock:
                self._attempt = None
            attempt.close()
            if attempt.abandoned:
                raise Abandoned from None
            self.mappings.lose()
            raise

    def _adopt(self, attempt: Attempt) -> bool:
        """Make the attempt's backend the device's, if it has been told all that the driver wants by now."""
        with self._lock:
            if attempt.abandoned:
                raise Abandoned
            self._opening.check(attempt.agreed, Agreed(self._accepted, self._config, self.shared_memory))
            if self._wanted is not None and not attempt.started:
                tracked = self._inflight.held
                self._stranded = obstacle(self._memory, self._wanted, tracked, self.mappings.torn)
            if self._stranded:  # until a reset, however many backends come by then
                self._wanted = None
            news = attempt.aim(self._memory, self._wanted, self._config, self._writes)
            if attempt.started or not news:
                self._holder = self._endpoint.holder()
            if news:
                return False
            self._attempt, self._link = None, attempt.hand_over(self._config)
            self.features, self._config = attempt.agreed.features, attempt.agreed.config
            self._config_changed |= attempt.changed
            self._changed_at, self._outage = monotonic(), monotonic() - self._changed_at
            return True

    def _abandon(self) -> None:
        """The rings that a backend on its way was told of are the driver's no more; the lock is held."""
        if self._attempt is not None and self._attempt.started and not self._attempt.abandoned:
            self._attempt.abandon()
            self._inflight = self._inflight.another()

    def _recovered(self, failure: str) -> None:
        if failure:
            self._given_up = True
            log.warn(f"{self.name}: {failure}; the device stays lost")
            self.on_lost(f"{self._lost}; {failure}")
            return
        if self._link is None:
            return  # lost again; that is announced next
        self.start_watching()
        but = f", but {self._stranded}; the device waits until the guest resets it"
        log.warn(f"{self.name}: reconnected after {self._outage:.2f} s{but if self._stranded else ''}")
        if not self._stranded:
            self.on_back()
        self._tell_config_change()

    def interrupt(self) -> None:
        """Wake a thread that waits for the backend; the backend is lost then, for the machine ends."""
        self._ending = True
        attempt = self._attempt
        for link in (self._link, self._retired, attempt.link if attempt is not None else None):
            if link is not None:
                link.shutdown("the machine ends")

    def close(self) -> None:
        """End the connection and close every descriptor; a waiting thread is woken first."""
        self._lost = self._lost or "the device was closed"
        self._recovery.cancel()
        self.interrupt()
        self._recovery.join(self._deadline)
        with self._lock:
            links = (self._link, self._retired)
            self._link = self._retired = None
            self._inflight.drop()
        for link in links:
            if link is not None:
                link.unwatch(self._loop)
                link.close()


def _nothing(*_: object) -> None:
    """Nobody has asked to be told."""
