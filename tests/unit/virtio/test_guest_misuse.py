"""Whatever a guest does to its registers, nothing is raised and the device can be used after."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fakes.devices import FakeBackend
from fakes.pci_machine import PciMachine
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import BackendLost
from pyvmm.pci import config as cfg
from pyvmm.virtio.pci import BAR_SIZE, COMMON, DEVICE, ISR, NOTIFY, PENDING, TABLE

WIDTHS = (1, 2, 4, 8)
VALUES = st.one_of(
    st.sampled_from(
        [0, 1, 2, 3, 4, 0xB, 0xF, 0x40, 0x80, 0xFFFF, 0x8000, 0xC000, 0x1000, 2**32 - 1, 2**64 - 1]
    ),
    st.integers(0, 2**64 - 1),
)
OFFSETS = st.one_of(
    st.integers(COMMON, COMMON + 63),
    st.sampled_from([COMMON + 20, COMMON + 22, COMMON + 28, ISR, DEVICE, NOTIFY, TABLE, TABLE + 12, PENDING]),
    st.integers(0, BAR_SIZE - 1),
)
BAR_ACCESS = st.tuples(st.just("bar"), OFFSETS, st.sampled_from(WIDTHS), st.none() | VALUES)
CONFIG_ACCESS = st.tuples(
    st.just("config"),
    st.one_of(st.integers(0, 255), st.sampled_from([4, 0x10, 0x14]), st.integers(0, 4095)),
    st.sampled_from(WIDTHS),
    st.none() | VALUES,
)
EVENT = st.tuples(
    st.sampled_from(["fail", "lost", "config", "loop", "start"]), st.just(0), st.just(1), st.none()
)


@contextmanager
def running(config: bytes = bytes(40)) -> Iterator[tuple[PciMachine, FakeBackend]]:
    machine = PciMachine()
    backend = FakeBackend(config=config, queue_sizes=(16, 16, 16))
    machine.add(backend)
    machine.driver().start()
    try:
        yield machine, backend
    finally:
        machine.close()


def works_afterwards(machine: PciMachine, backend: FakeBackend) -> None:
    """A driver that comes now, after firmware's BAR assignment, finds a working device."""
    backend.error = None
    access = machine.driver().config
    access.write(cfg.COMMAND, 2, 0)
    for register, value in ((cfg.BAR0, 0), (cfg.BAR0 + 4, machine.host.window64.base >> 32)):
        access.write(register, 4, value)
    machine.vm.strict = True
    machine.driver().start()
    assert machine.driver_status() == 0xF
    assert backend.active is not None and len(backend.active) == 3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(BAR_ACCESS, BAR_ACCESS, CONFIG_ACCESS, EVENT), max_size=30))
def test_random_accesses(accesses):
    with running() as (machine, backend):
        for place, offset, width, value in accesses:
            if place in ("bar", "config"):
                base = machine.bar() if place == "bar" else machine.config_base()
                if value is None:
                    assert 0 <= machine.mmio.read(base + offset, width) < 1 << 8 * width
                else:
                    machine.mmio.write(base + offset, width, value & (1 << 8 * width) - 1)
            elif place == "fail":
                backend.error = BackendLost("on demand")
            elif place == "lost":
                backend.on_lost("on demand")
            elif place == "config":
                backend.on_config_change()
            else:
                machine.loop.turn()
        works_afterwards(machine, backend)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("value", [0, 1, 0xFF])
def test_every_offset_at_every_width(width, value):
    pattern = int.from_bytes(bytes((value,)) * width, "little")
    with running() as (machine, backend):
        for start, length in (
            (COMMON, 80),
            (ISR, 16),
            (DEVICE, 64),
            (NOTIFY, 64),
            (TABLE, 96),
            (PENDING, 32),
        ):
            for offset in range(start, start + length):
                machine.mmio.read(machine.bar() + offset, width)
                machine.mmio.write(machine.bar() + offset, width, pattern)
        for offset in range(0x40, 0x110):
            machine.mmio.read(machine.config_base() + offset, width)
            machine.mmio.write(machine.config_base() + offset, width, pattern)
        works_afterwards(machine, backend)


def test_reset_storm():
    with running() as (machine, backend):
        driver = machine.driver()
        driver.probe()
        for _ in range(200):
            driver.reset()
        assert backend.resets == 1
        works_afterwards(machine, backend)


def test_many_cpus_at_once():
    """Virtual CPUs race with each other and with what the backend announces."""
    failures: list[BaseException] = []

    def run(action, stop):
        try:
            while not stop.is_set():
                action()
        except BaseException as error:
            failures.append(error)

    with running() as (machine, backend):
        machine.vm.strict = False
        first, second, third = (machine.driver() for _ in range(3))
        for driver in (first, second, third):
            driver.probe()
        stop = threading.Event()

        def restart():
            first.set(20, 1, 0)
            for status in (1, 3):
                first.set(20, 1, status)
            first.accept(first.device_features())
            first.set(20, 1, 0xB)
            first.set(20, 1, 0xF)

        def masks():
            for vector in range(4):
                second.mask(vector)
                second.mask(vector, False)
            second.set_control(0)
            second.set_control(0x8000)

        def announce():
            backend.on_config_change()
            backend.on_lost("now and then")
            machine.loop.turn()

        def look():
            third.device_config(0, 4)
            third.isr()
            third.notify(1)
            third.pending(1)

        threads = [
            threading.Thread(target=run, args=(work, stop), daemon=True)
            for work in (restart, masks, announce, look)
        ]
        for thread in threads:
            thread.start()
        stop.wait(1.0)
        stop.set()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert not failures
        works_afterwards(machine, backend)


def test_an_announcement_while_the_backend_starts_does_not_deadlock():
    """A backend may wait for its announcement's answer before it answers SET_FEATURES."""
    with running() as (machine, backend):
        started = backend.activate

        def activate(features, queues):
            thread = threading.Thread(
                target=lambda: (backend.on_config_change(), backend.on_lost("so it says")), daemon=True
            )
            thread.start()
            thread.join(5)
            assert not thread.is_alive()
            started(features, queues)

        backend.activate = activate
        driver = machine.driver()
        driver.start()
        assert driver.status == 0x4F


def test_backends_that_fail_at_every_step_cost_only_a_reset():
    with running() as (machine, backend):
        for _ in range(3):
            backend.error = BackendLost("again")
            machine.driver().start()
        works_afterwards(machine, backend)
