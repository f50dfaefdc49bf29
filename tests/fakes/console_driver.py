"""A guest's virtio-console driver over `ring_driver`, with the habits of Linux'.

It answers PORT_ADD with PORT_READY, keeps receive buffers of one page, and remembers what
the device said about each port.
"""

from __future__ import annotations

import struct
import time

from .ring_driver import DriverQueue, Ram, RawFrontend

DEVICE_READY, PORT_ADD, PORT_REMOVE, PORT_READY = 0, 1, 2, 3
CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME = 4, 5, 6, 7
EVENT_IDX = 1 << 29
BAD_ID = 0xFFFF_FFFF
CONTROL_IN, CONTROL_OUT = 2, 3


class ConsoleDriver:
    """Negotiates, starts the queues and speaks the control protocol for `ports` ports."""

    def __init__(self, sock, ports: int, *, features: int | None = None, size: int = 16) -> None:
        self.ram = Ram(16 << 20)
        self.frontend = RawFrontend(sock)
        self.frontend.negotiate(features)
        assert self.frontend.share(self.ram) == 0
        event_idx = features is None or bool(features & EVENT_IDX)
        self.queues = [DriverQueue(self.ram, size, event_idx=event_idx) for _ in range(2 * ports + 2)]
        self.ports = ports
        self.events: list[tuple[int, int, int, bytes]] = []
        self.received = {port: bytearray() for port in range(ports)}

    def rx(self, port: int) -> DriverQueue:
        return self.queues[0 if port == 0 else 2 * port + 2]

    def tx(self, port: int) -> DriverQueue:
        return self.queues[1 if port == 0 else 2 * port + 3]

    def boot(self) -> None:
        """Start everything, announce, and handle the control messages until all is quiet."""
        for index, queue in enumerate(self.queues):
            assert self.frontend.start(index, queue) == 0
        for _ in range(8):
            self.queues[CONTROL_IN].add([], [4096])
        self.queues[CONTROL_IN].kick()
        self.control(BAD_ID, DEVICE_READY, 1)

    def control(self, port: int, event: int, value: int) -> None:
        self.queues[CONTROL_OUT].add([struct.pack("<IHH", port, event, value)])
        self.queues[CONTROL_OUT].kick()
        assert self.queues[CONTROL_OUT].wait(), "the device does not take control messages"

    def poll_control(self, timeout: float = 0.2) -> list[tuple[int, int, int, bytes]]:
        """New control messages; the driver reacts to them as Linux does."""
        fresh = []
        for _, data in self.queues[CONTROL_IN].wait(timeout):
            port, event, value = struct.unpack_from("<IHH", data)
            fresh.append((port, event, value, data[8:]))
            self.queues[CONTROL_IN].add([], [4096])
            self.queues[CONTROL_IN].kick()
            if event == PORT_ADD:
                self.control(port, PORT_READY, 1)
            elif event == CONSOLE_PORT:
                self.control(port, PORT_OPEN, 1)
        self.events += fresh
        return fresh

    def wait_for(self, port: int, event: int, value: int | None = None, timeout: float = 5.0) -> bytes:
        """Run the control queue until the event has come; what followed its header."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            for seen in self.events:
                if seen[:2] == (port, event) and value in (None, seen[2]):
                    self.events.remove(seen)
                    return seen[3]
            self.poll_control()
        raise AssertionError(f"no event {event} for port {port}; there were {self.events}")

    def open(self, port: int) -> None:
        self.control(port, PORT_OPEN, 1)

    def offer(self, port: int, buffers: int = 4, size: int = 4096) -> None:
        for _ in range(buffers):
            self.rx(port).add([], [size])
        self.rx(port).kick()

    def read(self, port: int, count: int, timeout: float = 5.0, size: int = 4096) -> bytes:
        """Exactly `count` bytes from the port; buffers go back to the device."""
        got = self.received[port]
        end = time.monotonic() + timeout
        while len(got) < count and time.monotonic() < end:
            for _, data in self.rx(port).wait(0.2):
                got += data
                self.offer(port, 1, size)
        result = bytes(got[:count])
        del got[:count]
        return result

    def write(self, port: int, data: bytes, wait: bool = True) -> None:
        self.tx(port).add([data])
        self.tx(port).kick()
        if wait:
            assert self.tx(port).wait(), "the device does not take output"

    def shut_down(self) -> None:
        for index in range(len(self.queues)):
            self.frontend.stop(index)

    def close(self) -> None:
        self.frontend.close()
        queues, self.queues = self.queues, []
        if not queues:
            return
        for queue in queues:
            queue.close()
        self.ram.close()
