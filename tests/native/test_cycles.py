"""Machines made and closed a thousand times: nothing grows, measured from the end of a warm-up.

Descriptors, threads, mappings, children and Python's objects are counted.  Anonymous memory also
grows in steps that are the allocator's, so it is looked at in four windows: what is lost in each
cycle shows in every one of them, and 96 KiB in 225 cycles are 437 bytes a cycle.  Seen were windows without
any growth.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.backend import PROTOCOL, FakeBackend
from fakes.census import PATIENCE, census, more
from fakes.driver import ConfigAccess, VirtioDriver
from fakes.hostile import Place
from fakes.program import LIMIT, POWER_OFF, pvh_elf

from pyvmm import config as cfg
from pyvmm.host import backends
from pyvmm.loop import EventLoop
from pyvmm.slots import RAM_SLOTS
from pyvmm.vhost_user.gpu import HEADER
from pyvmm.vhost_user.messages import ProtocolFeature as P
from pyvmm.vhost_user.payloads import Mmap
from pyvmm.vm import OFF, Vm

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("need_kvm")]

CYCLES, WARM = 1000, 100
FEW, FEW_WARM = 20, 4  # cycles with a guest that runs
WINDOWS = 4
TOLERANCE = 96  # KiB of anonymous memory in the window where it grows least
OBJECTS = 50
SHARING = {"protocol": PROTOCOL | P.SHMEM, "shared_memory": {0: 1 << 20}}
RNG = cfg.RngDevice("/dev/zero")
CONSOLE = cfg.ConsoleDevice(cfg.StreamConfig("null"))


class Sample(NamedTuple):
    """What this process holds."""

    held: dict[str, Any]
    objects: int
    memory: int


def sample() -> Sample:
    """Garbage is not counted, nor what the allocator could give back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    memory = next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return Sample(census(), len(gc.get_objects()), memory)


