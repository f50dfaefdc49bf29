"""Whole machines in this process: how they end, what they hold, what a lost backend does to them."""

from __future__ import annotations

import os
import resource
import signal
import struct
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes import backend as fake
from fakes.backend import FakeBackend, no_new_fds
from fakes.driver import ConfigAccess, VirtioDriver
from fakes.entropy import Entropy, restart, scenario
from fakes.program import LIMIT, POWER_OFF, RESTART, SPIN, children, pvh_elf

from pyvmm import config as cfg
from pyvmm import layout
from pyvmm.errors import ConfigError
from pyvmm.loop import EventLoop
from pyvmm.virtio import spec
from pyvmm.vm import CRASH, OFF, RESET, STOPPED, Vm

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("need_kvm")]

BASE = 0x40_0000  # of the guest's code; rings are below
RINGS = 0x10_0000
RNG = cfg.RngDevice("/dev/zero")
CONSOLE = cfg.ConsoleDevice(cfg.StreamConfig("null"))
I8042 = bytes.fromhex("b0fe e664 ebfe")  # mov al, 0xfe; out 0x64, al; jmp $
UD2 = bytes.fromhex("0f0b")
PORT = 0x700
OUT = bytes.fromhex("66ba0007 ee ebfe")  # mov dx, 0x700; out dx, al; jmp $


@pytest.fixture
def loop():
    with EventLoop() as loop:
        yield loop


@pytest.fixture
def started():
    """Gives the process ids of children that came since."""
    before = children()
    return lambda: children() - before


@pytest.fixture
def machine(tmp_path, loop):
    """Makes configurations around a guest of a few bytes."""

    def make(code, *devices, **more):
        kernel = tmp_path / "vmlinux"
        kernel.write_bytes(pvh_elf(code, base=BASE))
        payload = cfg.PayloadConfig(str(kernel))
        return cfg.VmConfig(payload, memory=cfg.MemoryConfig(64 << 20), devices=devices, **more)

    return make


# -- ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "kind"), [(POWER_OFF, OFF), (RESTART, RESET), (I8042, RESET), (UD2, CRASH)])
@pytest.mark.parametrize("cpus", [1, 4])
def test_how_a_guest_ends(machine, loop, started, code, kind, cpus):
    with no_new_fds():
        with Vm(machine(code, RNG, CONSOLE, cpus=cfg.CpusConfig(cpus)), loop) as built:
            outcome = built.run()
        built.close()
    assert outcome.kind == kind
    assert bool(outcome.report) == (kind == CRASH)
    assert not started()


def test_stop_from_another_thread(machine, loop):
    with Vm(machine(SPIN, RNG), loop) as built:
        threading.Timer(0.1, built.stop).start()
        assert built.run().kind == STOPPED


def test_stop_before_the_run(machine, loop):
    with Vm(machine(SPIN), loop) as built:
        built.stop()
        assert built.run().kind == STOPPED


def test_an_exception_in_a_device_comes_out_of_run(machine, loop, started):
    class Broken:
        def read(self, offset, width):
            return 0

        def write(self, offset, width, value):
            raise LookupError("a fault of ours")

    with no_new_fds(), Vm(machine(OUT, RNG), loop) as built:
        built.board.pio.insert(PORT, 1, Broken(), "broken")
        with pytest.raises(LookupError, match="a fault of ours"):
            built.run()
    assert not started()


def test_a_cpu_that_waits_for_a_silent_backend_does_not_hold_up_the_end(machine, loop):
    """The guest reads the configuration through PCI configuration space; no answer ever comes."""
    backend = FakeBackend(script={("GET_CONFIG", 1): fake.silence})
    device = cfg.GenericDevice("vsock", fd=os.dup(backend.frontend_end.fileno()), queue_sizes=(8, 8, 8))
    stopped = []

    def stop_when_asked():
        if backend.counts["GET_CONFIG"] > 1:
            stopped.append(time.monotonic())
            built.stop()
        else:
            loop.call_later(0.02, stop_when_asked)

    with Vm(machine(SPIN, device, deadline=50.0), loop) as built:
        with memoryview(built.ram) as ram:
            code = read_device_config(built, 1) + SPIN
            ram[BASE : BASE + len(code)] = code
        stop_when_asked()
        assert built.run().kind == STOPPED
    assert time.monotonic() - stopped[0] < 10
    backend.close()


