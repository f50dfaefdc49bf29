"""A virtio device without its transport: features, status, queues, and the backend behind it.

It owns the negotiation with the driver and decides when the backend is started and reset.
It must not know how registers are laid out or how interrupts reach the guest: the transport
gives it an `Interrupts`, and a `Backend` does the work.

Locks.  `driver_lock` serialises what virtual CPUs do to the device and is held while the
backend is called, which may take as long as the backend's deadline.  `_state_lock` guards status and
configuration flags, and nothing is called under it but `Interrupts.config_changed`.  The
backend's announcements (`config_changed`, `backend_lost`) come from the event loop's thread, which may be
what the backend waits for: they take `_state_lock` only.  Order: driver, backend's own, state.
"""

from __future__ import annotations

import os
from _thread import allocate_lock as Lock

from .. import log
from ..errors import ProtocolError
from ..eventfd import create, drain, signal
from . import kinds, spec
from .queue import Queue, QueueSetup
from .status import ACTIVATE, DRIVER_BITS, NEGOTIATE, RESET, transition

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from ..layout import RamRange
    from .shared_memory import SharedMemoryBar

    class Mappings(Protocol):
        """What the backend shows in its shared memory regions; to nobody while None is attached."""

        def attach(self, mapper: SharedMemoryBar | None, /) -> None: ...

    class Backend(Protocol):
        """What serves the device; `vhost_user.frontend.Frontend` is one."""

        on_config_change: Callable[[], None]
        on_config_refused: Callable[[], None]
        on_lost: Callable[[str], None]
        on_away: Callable[[], None]
        on_back: Callable[[], None]

        @property
        def name(self) -> str: ...
        @property
        def device_id(self) -> int: ...
        @property
        def features(self) -> int: ...
        @property
        def queue_sizes(self) -> tuple[int, ...]: ...
        @property
        def config_size(self) -> int: ...
        @property
        def shared_memory(self) -> tuple[tuple[int, int], ...]: ...
        @property
        def mappings(self) -> Mappings: ...
        def read_config(self, offset: int, length: int) -> bytes: ...
        def write_config(self, offset: int, data: bytes) -> None: ...
        def agree(self, features: int) -> bool: ...
        def activate(self, features: int, queues: Sequence[QueueSetup]) -> None: ...
        def set_call(self, index: int, fd: int | None) -> None: ...
        def reset(self) -> None: ...

    class Interrupts(Protocol):
        """What the transport does for the device."""

        def call_fd(self, vector: int) -> int | None: ...
        def config_changed(self) -> None: ...
        def reset(self) -> None: ...


# Needs registers or a queue that this transport does not have (SR-IOV, 4.1.4.3 from offset 56 on).
UNSUPPORTED = spec.F_SR_IOV | spec.F_NOTIF_CONFIG_DATA | spec.F_RING_RESET | spec.F_ADMIN_VQ
FAILURES = (ProtocolError, OSError)


