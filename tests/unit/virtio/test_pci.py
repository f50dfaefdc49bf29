"""The virtio-PCI function, driven through the buses as Linux drives it."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
from fakes.devices import FakeBackend
from fakes.pci_machine import PciMachine

from pyvmm.errors import BackendLost, ConfigError
from pyvmm.pci import config as cfg
from pyvmm.pci.host import intx_gsi
from pyvmm.virtio import spec
from pyvmm.virtio.pci import NOTIFY


@pytest.fixture
def machine():
    before = len(os.listdir("/proc/self/fd"))
    machine = PciMachine()
    yield machine
    machine.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def backend():
    return FakeBackend(config=b"root".ljust(36, b"\0") + b"\1\0\0\0")


def count(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


@pytest.mark.parametrize("through_ports", [False, True])
def test_driver_starts_the_backend(machine, backend, through_ports):
    function = machine.add(backend)
    driver = machine.driver(through_ports)
    driver.start()
    assert driver.status == 0xF
    assert backend.accepted == backend.features
    assert backend.active is not None and [*backend.active] == [0, 1]
    queue = backend.active[1]
    assert (queue.size, queue.desc % 16, queue.avail % 2, queue.used % 4) == (256, 0, 0, 0)
    assert queue.call == function.msix.fd(2)
    assert machine.vm.message(queue.call) == (0xFEE0_0000, 0x42)


def test_identity_and_class(machine, backend):
    machine.add(backend)
    access = machine.driver().config
    assert access.read(0, 4) == 0x105A_1AF4
    assert access.read(8, 1) == 1
    assert access.read(cfg.SUBSYSTEM_ID, 2) >= 0x40
    assert access.read(cfg.INTERRUPT_PIN, 1) == 1
    assert access.bar_size(0) == 0x8000
    assert machine.mmio.read(access.bar(0), 4) == 0xFFFF_FFFF  # not decoded yet


def test_doorbells_follow_the_bar(machine, backend):
    machine.add(backend)
    driver = machine.driver()
    driver.start()
    base = driver.config.bar(0)
    kicks = {queue.index: queue.kick for queue in backend.active.values()}
    assert machine.vm.doorbells == {base + NOTIFY: kicks[0], base + NOTIFY + 4: kicks[1]}
    driver.config.write(cfg.BAR0, 4, base + 0x10_0000 & 0xFFFF_FFFF)
    assert machine.vm.doorbells == {base + 0x10_0000 + NOTIFY + 4 * i: kicks[i] for i in kicks}
    assert driver.status == 0xF
    driver.config.write(cfg.COMMAND, 2, 0)
    assert not machine.vm.doorbells
    assert machine.mmio.read(base + 0x10_0000 + 20, 1) == 0xFF


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_doorbell_without_ioeventfd(machine, backend, width):
    machine.vm.refuse.add("ioeventfd")
    machine.add(backend)
    driver = machine.driver()
    driver.start()
    driver.notify(1, width)
    assert count(backend.active[1].kick) == 1
    assert count(backend.active[0].kick) == 0
    machine.mmio.write(driver.address(spec.CAP_NOTIFY, 0xFFC), 2, 1)  # no such queue


def test_config_reads_through_and_generation(machine, backend):
    machine.add(backend)
    driver = machine.driver()
    driver.start()
    assert driver.structures[spec.CAP_DEVICE][2] == 44  # the kind's size, more than the backend's
    assert driver.device_config(0, 4) == int.from_bytes(b"root", "little")
    assert driver.device_config(36, 4) == 1
    assert driver.device_config(40, 4) == 0
    assert driver.device_config(0xFF8, 8) == 0
    before = driver.get(21, 1)
    backend.config[36] = 2
    backend.on_config_change()
    assert count(machine.host._functions[8].msix.fd(0)) == 1
    assert driver.get(21, 1) == before
    assert driver.device_config(36, 1) == 2
    assert driver.get(21, 1) == before + 1
    driver.device_config(36, 1)
    assert driver.get(21, 1) == before + 1


def test_lost_backend_asks_for_reset(machine, backend):
    function = machine.add(backend)
    driver = machine.driver()
    driver.start()
    backend.on_lost("it died")
    assert driver.status == 0xF | spec.NEEDS_RESET
    assert count(function.msix.fd(0)) == 1
    driver.reset()
    backend.on_lost("still dead")
    assert driver.status == 0  # a driver waits for this


def test_failing_activation(machine, backend, capfd):
    function = machine.add(backend)
    backend.error = BackendLost("no answer")
    driver = machine.driver()
    driver.start()
    assert driver.status == 0xF | spec.NEEDS_RESET
    assert count(function.msix.fd(0)) == 1
    assert "no answer" in capfd.readouterr().err
    driver.start()
    assert driver.status == 0xF
    assert backend.active is not None


def test_reset_forgets(machine, backend):
    function = machine.add(backend)
    driver = machine.driver()
    driver.start()
    os.eventfd_write(function.device.kicks[0], 1)
    backend.on_config_change()
    backend.error = BackendLost("late")
    driver.reset()
    assert backend.resets == 1
    assert count(function.device.kicks[0]) == 0
    assert count(function.msix.fd(0)) == 0
    driver.set(22, 2, 1)
    assert (driver.get(24, 2), driver.get(26, 2), driver.get(28, 2)) == (256, spec.NO_VECTOR, 0)
    assert driver.get(16, 2) == spec.NO_VECTOR
    assert driver.get(12, 4) == 0


def test_queue_vector_moves_while_running(machine, backend):
    function = machine.add(backend)
    driver = machine.driver()
    driver.start()
    driver.set(22, 2, 1)
    driver.set(26, 2, 0)
    assert backend.calls[1] == function.msix.fd(0)
    driver.set(26, 2, 77)  # no such vector
    assert driver.get(26, 2) == spec.NO_VECTOR
    assert backend.calls[1] is None


def test_intx_fallback(machine, backend):
    machine.add(backend)
    driver = machine.driver()
    driver.probe()
    assert driver.negotiate()
    driver.queue(1)
    driver.add_status(spec.DRIVER_OK)
    gsi = intx_gsi(machine.slot, 1)
    backend.interrupt(1)
    machine.loop.turn()
    assert machine.vm.lines[gsi] == 1
    assert driver.config.read(cfg.STATUS, 2) & cfg.STATUS_INTERRUPT
    assert driver.isr() == spec.ISR_QUEUE
    assert machine.vm.lines[gsi] == 0
    assert not driver.config.read(cfg.STATUS, 2) & cfg.STATUS_INTERRUPT
    backend.on_config_change()
    assert machine.vm.lines[gsi] == 1
    driver.config.write(cfg.COMMAND, 2, driver.config.read(cfg.COMMAND, 2) | cfg.COMMAND_INTX_DISABLE)
    assert machine.vm.lines[gsi] == 0
    driver.config.write(cfg.COMMAND, 2, driver.config.read(cfg.COMMAND, 2) & ~cfg.COMMAND_INTX_DISABLE)
    assert machine.vm.lines[gsi] == 1
    driver.enable_msix()  # the line is not MSI-X's
    assert machine.vm.lines[gsi] == 0
    assert backend.calls[1] is None
    driver.set_control(0)
    assert machine.vm.lines[gsi] == 1
    assert backend.calls[1] is not None
    assert driver.isr() == spec.ISR_CONFIG


def test_mask_gathers_and_unmask_delivers(machine, backend):
    function = machine.add(backend)
    driver = machine.driver()
    driver.start()
    fd = function.msix.fd(2)
    driver.mask(2)
    assert fd not in machine.vm.irqfds
    assert not driver.pending(2)
    backend.interrupt(1)
    assert driver.pending(2) and not driver.pending(1)
    machine.mmio.write(driver.table(2, 2), 4, 0x99)
    driver.mask(2, False)
    assert machine.vm.message(fd) == (0xFEE0_0000, 0x99)
    assert count(fd) == 1  # signalled again once KVM listens


def test_access_through_configuration_space(machine, backend):
    machine.add(backend)
    driver = machine.driver()
    driver.start()
    at = driver.pci_cfg

    def window(offset, length):
        driver.config.write(at + 4, 1, 0)
        driver.config.write(at + 8, 4, offset)
        driver.config.write(at + 12, 4, length)

    window(20, 1)
    assert driver.config.read(at + 16, 1) == 0xF
    driver.add_status(spec.FAILED)
    assert driver.config.read(at + 12, 8) >> 32 & 0xFF == 0x8F  # a wide read looks again too
    driver.start()
    window(NOTIFY + 4, 2)
    driver.config.write(at + 16, 2, 1)
    assert count(backend.active[1].kick) == 1
    for offset, length in ((0x8000, 4), (2, 4), (0, 3), (0, 0), (0xFFFF_FFFC, 4)):
        window(offset, length)
        driver.config.write(at + 16, 4, 0)
        driver.config.read(at + 16, 4)
    driver.config.write(at + 4, 1, 9)
    driver.config.read(at + 16, 4)
    assert driver.status == 0xF


def test_shared_memory_capabilities(machine):
    regions = ((0, 0x1000), (3, 1 << 32), (7, 0x3000))
    function = machine.add(FakeBackend(shared_memory=regions))
    moved = []
    function.memory.moved = moved.append
    driver = machine.driver()
    driver.probe()
    sizes = {shmid: size for shmid, (_, size) in driver.shared_memory.items()}
    assert sizes == dict(regions)
    spans = sorted((offset, offset + size) for offset, size in driver.shared_memory.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert driver.config.bar_size(2) == 1 << 33
    assert moved == [driver.config.bar(2), None, driver.config.bar(2)]  # sizing moves it about


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"device_id": 0}, "virtio id 0"),
        ({"device_id": 64}, "1 to 63"),
        ({"queue_sizes": (1,) * 257}, "at most 256"),
        ({"queue_sizes": (100,)}, "power of two"),
        ({"queue_sizes": (65536,)}, "power of two"),
        ({"config": bytes(4097)}, "4097 bytes"),
        ({"shared_memory": tuple((number, 0x1000) for number in range(4))}, "at most 3"),
    ],
)
def test_devices_that_do_not_fit(machine, options, text):
    with pytest.raises(ConfigError, match=text):
        machine.add(FakeBackend(**options))


def test_many_queues(machine):
    backend = FakeBackend(99 - 40, (8,) * 256)
    machine.add(backend)
    driver = machine.driver()
    driver.start()
    assert backend.active is not None and len(backend.active) == 256
    assert driver.vectors() == 257
    assert len(machine.vm.irqfds) == 257
    assert len({machine.vm.message(fd) for fd in machine.vm.irqfds}) == 257


def test_enabled_queues_are_fixed(machine, backend):
    machine.add(backend)
    driver = machine.driver()
    driver.probe()
    driver.negotiate()
    driver.queue(0)
    before = [driver.get(offset, 4) for offset in range(32, 56, 4)]
    for offset, width in ((24, 2), (32, 4), (36, 4), (40, 8), (48, 4)):
        driver.set(offset, width, 64)
    assert [driver.get(offset, 4) for offset in range(32, 56, 4)] == before
    assert driver.get(24, 2) == 128
    driver.set(28, 2, 0)
    assert driver.get(28, 2) == 1
    driver.set(22, 2, 1)
    for value in (0, 2, 0xFFFF):
        driver.set(28, 2, value)
        assert driver.get(28, 2) == 0
    driver.add_status(spec.DRIVER_OK)
    driver.queue(1)  # too late
    assert driver.get(28, 2) == 0
    assert [*backend.active] == [0]


def test_registers_of_absent_queues(machine, backend):
    machine.add(backend)
    driver = machine.driver()
    driver.probe()
    for index in (2, 0xFFFF):
        driver.set(22, 2, index)
        for offset, width in ((24, 2), (26, 2), (28, 2), (32, 8)):
            driver.set(offset, width, 1)
        assert (driver.get(24, 2), driver.get(26, 2), driver.get(28, 2)) == (0, spec.NO_VECTOR, 0)
        assert driver.get(32, 8) == 0


def test_machine_restart(machine, backend):
    machine.add(backend)
    machine.driver().start()
    machine.host.reset()
    assert backend.resets == 1 and backend.active is None
