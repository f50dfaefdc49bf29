"""Boots a guest that verifies a disk, and kills the disk's backend over and over; JSON on standard output.

It runs next to a KVM that runs Linux: `python killer.py SETUP`, where SETUP is JSON with `mode`
(a row of MODES), `kernel`, `initramfs`, `folder`, `workers`, `kills`, and `seconds` for all of it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyvmm._native.vring import Chain
from pyvmm.backend.blk import Blk
from pyvmm.backend.loop import DeviceLoop
from pyvmm.backend.queue import Queue
from pyvmm.backend.server import serve

BLOCK, REGION = 4096, 64  # as in verify.c
HELD_BACK = "the device waits until the guest resets it"  # what pyvmm says then
PROGRESS = 2  # operations that worker 0 finishes between two kills


class Overtaking(Blk):
    """Answers requests late, and in any order."""

    def open(self, loop: DeviceLoop) -> None:
        super().open(loop)
        self._loop = loop
        self._taken: list[Chain] = []

    def on_queue(self, queue: Queue) -> None:
        for chain in queue:
            queue.keep(chain)
            self._taken.append(chain)
            self._loop.call_later(random.uniform(0, 0.02), lambda: self._finish(queue))

    def on_stop(self, queue: Queue) -> None:
        while self._taken:
            self._finish(queue)

    def _finish(self, queue: Queue) -> None:
        if self._taken:
            self._serve(self._taken.pop(random.randrange(len(self._taken))))
            queue.notify()


class Served:
    """A backend of ours: processes that are forked one after the other, at one listening socket."""

    def __init__(self, make: Callable[[str], Blk], image: str, path: str) -> None:
        self.make, self.image = make, image
        self.listener = socket.socket(socket.AF_UNIX)
        Path(path).unlink(missing_ok=True)
        self.listener.bind(path)
        self.listener.listen(1)
        self.option = ["--generic-vhost-user", f"socket={path},device_type=blk,queue_sizes=[128]"]
        self.pid = self._fork()

    def _fork(self) -> int:
        pid = os.fork()
        if not pid:
            try:
                serve(self.make(self.image), self.listener.fileno())
            finally:
                os._exit(1)
        return pid

    def kill(self, pyvmm: int) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.pid = self._fork()

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Started:
    """qemu-storage-daemon, which pyvmm starts itself."""

    def __init__(self, image: str) -> None:
        self.option = ["--disk", f"path={image}"]

    def kill(self, pyvmm: int) -> None:
        found = ""
        while not found:
            found = " ".join(
                path.read_text() for path in Path(f"/proc/{pyvmm}/task").glob("*/children")
            ).strip()
        for pid in found.split():
            if "qemu-storage" in Path(f"/proc/{pid}/comm").read_text():
                os.kill(int(pid), signal.SIGKILL)

    def close(self) -> None:
        """pyvmm ends it."""


MODES: dict[str, Callable[[str, str], Any]] = {
    "blk": lambda image, path: Served(Blk, image, path),
    "overtaking": lambda image, path: Served(Overtaking, image, path),
    "storage daemon": lambda image, path: Started(image),
}


def progress(image: int) -> int:
    """How many operations worker 0 has done."""
    return max(
        int.from_bytes(os.pread(image, 8, (1 + slot) * BLOCK), sys.byteorder) for slot in range(REGION)
    )


def main(setup: dict[str, Any]) -> dict[str, Any]:
    """Play it; what was seen."""
    folder, end = setup["folder"], time.monotonic() + setup["seconds"]
    image = f"{folder}/image"
    with open(image, "wb") as file:
        file.truncate((1 + setup["workers"] * REGION) * BLOCK)
    disk = os.open(image, os.O_RDWR)
    backend = MODES[setup["mode"]](image, f"{folder}/socket")
    log = open(f"{folder}/log", "w+")  # noqa: SIM115
    machine = subprocess.Popen(
        [sys.executable, "-P", "-m", "pyvmm", "--kernel", setup["kernel"], "--initramfs", setup["initramfs"]]
        + ["--console", "off", "--serial", f"file={folder}/serial", *backend.option]
        + ["--cmdline", f"console=ttyS0 quiet panic=-1 -- {setup['workers']}"],
        stdout=log,
        stderr=log,
    )
    seen: dict[str, Any] = {"kills": 0, "stuck": False}
    done, begin = 0, 0.0
    while seen["kills"] < setup["kills"] and machine.poll() is None:
        now = progress(disk)
        if now >= done + PROGRESS:
            begin = begin or time.monotonic()
            time.sleep(random.uniform(0, 0.02))
            backend.kill(machine.pid)
            done = progress(disk)
            seen["kills"] += 1
        elif time.monotonic() > end or HELD_BACK in Path(log.name).read_text():
            seen["stuck"] = True
            break
        time.sleep(0.002)
    seen["seconds"] = time.monotonic() - begin
    os.pwrite(disk, b"\1", 0)
    if seen["stuck"]:
        machine.terminate()
    seen["status"] = machine.wait(120)
    backend.close()
    log.seek(0)
    seen["log"] = log.read()
    seen["serial"] = Path(f"{folder}/serial").read_text(errors="replace")
    return seen


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
