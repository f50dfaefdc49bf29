"""`scripts/bench blk`: 4 KiB random reads through our block backend and qemu-storage-daemon.

One queue, driven from C, of an image in the page cache; runs are interleaved, and the median
of each is told.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from options import number
from rings import Driven, connect

from pyvmm.host import backends

SIZE = 256 << 20


def ours(image: str, path: str) -> list[str]:
    """Our program's command."""
    return [sys.executable, "-P", "-m", "pyvmm.backend.blk", "--socket-path", path, "--blk-file", image]


def daemon(image: str, path: str) -> list[str]:
    """The peer's command."""
    program = backends.find_program("qemu-storage-daemon")
    if program is None:
        raise SystemExit("qemu-storage-daemon is missing: apt install qemu-system-common qemu-utils")
    export = f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={path},writable=on"
    return [program, "--blockdev", f"driver=file,node-name=d,filename={image}", "--export", export]


def reads_a_second(command: list[str], path: str, depth: int, count: int) -> float:
    """One run of a backend from its start on."""
    with subprocess.Popen(command) as process:
        try:
            driven = Driven(connect(path), size=128, depth=depth)
            driven.open()
            driven.blk_chains(4096, SIZE // 512)
            driven.run(max(1, count // 10))
            seconds = driven.run(count)
            driven.close()
        finally:
            process.terminate()
    return count / seconds


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=number, default=5)
    parser.add_argument("--count", type=number, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        image = str(Path(folder) / "image")
        Path(image).write_bytes(os.urandom(1 << 20) * (SIZE >> 20))
        for depth in (1, 32):
            results: dict[str, list[float]] = {"pyvmm.backend.blk": [], "qemu-storage-daemon": []}
            for turn in range(arguments.runs):
                for (_, found), make in zip(results.items(), (ours, daemon), strict=True):
                    path = str(Path(folder) / f"{turn}-{make.__name__}-{depth}")
                    found.append(reads_a_second(make(image, path), path, depth, arguments.count))
            for name, found in results.items():
                print(f"depth {depth:2}  {name:20}  {statistics.median(found):9.0f} reads/s", flush=True)


if __name__ == "__main__":
    main()
