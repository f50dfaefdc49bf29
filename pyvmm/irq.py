"""Guest interrupts: GSI numbers, MSI routes, irqfds and shared interrupt lines.

It owns the GSI table of one virtual machine.  KVM takes that table only as a whole
(KVM_SET_GSI_ROUTING replaces everything), so all routes live here, the IOAPIC's and the
PICs' pins included.  It must not know what raises an interrupt or why.
"""

from __future__ import annotations

import errno
from _thread import allocate_lock as Lock

from . import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    Route = tuple[int, int, int, int, int]  # gsi, kind, then chip, pin, 0 or addr_lo, addr_hi, data

    class InterruptVm(Protocol):
        """What is used of the native Vm."""

        def set_gsi_routing(self, routes: list[Route], /) -> None: ...
        def irqfd(self, fd: int, gsi: int, assign: bool = True) -> None: ...
        def irq_line(self, gsi: int, level: bool, /) -> None: ...


ROUTE_IRQCHIP, ROUTE_MSI = 1, 2  # KVM_IRQ_ROUTING_*
PIC_MASTER, PIC_SLAVE, IOAPIC = 0, 1, 2  # KVM_IRQCHIP_*
PIC_PINS = 8
MAX_ROUTES = 4096  # KVM_MAX_IRQ_ROUTES on x86
MAX_VECTORS = MAX_ROUTES - layout.GSI_COUNT - 2 * PIC_PINS  # that MSI leaves for all devices


def default_routes() -> list[Route]:
    """The table that KVM_CREATE_IRQCHIP sets up: every pin of the PICs and of the IOAPIC."""
    routes: list[Route] = [(pin, ROUTE_IRQCHIP, IOAPIC, pin, 0) for pin in range(layout.GSI_COUNT)]
    routes += [(pin, ROUTE_IRQCHIP, PIC_MASTER, pin, 0) for pin in range(PIC_PINS)]
    routes += [(PIC_PINS + pin, ROUTE_IRQCHIP, PIC_SLAVE, pin, 0) for pin in range(PIC_PINS)]
    return routes


class IrqLine:
    """One source on a level-triggered pin; the pin is high while any of its sources is."""

    __slots__ = ("_gsi", "_router")

    def __init__(self, router: InterruptRouter, gsi: int) -> None:
        self._router = router
        self._gsi = gsi

    def set(self, level: bool) -> None:
        """Raise or lower this source."""
        self._router.set_source(self._gsi, self, level)


class InterruptRouter:
    """The GSI table of a virtual machine; every method may be called from any thread.

    Failures of KVM are OSError; a full table is OSError(ENOSPC).
    """

    def __init__(self, vm: InterruptVm) -> None:
        self._vm = vm
        self._lock = Lock()
        self._pins = default_routes()
        self._msi: dict[int, Route] = {}
        self._free: list[int] = []
        self._next = layout.GSI_COUNT
        self._raised: dict[int, set[IrqLine]] = {}

    def allocate_gsi(self) -> int:
        """Reserve a GSI for an MSI route."""
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._next - layout.GSI_COUNT + len(self._pins) >= MAX_ROUTES:
                raise OSError(errno.ENOSPC, f"all {MAX_ROUTES} interrupt routes of KVM are taken")
            self._next += 1
            return self._next - 1

    def free_gsi(self, gsi: int) -> None:
        """Give back what `allocate_gsi` gave; its irqfd must be gone."""
        try:
            self.clear(gsi)
        finally:
            with self._lock:
                self._free.append(gsi)

    def set_msi(self, gsi: int, address: int, data: int) -> None:
        """Route `gsi` to the message `data` written at `address`; free when it is so already."""
        route = (gsi, ROUTE_MSI, address & 0xFFFF_FFFF, address >> 32, data)
        with self._lock:
            before = self._msi.get(gsi)
            if before == route:
                return
            self._msi[gsi] = route
            try:
                self._commit()
            except OSError:
                if before is None:
                    del self._msi[gsi]
                else:
                    self._msi[gsi] = before
                raise

    def clear(self, gsi: int) -> None:
        """Forget the MSI route of `gsi`; harmless when it has none."""
        with self._lock:
            if self._msi.pop(gsi, None) is not None:
                self._commit()

    def assign(self, fd: int, gsi: int) -> None:
        """Let writes to the eventfd `fd` raise `gsi`, inside the kernel."""
        self._vm.irqfd(fd, gsi, assign=True)

    def deassign(self, fd: int, gsi: int) -> None:
        """Undo `assign`; afterwards the eventfd just counts."""
        self._vm.irqfd(fd, gsi, assign=False)

    def line(self, gsi: int) -> IrqLine:
        """A new source on the pin `gsi`; several may share one pin."""
        return IrqLine(self, gsi)

    def set_source(self, gsi: int, source: IrqLine, level: bool) -> None:
        """Change one source's level and the pin's when that changes it (see `IrqLine.set`)."""
        with self._lock:
            raised = self._raised.setdefault(gsi, set())
            before = bool(raised)
            (raised.add if level else raised.discard)(source)
            if bool(raised) != before:
                self._vm.irq_line(gsi, level)

    def _commit(self) -> None:
        self._vm.set_gsi_routing([*self._pins, *self._msi.values()])
