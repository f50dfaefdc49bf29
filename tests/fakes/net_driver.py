"""The driver's side of a network device, and the other end of a stream wire.

`Card` is both virtqueues over `ring_driver`, `Peer` speaks QEMU's `-netdev stream`.  Numbers are those
of virtio 1.3, section 5.1.
"""

from __future__ import annotations

import struct
import time
from pathlib import Path

from fakes.ring_driver import DriverQueue, Ram, RawFrontend, receive_backend_request

from pyvmm.vhost_user.payloads import Config

RX, TX = 0, 1
VERSION_1, EVENT_IDX, PROTOCOL_FEATURES = 1 << 32, 1 << 29, 1 << 30
F_CSUM, F_GUEST_CSUM, F_MTU, F_MAC, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6, F_STATUS = (
    1 << bit for bit in (0, 1, 3, 5, 7, 8, 11, 12, 16)
)
PLAIN = VERSION_1 | PROTOCOL_FEATURES | EVENT_IDX
NO_HEADER = bytes(12)
RECEIVED = bytes(10) + b"\1\0"  # no flags, one buffer
NEEDS_CSUM = struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 6, 0)
EXPERIMENT = 0x88B5  # an EtherType that the IEEE leaves for such things
MAC, OTHER = bytes.fromhex("525400123456"), bytes.fromhex("525400654321")


def frame(number=0, size=60):
    """An Ethernet frame, none like the others."""
    return (OTHER + MAC + struct.pack(">HI", EXPERIMENT, number)).ljust(size, bytes([number % 251]))


class Card:
    """The driver's side: both queues, and words for what a driver does."""

    def __init__(self, sock, features=None, size=256, ram=8 << 20):
        self.ram = Ram(ram)
        self.frontend = RawFrontend(sock)
        self.offered = self.frontend.negotiate(features)
        self.frontend.share(self.ram)
        event_idx = features is None or bool(features & EVENT_IDX)
        self.queues = [DriverQueue(self.ram, size, event_idx=event_idx) for _ in range(2)]
        self.words = self.frontend.backend_channel()

    def start(self):
        for index, queue in enumerate(self.queues):
            assert self.frontend.start(index, queue) == 0
        return self

    def give(self, count=1, room=2048):
        """Buffers to receive into."""
        for _ in range(count):
            self.queues[RX].add([], [room])
        self.queues[RX].kick()

    def receive(self, count=1, seconds=10.0):
        got = []
        end = time.monotonic() + seconds
        while len(got) < count and time.monotonic() < end:
            got += [data for _, data in self.queues[RX].wait(0.1)]
        return got

    def send(self, *parts):
        """One chain to transmit; true once the device has given it back."""
        self.queues[TX].add(list(parts))
        self.queues[TX].kick()
        return bool(self.queues[TX].wait())

    def status(self):
        (status,) = struct.unpack("<H", self.config(6, 2))
        return status

    def config(self, offset, size):
        return self.frontend.ask("GET_CONFIG", Config(offset, 0, bytes(size))).data

    def told(self):
        """The name of the device's next word of its own."""
        return receive_backend_request(self.words).request.name

    def close(self):
        for thing in (self.words, self.frontend, *self.queues, self.ram):
            thing.close()


class Peer:
    """The other end of a stream."""

    def __init__(self, listener):
        self.sock, _ = listener.accept()
        self.sock.settimeout(10)

    def send(self, *frames):
        self.sock.sendall(b"".join(struct.pack(">I", len(data)) + data for data in frames))

    def receive(self):
        (size,) = struct.unpack(">I", self._exactly(4))
        return self._exactly(size)

    def _exactly(self, size):
        data = b""
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def close(self):
        self.sock.close()


def cpu_ticks(pid):
    """What a process has used so far, in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