def read_device_config(built, slot):
    """Instructions that read four bytes of a device's configuration through virtio_pci_cfg_cap."""
    driver = VirtioDriver(built.board.mmio, ConfigAccess(built.board.mmio, slot))
    driver.probe()
    at = layout.ECAM_BASE + (slot << 15) + driver.pci_cfg
    _, offset, _ = driver.structures[spec.CAP_DEVICE]
    stores = ((at + 8, offset), (at + 12, 4))  # offset and length; bar is 0 already
    code = b"".join(bytes.fromhex("c705") + struct.pack("<II", *store) for store in stores)
    return code + b"\xa1" + struct.pack("<I", at + 16)  # mov eax, [data]


# -- what stays ----------------------------------------------------------------------------


def test_fifty_machines_leave_nothing(machine, loop, started):
    def census():
        return (
            len(os.listdir("/proc/self/fd")),
            threading.active_count(),
            len(os.listdir("/proc/self/task")),
            len(Path("/proc/self/maps").read_text().splitlines()),
        )

    wanted = machine(POWER_OFF, RNG, CONSOLE, cpus=cfg.CpusConfig(2))
    for cycle in range(50):
        with EventLoop() as own, Vm(wanted, own) as built:
            assert built.run().kind == OFF
        if cycle == 4:
            before = census()
    after = census()
    assert after[:3] == before[:3]
    assert after[3] <= before[3] + 10  # the allocator's
    assert not started()


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ((RNG,) * 32, "all 31 PCI slots are taken"),
        ((CONSOLE, RNG, cfg.RngDevice("/nowhere")), "src=/nowhere"),
        ((RNG, cfg.GenericDevice("fs", "/nowhere/s")), "socket /nowhere/s: does not exist"),
    ],
)
def test_a_machine_that_cannot_be_built_leaves_nothing(machine, loop, started, devices, message):
    with no_new_fds(), pytest.raises(ConfigError, match=message):
        Vm(machine(SPIN, *devices, connect_timeout=0.05), loop)
    assert not started()


@pytest.mark.parametrize("broken", ["VirtioPciFunction", "build_tables"])
def test_whatever_fails_everything_is_closed(machine, loop, started, broken, monkeypatch):
    def fail(*_, **__):
        raise LookupError("a fault of ours")

    from pyvmm import board

    monkeypatch.setattr(board, broken, fail)
    with no_new_fds(), pytest.raises(LookupError):
        Vm(machine(SPIN, RNG, CONSOLE), loop)
    assert not started()


def test_more_memory_at_once_than_there_is(machine, loop):
    wanted = machine(SPIN).replace(memory=cfg.MemoryConfig(500 << 30, prefault=True))
    with (
        no_new_fds(),
        pytest.raises(ConfigError, match=r"prefault=on needs 512000M now, and this host has \d+M"),
    ):
        Vm(wanted, loop)


def test_prefaulted_memory_is_there(machine, loop):
    wanted = machine(POWER_OFF).replace(memory=cfg.MemoryConfig(32 << 20, prefault=True))
    with Vm(wanted, loop) as built:
        assert os.fstat(built.ram.fd).st_blocks * 512 >= 32 << 20
        assert built.run().kind == OFF


# -- lost backends -------------------------------------------------------------------------


def await_reset_wish(driver):
    due = time.monotonic() + LIMIT
    while not driver.status & spec.NEEDS_RESET:
        assert time.monotonic() < due
        time.sleep(0.002)


