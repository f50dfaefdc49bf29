"""A virtio console with any number of ports, each tied to descriptors of the host.

virtio 1.3, section 5.3, and Linux' drivers/char/virtio_console.c.  It owns the configuration
space and the control dialogue; the bytes flow in `port`.  It must not know what they mean,
nor who runs the device.
"""

from __future__ import annotations

import os
from struct import Struct
from struct import error as StructError

from .config import ConfigSpace
from .device import Device
from .port import Port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .endpoints import PortConfig
    from .loop import DeviceLoop
    from .queue import Queue

F_SIZE, F_MULTIPORT, F_EMERG_WRITE = 1 << 0, 1 << 1, 1 << 2

DEVICE_READY, PORT_ADD, PORT_REMOVE, PORT_READY = 0, 1, 2, 3
CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = 4, 5, 6, 7
CONTROL = Struct("<IHH")  # port, event, value
# rows first, unlike the specification's text: what Linux has read since 2010
SIZE = Struct("<HH")
CONTROL_IN, CONTROL_OUT = 2, 3


class Console(Device):
    """The console device; port 0 is the only one for a driver without MULTIPORT.

    A lone console does not offer MULTIPORT: then Linux has hvc0 as soon as its driver is there, while a port
    that the control dialogue makes may come after the first process has looked for a console.
    """

    device_id = 3
    features = F_SIZE | F_MULTIPORT | F_EMERG_WRITE

    def __init__(self, ports: Sequence[PortConfig], queue_size: int = 128, resize_fd: int = -1) -> None:
        super().__init__()
        self.queue_sizes = (queue_size,) * (2 * len(ports) + 2)
        self.config = ConfigSpace((("cols", 2), ("rows", 2), ("max_nr_ports", 4), ("emerg_wr", 4)))
        self.config["max_nr_ports"] = len(ports)
        self.ports: tuple[Port, ...] = ()
        self._configs = tuple(ports)
        if len(ports) == 1 and ports[0].console and not ports[0].name:
            self.features &= ~F_MULTIPORT
        self._size_due = False  # a lone console's, until the driver surely looks for changes
        self._resize_fd = resize_fd
        # what waits for the guest's control buffers; one entry an event, so it stays small
        self._outbox: dict[tuple[int, int], bytes] = {}
        self._loop: DeviceLoop | None = None

    def open(self, loop: DeviceLoop) -> None:
        self._loop = loop
        self.ports = tuple(Port(i, config, self.announce, loop) for i, config in enumerate(self._configs))
        if self._resize_fd >= 0:
            loop.add_reader(self._resize_fd, self._on_resize)

    def close(self) -> None:
        for port in self.ports:
            port.close()
        self.ports = ()
        self._end_resizing()

    def resize(self, number: int, columns: int, rows: int) -> None:
        """The terminal behind port `number` has this size now."""
        if number >= len(self.ports):
            return
        self.ports[number].size = (columns, rows)
        self._announce_size(self.ports[number])
        if number == 0:
            self.config["cols"], self.config["rows"] = columns, rows
            self.config_changed()

    # -- queues ------------------------------------------------------------------------------

    @property
    def multiport(self) -> bool:
        """Whether the driver took MULTIPORT; otherwise there is no control queue."""
        return bool(self.driver_features & F_MULTIPORT)

    def port_of(self, queue: Queue) -> Port | None:
        """The port that owns `queue`; None for the control queues (section 5.3.2)."""
        pair = queue.index // 2
        return None if pair == 1 else self.ports[pair - (pair > 1)]

    def on_start(self, queue: Queue) -> None:
        port = self.port_of(queue)
        if port is None:
            if queue.index == CONTROL_OUT and queue.fresh:
                self._forget_guest()
        elif queue.index % 2:
            port.tx = queue
            self._size_due = not self.multiport and port.size is not None
        else:
            port.rx = queue
            if not self.multiport:
                port.guest_open = True
            elif queue.fresh:
                port.guest_open = False

    def on_queue(self, queue: Queue) -> None:
        port = self.port_of(queue)
        if queue.index == CONTROL_OUT:
            self._on_control(queue)
        elif port is None:
            self._send_outbox()
        elif queue.index % 2:
            if self._size_due:
                self._size_due = False
                self.config_changed()
            port.pump_out()
        else:
            port.resume_input()

    def on_stop(self, queue: Queue) -> None:
        port = self.port_of(queue)
        if port is None:
            return
        if queue.index % 2:
            port.stop_tx(queue)
        else:
            port.stop_rx(queue)

    def on_reset(self) -> None:
        self._forget_guest()

    def on_disconnect(self) -> None:
        self._forget_guest()

    def _forget_guest(self) -> None:
        """A new driver begins: it has opened nothing yet."""
        self._outbox.clear()
        for port in self.ports:
            port.guest_open = False
            port.pause_input()

    def on_config_write(self, offset: int, data: bytes) -> None:
        """Only emerg_wr can be written: one character for port 0 (section 5.3.4)."""
        if self.ports and self.config.covers("emerg_wr", offset, len(data)) and offset == 8:
            self.ports[0].emergency(data[:1])

    # -- control (section 5.3.6.2) -------------------------------------------------------------

    def announce(self, port: Port) -> None:
        """Tell the guest whether the host's side of `port` is open."""
        self._tell(port, PORT_OPEN, int(port.host_open))

    def _on_control(self, queue: Queue) -> None:
        for chain in queue:
            try:
                number, event, value = CONTROL.unpack(chain.read(CONTROL.size))
            except StructError:
                continue
            if event == DEVICE_READY:
                self._on_device_ready(value)
            elif number < len(self.ports) and event in CONTROL_EVENTS:
                CONTROL_EVENTS[event](self, self.ports[number], value)
        self._send_outbox()

    def _on_device_ready(self, value: int) -> None:
        self._forget_guest()
        for port in self.ports if value else ():
            self._tell(port, PORT_ADD, 1)

    def _on_port_ready(self, port: Port, value: int) -> None:
        if not value:
            return
        if port.config.console:
            self._tell(port, CONSOLE_PORT, 1)
            self._announce_size(port)
        if port.config.name:
            self._tell(port, PORT_NAME, 1, port.config.name.encode())
        self.announce(port)

    def _on_port_open(self, port: Port, value: int) -> None:
        port.guest_open = bool(value)
        if value:
            port.resume_input()
        else:
            port.pause_input()

    def _announce_size(self, port: Port) -> None:
        if port.size is not None:
            columns, rows = port.size
            self._tell(port, RESIZE, 0, SIZE.pack(rows, columns))

    def _tell(self, port: Port, event: int, value: int, rest: bytes = b"") -> None:
        key = (port.number, event)
        self._outbox.pop(key, None)  # a later state replaces an earlier one, in the later place
        self._outbox[key] = CONTROL.pack(port.number, event, value) + rest
        self._send_outbox()

    def _send_outbox(self) -> None:
        queues = self.queues
        if not self.multiport or not queues or not queues[CONTROL_IN].running:
            return
        for key in list(self._outbox):
            chain = queues[CONTROL_IN].pop()
            if chain is None:
                break
            chain.write(self._outbox.pop(key))
            chain.push()
        queues[CONTROL_IN].notify()

    # -- size of the terminal, told by the process that has it -----------------------------------

    def _on_resize(self) -> None:
        try:
            data = os.read(self._resize_fd, CONTROL.size)
        except OSError:
            data = b""
        if len(data) == CONTROL.size:
            self.resize(*CONTROL.unpack(data))
        else:
            self._end_resizing()

    def _end_resizing(self) -> None:
        if self._resize_fd >= 0:
            assert self._loop is not None
            self._loop.remove_reader(self._resize_fd)
            os.close(self._resize_fd)
            self._resize_fd = -1


CONTROL_EVENTS: dict[int, Callable[[Console, Port, int], None]] = {
    PORT_READY: Console._on_port_ready,
    PORT_OPEN: Console._on_port_open,
}


if __name__ == "__main__":
    from .console_program import run

    run()
