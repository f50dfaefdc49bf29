"""Machines made and closed a thousand times: nothing grows, measured from the end of a warm-up.

Descriptors, threads, mappings, children and Python's objects are counted.  Anonymous memory also
grows in steps that are the allocator's, so it is looked at in four windows: what is lost in each
cycle shows in every one of them, and 96 KiB in 225 cycles are 437 bytes a cycle.  Seen were windows without
any growth.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.backend import FakeBackend
from fakes.census import PATIENCE, census, more
from fakes.program import POWER_OFF, pvh_elf

from pyvmm import config as cfg
from pyvmm.host import backends
from pyvmm.loop import EventLoop
from pyvmm.vm import OFF, Vm

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("need_kvm")]

CYCLES, WARM = 1000, 100
FEW, FEW_WARM = 20, 4  # cycles with a guest that runs
WINDOWS = 4
TOLERANCE = 96  # KiB of anonymous memory in the window where it grows least
OBJECTS = 50
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
    memory = min(after.memory - before.memory for before, after in pairwise(samples))
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
def test_a_thousand_machines(machine: Callable[..., cfg.VmConfig]) -> None:
    """Each with two backends in processes and one that the test plays."""

    def cycle() -> None:
        backend = FakeBackend()
        device = cfg.GenericDevice("vsock", fd=os.dup(backend.frontend_end.fileno()), queue_sizes=(8, 8, 8))
        backend.frontend_end.close()
        with EventLoop() as loop, Vm(machine(RNG, CONSOLE, device), loop):
            assert len(backend.names) > 5
        backend.close()

    assert growth(cycle, WARM, CYCLES) == {}


@pytest.mark.slow
def test_machines_with_foreign_backends(machine: Callable[..., cfg.VmConfig], tmp_path: Path) -> None:
    if backends.find_virtiofsd() is None or backends.find_program("qemu-storage-daemon") is None:
        pytest.skip("virtiofsd or qemu-storage-daemon is missing; apt install qemu-system-common qemu-utils")
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    wanted = machine(cfg.DiskDevice(str(disk)), cfg.FsDevice("share", str(tmp_path)), RNG, CONSOLE)

    def cycle() -> None:
        with EventLoop() as loop, Vm(wanted, loop):
            assert len(os.listdir(tmp_path)) > 1

    assert growth(cycle, WARM, CYCLES) == {}


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