def test_a_backend_that_dies_costs_its_device_only(machine, loop, started, capfd):
    with Vm(machine(SPIN, RNG, RNG, on_backend_loss="fail"), loop) as built:
        dying, living = Entropy(built, 1, RINGS), Entropy(built, 2, RINGS + 0x1_0000)

        def steps():
            dying.start()
            living.start()
            assert dying.ask() and living.ask()
            assert not dying.driver.isr() & spec.ISR_CONFIG
            os.kill(min(started()), signal.SIGKILL)
            await_reset_wish(dying.driver)
            assert dying.driver.isr() & spec.ISR_CONFIG
            assert living.ask() and not living.driver.status & spec.NEEDS_RESET
            assert not dying.ask(0.1)
            dying.driver.reset()  # a driver that resets it finds a device that cannot start
            assert not dying.driver.status

        scenario(built, loop, steps)
    assert "the backend is lost: the backend closed the connection" in capfd.readouterr().err
    assert not started()


def test_a_backend_that_dies_before_the_guest_runs(machine, loop, started):
    with Vm(machine(SPIN, RNG, RNG, on_backend_loss="fail"), loop) as built:
        os.kill(min(started()), signal.SIGKILL)
        dead, living = Entropy(built, 1, RINGS), Entropy(built, 2, RINGS + 0x1_0000)

        def steps():
            living.start()
            assert living.ask()
            dead.start()
            assert dead.driver.status & spec.NEEDS_RESET
            assert living.ask()

        scenario(built, loop, steps)


@pytest.mark.parametrize(
    "request_name", ["SET_FEATURES", "SET_VRING_ADDR", "SET_VRING_KICK", "SET_VRING_ENABLE"]
)
def test_a_backend_that_dies_while_it_is_started(machine, loop, request_name):
    backend = FakeBackend(script={request_name: fake.hang_up})
    device = cfg.GenericDevice("rng", fd=os.dup(backend.frontend_end.fileno()), queue_sizes=(8,))
    with Vm(machine(SPIN, device, RNG), loop) as built:
        dying, living = Entropy(built, 1, RINGS), Entropy(built, 2, RINGS + 0x1_0000)

        def steps():
            dying.start()
            assert dying.driver.status & spec.NEEDS_RESET
            living.start()
            assert living.ask()

        scenario(built, loop, steps)
    backend.close()


def test_a_backend_that_does_not_answer_is_lost_at_the_deadline(machine, loop, capfd):
    backend = FakeBackend(script={"SET_VRING_ENABLE": fake.silence})
    device = cfg.GenericDevice("rng", fd=os.dup(backend.frontend_end.fileno()), queue_sizes=(8,))
    with Vm(machine(SPIN, device, deadline=0.3), loop) as built:
        silent = Entropy(built, 1, RINGS)

        def steps():
            start = time.monotonic()
            silent.start()
            assert 0.2 < time.monotonic() - start < 5
            assert silent.driver.status & spec.NEEDS_RESET

        scenario(built, loop, steps)
    assert "SET_VRING_ENABLE: it did not answer in time" in capfd.readouterr().err
    backend.close()


def test_devices_are_in_the_slots_that_they_ask_for(machine, loop):
    devices = (CONSOLE, RNG.replace(id="a"), RNG.replace(id="b", pci_device_id=1))
    slots = [(0, "host bridge"), (1, "b"), (2, "console"), (3, "a")]
    with Vm(machine(SPIN, *devices, reboot=True), loop) as built:

        def steps():
            for _ in range(2):
                assert [(slot, function.name) for slot, _, function in built.board.pci.functions()] == slots
                restart(built)

        scenario(built, loop, steps)


def test_more_queues_than_the_usual_limit_of_open_files_allows(machine, loop):
    """Each queue has two descriptors here; 1024 is the usual limit."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    backends = [FakeBackend(queues=256) for _ in range(3)]
    devices = [
        cfg.GenericDevice("fs", fd=os.dup(backend.frontend_end.fileno()), queue_sizes=(2,) * 256)
        for backend in backends
    ]
    with Vm(machine(POWER_OFF, *devices), loop) as built:
        assert built.run().kind == OFF
    for backend in backends:
        backend.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
