"""A real virtiofsd and a real qemu-storage-daemon, killed at every message of their lives.

Each is killed when it has read a request and before it carries it out, before it answers, and
after it has answered.  Whenever that is, the frontend says so in time, and nothing is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes.backend import no_new_fds
from fakes.ring import Memory, Ring
from fakes.traced import Traced

from pyvmm.config import DiskDevice, FsDevice
from pyvmm.errors import ConfigError, ProtocolError
from pyvmm.host import backends
from pyvmm.host.handover import BackendProcess
from pyvmm.loop import EventLoop
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.virtio import kinds

VERSION_1 = 1 << 32
TAG = b"tag".ljust(40, b"\0")
MOMENTS = ("recvmsg leave", "sendmsg enter", "sendmsg leave")


def start_fs(folder: Path) -> BackendProcess:
    return backends.start_virtiofsd(FsDevice("tag", str(folder)))


def start_disk(folder: Path) -> BackendProcess:
    image = folder / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    return backends.start_disk(DiskDevice(str(image)))


DEVICES: dict[str, tuple[Callable[[Path], BackendProcess], str, int, bytes | None]] = {
    "virtiofsd": (start_fs, "fs", 2, TAG),
    "qemu-storage-daemon": (start_disk, "block", 1, None),
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if backends.find_virtiofsd() is None or backends.find_program("qemu-storage-daemon") is None:
        pytest.skip("virtiofsd or qemu-storage-daemon is missing; apt install qemu-system-common qemu-utils")
    with no_new_fds():
        yield str(request.param)


class Life:
    """One device from connecting to closing, with everything that a guest makes it say."""

    def __init__(self, device: str, folder: Path, moment: str = "") -> None:
        start, kind, queues, config = DEVICES[device]
        self.failed_at = ""
        self.lost: list[str] = []
        self.reached_the_end = False
        found = kinds.by_name(kind)
        assert found is not None
        memory, loop, process = Memory(), EventLoop(), start(folder)
        rings = [Ring(memory, index) for index in range(queues)]
        try:
            with Traced(process.pid, moment) as traced:
                try:
                    frontend = Frontend(
                        process.endpoint, found, (128,) * queues, config, memory.ram, loop, 5.0
                    )
                except ConfigError:
                    self.failed_at = "connect"
                else:
                    self._use(frontend, loop, rings, moment)
                    self.reached_the_end = not process.child.ended()
                    frontend.close()
                process.close()
            self.seen = traced.seen
        finally:
            for ring in rings:
                ring.close()
            loop.close()
            memory.close()

    def _use(self, frontend: Frontend, loop: EventLoop, rings: list[Ring], moment: str) -> None:
        def note(reason: str) -> None:
            self.lost.append(reason)
            loop.stop()

        frontend.on_lost = note
        frontend.start_watching()
        steps: dict[str, Callable[[], object]] = {
            "read": lambda: frontend.read_config(0, 8),
            "activate": lambda: frontend.activate(VERSION_1, [ring.setup for ring in rings]),
            "move": lambda: frontend.set_call(0, None),
            "reset": frontend.reset,
            "again": lambda: frontend.activate(VERSION_1, [ring.setup for ring in rings]),
        }
        for name, step in steps.items():
            try:
                step()
            except ProtocolError:
                self.failed_at = self.failed_at or name
        loop.call_later(5.0 if moment else 0.05, loop.stop)
        loop.run()


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What each backend does in a life in which nobody is killed."""
    undisturbed = {name: Life(name, tmp_path_factory.mktemp("life")) for name in DEVICES}
    assert [(life.failed_at, life.lost) for life in undisturbed.values()] == [("", [])] * len(DEVICES)
    return {name: life.seen for name, life in undisturbed.items()}


@pytest.mark.parametrize("what", MOMENTS)
def test_killed_at_every_message(
    device: str, what: str, lives: dict[str, dict[str, int]], tmp_path: Path
) -> None:
    count = lives[device][what]
    assert count >= 5
    stages = []
    for number in range(1, count + 1):
        life = Life(device, tmp_path, f"{what} {number}")
        if life.reached_the_end and not life.lost:
            break  # it read more at a time than when nobody was killed, so the moment comes too late
        told = life.failed_at == "connect" or len(life.lost) == 1
        assert told, f"killed at {what} {number}: failed at {life.failed_at!r}, lost {life.lost}"
        stages.append(life.failed_at)
    assert {"connect", "activate", "again"} <= set(stages)