class VirtioDevice:
    """See the module; `ram` is where rings may lie, `interrupts` is the transport."""

    def __init__(self, backend: Backend, ram: Sequence[RamRange], interrupts: Interrupts) -> None:
        self.backend = backend
        self.name = backend.name
        self.driver_lock = Lock()
        self.queues = [Queue(index, size) for index, size in enumerate(backend.queue_sizes)]
        self.kicks = [create() for _ in self.queues]
        self.status = 0
        self.driver_features = 0
        # A driver that reads a field past the end of the structure takes the guest down
        # (BUG_ON in Linux), so there is room for all fields even when the backend has fewer.
        self.config_size = max(backend.config_size, kinds.of(backend.device_id).config_size)
        self._ram = ram
        self._interrupts = interrupts
        self._state_lock = Lock()
        self._active: list[Queue] = []
        self._started = False
        self._failed = False
        self._generation = 0
        self._config_changed = False
        backend.on_config_change = self.config_changed
        backend.on_config_refused = self.config_refused
        backend.on_lost = self.backend_lost
        backend.on_away = self.backend_away
        backend.on_back = self.backend_back

    # -- features (2.2) ----------------------------------------------------------------
    @property
    def features(self) -> int:
        """What is offered to the driver."""
        return self.backend.features & ~UNSUPPORTED

    def accept_features(self, features: int) -> None:
        """The driver wrote its choice; too late once FEATURES_OK is set (3.1.1)."""
        if self.status & spec.FEATURES_OK:
            self.complain("features", "changed feature bits after FEATURES_OK")
            return
        self.driver_features = features

    # -- status (2.1) --------------------------------------------------------------------
    def write_status(self, written: int) -> None:
        """The driver wrote device_status; `driver_lock` is held."""
        action = transition(self.status, written)
        if action is None:
            self.complain("status", f"wrote status {written:#x} when it was {self.status:#x}")
        elif action == RESET:
            self._reset()
        elif action == NEGOTIATE:
            self._negotiate(written)
        else:
            self._set_driver_bits(written)
            if action == ACTIVATE:
                self._activate()

    def _set_driver_bits(self, written: int) -> None:
        with self._state_lock:
            self.status = self.status & ~DRIVER_BITS | written & DRIVER_BITS

    def _negotiate(self, written: int) -> None:
        """Keep FEATURES_OK off when the driver took what was not offered (2.2.2) or is a legacy one."""
        unknown = self.driver_features & ~self.features
        if unknown:
            self.complain("negotiate", f"accepted feature bits that are not offered: {unknown:#x}")
        elif not self.driver_features & spec.F_VERSION_1:
            self.complain("negotiate", "did not accept VIRTIO_F_VERSION_1")
        elif self.backend.agree(self.driver_features):  # else another has come meanwhile, which has fewer
            self._set_driver_bits(written)

    def _activate(self) -> None:
        enabled = [queue for queue in self.queues if queue.enabled]
        packed = bool(self.driver_features & spec.F_RING_PACKED)
        for queue in enabled:
            fault = queue.fault(self._ram, packed)
            if fault is not None:
                self.fail(f"queue {queue.index} cannot be used: {fault}")
                return
        self._started = True
        try:
            self.backend.activate(self.driver_features, [self._setup(queue) for queue in enabled])
        except FAILURES as error:
            self.fail(f"the backend did not start: {error}")
            return
        self._active = enabled

    def _setup(self, queue: Queue) -> QueueSetup:
        kick, call = self.kicks[queue.index], self._interrupts.call_fd(queue.vector)
        return QueueSetup(queue.index, queue.size, queue.desc, queue.avail, queue.used, kick, call)

    def _reset(self) -> None:
        """Stop the backend, then forget everything: the driver may reuse its memory once it reads 0."""
        if self._started:
            try:
                self.backend.reset()
            except FAILURES as error:
                log.warn(f"{self.name}: the backend did not reset: {error}")
        else:
            self.backend.agree(0)
        self._started = False
        self._active = []
        with self._state_lock:
            self.status = 0
            self._failed = self._config_changed = False
        self.driver_features = 0
        for queue, kick in zip(self.queues, self.kicks, strict=True):
            queue.reset()
            drain(kick)
        self._interrupts.reset()

    # -- queues ----------------------------------------------------------------------------
    def ring(self, index: int) -> None:
        """A doorbell that came through a register instead of an ioeventfd."""
        if index >= len(self.kicks):
            self.complain("doorbell", f"rang the doorbell of queue {index}, which does not exist")
            return
        signal(self.kicks[index])

    def update_calls(self, queues: Sequence[Queue] | None = None) -> None:
        """Interrupts of running queues (default: all) go elsewhere now; `driver_lock` is held."""
        for queue in self._active if queues is None else queues:
            if queue not in self._active:
                continue
            try:
                self.backend.set_call(queue.index, self._interrupts.call_fd(queue.vector))
            except FAILURES as error:
                self.fail(f"the backend did not take an interrupt descriptor: {error}")
                return

    @property
    def running(self) -> bool:
        """Whether the backend was started and not reset since; queue registers are fixed then."""
        return self._started

    # -- configuration space (2.5) ---------------------------------------------------------
    def read_config(self, offset: int, length: int) -> bytes:
        """`length` bytes; zero where the backend has none."""
        with self._state_lock:
            if self._config_changed:  # 4.1.4.3.1: a new generation once the change may be seen
                self._config_changed = False
                self._generation = self._generation + 1 & 0xFF
        known = max(0, min(length, self.backend.config_size - offset))
        data = self.backend.read_config(offset, known) if known else b""
        return data[:length].ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """Hand a write on; what lies past the backend's end is dropped."""
        known = data[: max(0, self.backend.config_size - offset)]
        if known:
            self.backend.write_config(offset, known)

    @property
    def generation(self) -> int:
        """The configuration's generation, 8 bits."""
        return self._generation

    def config_refused(self) -> None:
        """The backend did not do what the driver asked of its configuration space: ask for a reset."""
        self._need_reset(failed=True)

    # -- what the backend says, in the event loop's thread ------------------------------------
    def config_changed(self) -> None:
        """The backend's configuration changed: tell the driver (2.5.1)."""
        with self._state_lock:
            self._config_changed = True
            if self.status & spec.DRIVER_OK:
                self._interrupts.config_changed()

    def backend_lost(self, reason: str) -> None:
        """The backend is gone: ask the driver for a reset (2.1.2)."""
        self.fail(f"the backend is lost: {reason}")

    def backend_away(self) -> None:
        """The backend is gone, and another one is looked for: ask the driver for a reset meanwhile.

        A driver that acts upon it gets a device that works, sooner or later.
        """
        self._need_reset(failed=False)

    def backend_back(self) -> None:
        """The backend goes on where it stopped: DEVICE_NEEDS_RESET is taken back.

        The specification has no way back from that bit but a reset (2.1.2).  Linux' drivers do not look
        at it, though, and go on waiting for what they asked for, which comes now; a driver that
        looks later would reset a device that works.
        """
        with self._state_lock:
            if not self._failed:
                self.status &= ~spec.NEEDS_RESET

    def fail(self, reason: str) -> None:
        """Set DEVICE_NEEDS_RESET and tell the driver.

        A device that no driver has found keeps status 0: one that waits for a reset to read 0
        would wait for ever.
        """
        if self._need_reset(failed=True):
            log.warn(f"{self.name}: {reason}; the device asks the guest for a reset")

    def _need_reset(self, *, failed: bool) -> bool:
        """Whether that is news to a driver; what `failed` is so until the reset."""
        with self._state_lock:
            if not self.status:
                return False
            known = self.status & spec.NEEDS_RESET
            self.status |= spec.NEEDS_RESET
            self._failed |= failed
            if self.status & spec.DRIVER_OK and not known:  # a driver may read what fails in answer to this
                self._interrupts.config_changed()
        return not known

    def complain(self, key: str, what: str) -> None:
        """Say once what the guest did wrong."""
        log.once((self.name, key), f"{self.name}: the guest {what}; ignored, as will be others")

    def close(self) -> None:
        """Let go of the backend, which stays its owner's, and close the doorbells; no virtual CPU runs."""
        backend = self.backend
        backend.on_config_change = backend.on_config_refused = backend.on_lost = _nothing
        backend.on_away = backend.on_back = _nothing
        for kick in self.kicks:
            os.close(kick)
        self.kicks.clear()


def _nothing(*_: object) -> None:
    """The backend has no device now."""
