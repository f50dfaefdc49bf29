"""`scripts/bench echo`: buffers through our echo device, beside a loop written in C.

First the speed of both loops, one queue driven from C, interleaved; then ten million buffers
across a thousand reconnects, in which every byte that comes back is checked.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from options import number
from rings import Driven, compiled, connect

from pyvmm.backend.process import spawn

LENGTH = 64
LOOP = Path(__file__).with_name("echo_loop.c")


class Ring(ctypes.Structure):
    """struct ring of echo_loop.c."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("memory_size", ctypes.c_uint64),
        ("desc", ctypes.c_uint64),
        ("avail", ctypes.c_uint64),
        ("used", ctypes.c_uint64),
        ("size", ctypes.c_uint32),
        ("kick", ctypes.c_int32),
        ("call", ctypes.c_int32),
        ("stop", ctypes.c_int32),
        ("count", ctypes.c_uint64),
    )


class Loop:
    """The loop in C, in a process of its own, over the memory of a `Driven`."""

    def __init__(self, driven: Driven) -> None:
        queue, self._stop = driven.queue, os.eventfd(0)
        anchor = ctypes.c_char.from_buffer(driven.ram.data)
        ring = Ring(
            ctypes.addressof(anchor), driven.ram.size, queue.desc, queue.avail, queue.used, queue.size,
            queue.kick_fd, queue.call_fd, self._stop, 0,
        )  # fmt: skip
        library = ctypes.CDLL(compiled(LOOP, "-shared", "-fPIC"))
        self._pid = os.fork()
        if not self._pid:
            os._exit(1 if library.echo_loop(ctypes.byref(ring)) else 0)

    def close(self) -> None:
        os.eventfd_write(self._stop, 1)
        assert os.waitpid(self._pid, 0)[1] == 0
        os.close(self._stop)


def make_echo() -> object:
    """In the child: the device."""
    from pyvmm.backend.echo import Echo

    return Echo()


def ours(depth: int, count: int) -> float:
    """Buffers a second through our device."""
    process = spawn(make_echo)  # type: ignore[arg-type]
    driven = Driven(process.take_socket(), depth=depth)
    driven.open()
    rate = measured(driven, count)
    driven.close()
    process.close()
    return rate


def in_c(depth: int, count: int) -> float:
    """Buffers a second through the loop in C."""
    driven = Driven(None, depth=depth)
    loop = Loop(driven)
    rate = measured(driven, count)
    loop.close()
    driven.close()
    return rate


def measured(driven: Driven, count: int) -> float:
    """Warm up, then count."""
    driven.echo_chains(LENGTH)
    driven.run(count // 10)
    return count / driven.run(count)


def connection(path: str, count: int, depth: int = 64) -> tuple[int, int]:
    """Checksums of `count` buffers before and after they went through one connection."""
    driven = Driven(connect(path), size=128, depth=depth)
    driven.open()
    driven.echo_chains(LENGTH)
    memory, sent, back = driven.ram.data, 0, 0
    for start in range(0, count, depth):
        batch = min(depth, count - start)
        data = os.urandom(LENGTH * batch)
        memory[driven.source : driven.source + len(data)] = data
        driven.run(batch)
        sent = zlib.crc32(data, sent)
        back = zlib.crc32(memory[driven.target : driven.target + len(data)], back)
    driven.close()
    return sent, back


def reconnects(connections: int, buffers: int) -> float:
    """Seconds that so many buffers took, over so many connections to one process, all checked."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "echo.sock")
        command = [sys.executable, "-P", "-m", "pyvmm.backend.echo", "--socket-path", path]
        with subprocess.Popen(command) as process:
            try:
                start = time.perf_counter()
                for turn in range(connections):
                    count = buffers * (turn + 1) // connections - buffers * turn // connections
                    sent, back = connection(path, count)
                    assert sent == back, f"connection {turn}: other bytes came back"
                return time.perf_counter() - start
            finally:
                process.terminate()


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=number, default=7)
    parser.add_argument("--count", type=number, default=2_000_000)
    parser.add_argument("--connections", type=number, default=1000)
    parser.add_argument("--buffers", type=number, default=10_000_000)
    arguments = parser.parse_args()
    for depth in (1, 64):
        count = max(1, arguments.count // (10 if depth == 1 else 1))
        pairs = [(ours(depth, count), in_c(depth, count)) for _ in range(arguments.runs)]
        mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"depth {depth:2}: echo {mine:9.0f} buffers/s, in C {theirs:9.0f}: {theirs / mine:.2f} times",
            flush=True,
        )
    seconds = reconnects(arguments.connections, arguments.buffers)
    print(
        f"{arguments.buffers} buffers over {arguments.connections} connections, "
        f"checksums equal, in {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
