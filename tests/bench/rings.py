"""A virtqueue driven from C, for benchmarks of backends without a guest.

It owns the ring's memory, the library made of ring_driver.c, and the frontend of tests/fakes
that sets the queue up.  It must not know what the device does with the chains.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fakes.ring_driver import DriverQueue, Ram, RawFrontend

SOURCE = Path(__file__).with_name("ring_driver.c")
VERSION_1, PROTOCOL = 1 << 32, 1 << 30
NEXT, WRITE = 1, 2


class Job(ctypes.Structure):
    """struct job of ring_driver.c."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("desc", ctypes.c_uint64),
        ("avail", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("depth", ctypes.c_uint32),
        ("step", ctypes.c_uint32),
        ("kick", ctypes.c_int32),
        ("call", ctypes.c_int32),
        ("timeout_ms", ctypes.c_uint32),
        ("headers", ctypes.c_uint64),
        ("sectors", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
    )


def compiled(source: Path, *options: str) -> str:
    """Path of what `source` compiles to, kept between runs."""
    digest = hashlib.sha256(source.read_bytes() + " ".join(options).encode()).hexdigest()[:12]
    target = Path(tempfile.gettempdir()) / f"pyvmm-bench-{os.getuid()}-{source.stem}-{digest}"
    if not target.exists():
        fresh = f"{target}.{os.getpid()}"
        subprocess.run(["cc", "-O2", "-Wall", *options, "-o", fresh, str(source)], check=True)
        os.rename(fresh, target)
    return str(target)


class Driven:
    """One queue, of a backend behind `sock` if there is one, with room for `depth` chains in flight."""

    def __init__(self, sock: socket.socket | None, size: int = 256, depth: int = 32) -> None:
        self.ram = Ram(8 << 20)
        self.size, self.depth = size, depth
        self.queue = DriverQueue(self.ram, size)
        self.frontend = RawFrontend(sock, 60.0) if sock is not None else None
        self.job = Job(size=size, depth=depth, timeout_ms=60_000)
        self._library = ctypes.CDLL(compiled(SOURCE, "-shared", "-fPIC"))
        self._anchor = ctypes.c_char.from_buffer(self.ram.data)

    def open(self, features: int = 0) -> None:
        """Negotiate `features` beside VERSION_1, and start the queue."""
        assert self.frontend is not None
        self.frontend.negotiate(features | VERSION_1 | PROTOCOL)
        assert self.frontend.share(self.ram) == 0
        assert self.frontend.start(0, self.queue) == 0

    def echo_chains(self, length: int) -> None:
        """Each chain: `length` bytes to read, as many to write, in the order of their slots."""
        self.job.step = 2
        self.source, self.target = (self.ram.alloc(length * self.depth, 4096) for _ in range(2))
        for slot in range(self.depth):
            at = length * slot
            self._chain(2 * slot, [(self.source + at, length, 0), (self.target + at, length, WRITE)])

    def blk_chains(self, length: int, sectors: int) -> None:
        """Each chain: a read of `length` bytes at a random place below `sectors`."""
        self.job.step, self.job.sectors = 3, sectors
        self.job.headers = self.ram.put(struct.pack("<IIQ", 0, 0, 0) * self.depth)
        for slot in range(self.depth):
            header = self.job.headers + 16 * slot
            data, status = self.ram.alloc(length, 4096), self.ram.alloc(1)
            self._chain(3 * slot, [(header, 16, 0), (data, length, WRITE), (status, 1, WRITE)])

    def _chain(self, first: int, rows: list[tuple[int, int, int]]) -> None:
        for i, (address, length, flags) in enumerate(rows):
            last = i + 1 == len(rows)
            self.queue.descriptor(
                first + i, address, length, flags | (0 if last else NEXT), 0 if last else first + i + 1
            )

    def run(self, count: int) -> float:
        """Seconds that `count` chains took."""
        job, queue = self.job, self.queue
        job.memory = ctypes.addressof(self._anchor)
        job.desc, job.avail, job.used = queue.desc, queue.avail, queue.used
        job.kick, job.call, job.count, job.bytes = queue.kick_fd, queue.call_fd, count, 0
        start = time.perf_counter()
        if self._library.drive(ctypes.byref(job)):
            raise TimeoutError("the backend did not answer")
        return time.perf_counter() - start

    def close(self) -> None:
        """Stop the queue and hang up."""
        if self.frontend is not None:
            self.frontend.stop(0)
            self.frontend.close()
        self.queue.close()
        del self._anchor
        self.ram.close()


def connect(path: str, seconds: float = 20.0) -> socket.socket:
    """A connection to the program that is about to listen at `path`."""
    end = time.monotonic() + seconds
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
            return sock
        except OSError:
            sock.close()
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