def growth(cycle: Callable[[], object], warm: int, cycles: int) -> dict[str, Any]:
    """What `cycle` leaves behind, done `warm` times and then up to `cycles` times."""
    samples = []
    for count in (warm, *[(cycles - warm) // WINDOWS] * WINDOWS):
        for _ in range(count):
            cycle()
        samples.append(sample())
    found = held_since(samples[0])
    objects = samples[-1].objects - samples[0].objects
    memory = min(after.memory - before.memory for before, after in itertools.pairwise(samples))
    if objects > OBJECTS:
        found["objects"] = objects
    if memory > TOLERANCE:
        found["memory"] = memory
    return found


def held_since(before: Sample) -> dict[str, Any]:
    """What is held beyond that; threads that were joined get time to be gone."""
    due = time.monotonic() + PATIENCE
    while (found := more(before.held, census())) and time.monotonic() < due:
        time.sleep(0.05)
    return found


class Inherited:
    """A backend that the test plays, whose connection the machine inherits."""

    def __init__(self, **options: Any) -> None:
        self.backend = FakeBackend(**options)
        fd = os.dup(self.backend.frontend_end.fileno())
        self.backend.frontend_end.close()
        self.device = cfg.GenericDevice("vsock", fd=fd, queue_sizes=(8, 8, 8))

    def __enter__(self) -> Inherited:
        return self

    def __exit__(self, *_: object) -> None:
        self.backend.close()


class Calling:
    """A backend that the test plays, which connects as soon as the machine listens."""

    backend: FakeBackend

    def __init__(self, path: Path) -> None:
        self.path, self._over = str(path), False
        self._thread = threading.Thread(target=self._call)
        self._thread.start()

    def _call(self) -> None:
        while not self._over:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(self.path)
            except OSError:
                sock.close()
                time.sleep(0.002)
            else:
                self.backend = FakeBackend(sock=sock, config=bytes(136))
                return

    def __enter__(self) -> Calling:
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join()
        self.backend.close()


def turn_until(loop: EventLoop, condition: Callable[[], object]) -> None:
    due = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < due
        loop._turn(0.01)


def shares(backend: FakeBackend, built: Vm) -> None:
    """A file is shown to the guest, in the BAR of the first device."""
    VirtioDriver(built.board.mmio, ConfigAccess(built.board.mmio, 1)).probe()
    file = os.memfd_create("shared")
    os.ftruncate(file, 0x1000)
    backend.ask("SHMEM_MAP", Mmap(0, 0, 0, 0x1000, 1), [file])
    os.close(file)
    assert backend.requests is not None
    requests = backend.requests.fileno()
    turn_until(built.loop, lambda: select.select([requests], [], [], 0)[0])
    assert backend.status_told() == 0
    assert built.board._slots is not None and built.board._slots._next == RAM_SLOTS + 1, "the guest sees it"


def shows(backend: FakeBackend, loop: EventLoop) -> None:
    """A picture is drawn, which is saved when the machine is closed."""
    with socket.socket(fileno=backend.fds.pop()) as screen:
        messages = (
            (7, struct.pack("<3I", 0, 1, 1)),
            (8, struct.pack("<5I", 0, 0, 0, 1, 1) + b"bgr."),
            (1, b""),
        )
        screen.sendall(b"".join(HEADER.pack(number, 0, len(body)) + body for number, body in messages))
        turn_until(loop, lambda: select.select([screen], [], [], 0)[0])


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., cfg.VmConfig]:
    """Makes configurations around a guest that powers off at once."""
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(pvh_elf(POWER_OFF))

    def make(*devices: Any, cpus: int = 1) -> cfg.VmConfig:
        payload, memory = cfg.PayloadConfig(str(kernel)), cfg.MemoryConfig(16 << 20)
        return cfg.VmConfig(payload, cfg.CpusConfig(cpus), memory, devices=devices)

    return make


@pytest.mark.slow
def test_a_thousand_machines(machine: Callable[..., cfg.VmConfig], tmp_path: Path) -> None:
    """Each with every kind of device and endpoint but programs: those of ours are forked, the test plays
    the others and the far end of the network."""
    picture = tmp_path / "screen.png"
    net = cfg.NetDevice(stream=str(tmp_path / "net.sock"))

    def cycle() -> None:
        with (
            Inherited(config=bytes(8), **SHARING) as sharing,
            Place(tmp_path, {"config": bytes(20)}) as place,
            Calling(tmp_path / "server.sock") as calling,
            EventLoop() as loop,
        ):
            gpu = cfg.GenericDevice("gpu", place.path, (8, 8), display=str(picture))
            server = cfg.GenericDevice("input", calling.path, (8, 8), server=True)
            with Vm(machine(sharing.device, gpu, server, RNG, CONSOLE, net), loop) as built, wire.accept()[0]:
                shares(sharing.backend, built)
                shows(place[0], loop)
                assert "GET_CONFIG" in calling.backend.names
        picture.unlink()

    with socket.socket(socket.AF_UNIX) as wire:
        wire.bind(net.stream)
        wire.listen()
        assert growth(cycle, WARM, CYCLES) == {}


@pytest.mark.slow
def test_machines_with_foreign_backends(machine: Callable[..., cfg.VmConfig], tmp_path: Path) -> None:
    """Started by the options for them and by `exec`, in turn."""
    virtiofsd, daemon = backends.find_virtiofsd(), backends.find_program("qemu-storage-daemon")
    if virtiofsd is None or daemon is None:
        pytest.skip("virtiofsd or qemu-storage-daemon is missing; apt install qemu-system-common qemu-utils")
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    disk, fs = cfg.DiskDevice(str(image)), cfg.FsDevice("share", str(tmp_path))
    commands = exec_disk(daemon, disk), exec_fs(virtiofsd, fs)
    turns = itertools.cycle((machine(disk, fs, RNG, CONSOLE), machine(*commands, RNG, CONSOLE)))

    def cycle() -> None:
        with EventLoop() as loop, Vm(next(turns), loop):
            assert len(os.listdir(tmp_path)) > 1

    assert growth(cycle, WARM, CYCLES) == {}


def exec_disk(program: str, disk: cfg.DiskDevice) -> cfg.GenericDevice:
    """The same by a command that makes its socket."""
    words = backends.storage_daemon_arguments(disk, disk.path, "raw", 0)
    words[-1] = words[-1].replace("addr.type=fd,addr.str=0", "addr.type=unix,addr.path={socket}")
    return cfg.GenericDevice("blk", exec=(program, *words), queue_sizes=(disk.queue_size,))


def exec_fs(program: str, fs: cfg.FsDevice) -> cfg.GenericDevice:
    """The same by a command that inherits its socket."""
    in_c = backends.is_c_virtiofsd(program)
    arguments = backends.c_virtiofsd_arguments if in_c else backends.rust_virtiofsd_arguments
    words = [word.replace("--fd=0", "--fd={fd}") for word in arguments(fs, fs.dir, 0)]
    return cfg.GenericDevice(
        "fs", exec=(program, *words), config="[tag=share,num_request_queues=1]", queue_sizes=(1024, 1024)
    )


def test_machines_that_run(machine: Callable[..., cfg.VmConfig]) -> None:
    wanted = machine(RNG, CONSOLE, cpus=2)

    def cycle() -> None:
        with EventLoop() as loop, Vm(wanted, loop) as built:
            assert built.run().kind == OFF

    assert growth(cycle, FEW_WARM, FEW) == {}


kept: list[Any] = []

LEAKS: dict[str, Callable[[], object]] = {
    "descriptors": lambda: kept.append(open("/dev/null", "rb")),  # noqa: SIM115
    "threads": lambda: kept.append(threading.Timer(3600, print)) or kept[-1].start(),
    "children": lambda: kept.append(subprocess.Popen(["sleep", "3600"])),
    "objects": lambda: kept.extend([[] for _ in range(10)]),
    "memory": lambda: kept.append(os.urandom(65536)),
}


@pytest.mark.parametrize("what", LEAKS)
def test_what_leaks_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure itself."""
    monkeypatch.setitem(globals(), "PATIENCE", 0.1)
    try:
        assert what in growth(LEAKS[what], FEW_WARM, FEW)
    finally:
        for thing in kept:
            if isinstance(thing, threading.Timer):
                thing.cancel()
                thing.join()
            elif isinstance(thing, subprocess.Popen):
                thing.kill()
                thing.wait()
            elif hasattr(thing, "close"):
                thing.close()
        kept.clear()
