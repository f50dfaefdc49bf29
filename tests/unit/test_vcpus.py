"""Threads of virtual CPUs, with CPUs that only wait for a kick."""

from __future__ import annotations

import errno
import threading
from time import monotonic
from typing import Any

import pytest

from pyvmm.bus import Bus
from pyvmm.errors import KvmError
from pyvmm.vcpus import Exits, VcpuThreads


class FakeVcpu:
    """Runs until it is kicked; `ends` is what it returns or raises at once instead."""

    def __init__(self, number: int, ends: Any = None, deaf: bool = False) -> None:
        self.id = number
        self.kicked = threading.Event()
        self.started = threading.Event()
        self._ends, self._deaf = ends, deaf

    def run(self, exits: Exits) -> tuple[int, dict[str, Any]]:
        self.started.set()
        if isinstance(self._ends, BaseException):
            raise self._ends
        if self._ends is None:
            self.kicked.wait(30)
        return self._ends or (10, {})

    def kick(self) -> None:
        if not self._deaf:
            self.kicked.set()


class Ended:
    """Remembers what `on_exit` was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, object]] = []
        self.event = threading.Event()

    def __call__(self, index: int, result: object) -> None:
        self.told.append((index, result))
        self.event.set()


def threads(vcpus: list[FakeVcpu], ended: Ended) -> VcpuThreads:
    return VcpuThreads(vcpus, Exits(Bus("memory"), Bus("ports")), ended)  # type: ignore[arg-type]


def test_all_start_and_all_stop_without_a_word() -> None:
    vcpus, ended = [FakeVcpu(number) for number in range(4)], Ended()
    running = threads(vcpus, ended)
    running.start()
    assert all(vcpu.started.wait(5) for vcpu in vcpus)
    assert running.stop()
    assert running.stop()
    assert ended.told == []


@pytest.mark.parametrize("result", [(8, {}), LookupError("a fault of ours"), SystemExit(3)])
def test_the_end_of_one_is_told(result: Any) -> None:
    ended = Ended()
    running = threads([FakeVcpu(0), FakeVcpu(1, result)], ended)
    running.start()
    assert ended.event.wait(5)
    assert ended.told == [(1, result)]
    assert running.stop()


def test_one_that_does_not_stop_is_reported_and_may_stop_later() -> None:
    deaf = FakeVcpu(0, deaf=True)
    running = threads([deaf, FakeVcpu(1)], Ended())
    running.start()
    assert not running.stop(0.05)
    deaf.kicked.set()
    assert running.stop()


def test_the_time_to_stop_is_for_all_together() -> None:
    deaf = [FakeVcpu(number, deaf=True) for number in range(8)]
    running = threads(deaf, Ended())
    running.start()
    begin = monotonic()
    assert not running.stop(0.2)
    assert monotonic() - begin < 0.8
    for vcpu in deaf:
        vcpu.kicked.set()
    assert running.stop(-1)


def test_stopping_what_never_started() -> None:
    assert threads([FakeVcpu(0)], Ended()).stop()


def test_exits_go_to_the_buses() -> None:
    class Device:
        def __init__(self) -> None:
            self.seen: list[tuple[int, ...]] = []

        def read(self, offset: int, width: int) -> int:
            self.seen.append((offset, width))
            return 7

        def write(self, offset: int, width: int, value: int) -> None:
            self.seen.append((offset, width, value))

    mmio, pio, memory, port = Bus("memory"), Bus("ports"), Device(), Device()
    mmio.insert(0x1000, 16, memory, "m")
    pio.insert(0x60, 4, port, "p")
    exits = Exits(mmio, pio)
    assert (exits.mmio_read(0x1004, 4), exits.io_read(0x61, 1)) == (7, 7)
    exits.mmio_write(0x1008, 8, 5)
    exits.io_write(0x60, 2, 6)
    assert memory.seen == [(4, 4), (8, 8, 5)] and port.seen == [(1, 1), (0, 2, 6)]


class Faulty(FakeVcpu):
    """Ends with one of `results` after the other."""

    def __init__(self, *results: Any) -> None:
        super().__init__(0)
        self.results = list(results)

    def run(self, exits: Exits) -> tuple[int, dict[str, Any]]:
        result = self.results.pop(0)
        if isinstance(result, BaseException):
            raise result
        return result  # type: ignore[no-any-return]


FAULT, OTHER, END = KvmError(errno.EFAULT, "no host page"), KvmError(errno.EIO, "no luck"), (8, {})


@pytest.mark.parametrize(
    ("results", "mended", "told"),
    [
        ((FAULT, END), [1], END),  # what was taken away is gone: the access is repeated
        ((FAULT, FAULT, END), [1, 2], END),
        ((FAULT, END), [5], END),  # another CPU was faster
        ((FAULT, END), [0], FAULT),  # there was nothing to take away
        ((FAULT, FAULT, END), [3, 3], FAULT),
        ((OTHER, END), [1], OTHER),
        ((END, END), [1], END),
    ],
)
def test_a_fault_ends_a_cpu_unless_it_can_be_mended(results: Any, mended: list[int], told: Any) -> None:
    ended = Ended()
    answers = iter(mended)
    exits = Exits(Bus("memory"), Bus("ports"), lambda seen: next(answers))
    running = VcpuThreads([Faulty(*results)], exits, ended)  # type: ignore[list-item]
    running.start()
    assert ended.event.wait(5)
    assert ended.told == [(0, told)]
    assert running.stop()
