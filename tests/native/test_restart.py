"""Guests that restart: what is made anew, what stays, what a storm of restarts costs.

Guests are a few bytes.  A guest cannot count its lives, since its memory is emptied; so tests
let it restart for ever and replace the kernel's file when they have seen enough.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import select
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes import backend as fake
from fakes import program
from fakes.backend import FakeBackend, _open_fds, no_new_fds
from fakes.entropy import Entropy, eventually, restart, scenario
from fakes.program import LIMIT, POWER_OFF, RESTART, SPIN, Program, children, pvh_elf

from pyvmm import config as cfg
from pyvmm import layout, vm
from pyvmm.errors import ConfigError
from pyvmm.loop import EventLoop
from pyvmm.vhost_user.payloads import VringState
from pyvmm.virtio import spec
from pyvmm.vm import CRASH, OFF, RESET, STOPPED, Vm

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("need_kvm")]

BASE = 0x40_0000  # of the guest's code
RINGS, MORE_RINGS = 0x10_0000, 0x20_0000
RNG = cfg.RngDevice("/dev/zero")
CONSOLE = cfg.ConsoleDevice(cfg.StreamConfig("null"))
UD2 = bytes.fromhex("0f0b")
FIND_MARK = bytes.fromhex("a100008000 85c0 7402 0f0b")  # mov eax, [0x800000]; test eax, eax; jz +2; ud2
MARK = bytes.fromhex("c7050000800001000000")  # mov dword [0x800000], 1
DEVICES = ("--console", "file=console", "--rng", "src=/dev/zero")


def say(letter):
    return bytes.fromhex(f"66baf803 b0{ord(letter):02x} ee")  # mov dx, 0x3f8; mov al, letter; out dx, al


@pytest.fixture
def loop():
    with EventLoop() as loop:
        yield loop


@pytest.fixture
def unhurried(monkeypatch):
    """No restart comes too soon."""
    monkeypatch.setattr(vm, "BRIEF", 0.0)


@pytest.fixture
def kernel(tmp_path):
    """Makes the kernel's file, at first and anew."""
    path = tmp_path / "vmlinux"

    def write(code):
        (tmp_path / "new").write_bytes(pvh_elf(code, base=BASE))
        (tmp_path / "new").rename(path)

    write.path = path
    return write


def machine(kernel, code, *devices, **more):
    kernel(code)
    settings = {"memory": cfg.MemoryConfig(64 << 20), "reboot": True, **more}
    return cfg.VmConfig(cfg.PayloadConfig(str(kernel.path)), devices=devices, **settings)


def after(built, count, action):
    """Have the loop call `action` once the guest has restarted `count` times."""

    def look():
        if built.restarts >= count:
            action()
        else:
            built.loop.call_later(0.005, look)

    look()


# -- what is new, what stays ---------------------------------------------------------------


def test_without_the_option_a_restart_is_the_end(kernel, loop):
    with no_new_fds(), Vm(machine(kernel, RESTART, reboot=False), loop) as built:
        assert built.run().kind == RESET


def test_memory_is_empty_and_the_kernel_read_again(kernel, loop, unhurried, tmp_path):
    serial = cfg.StreamConfig("file", str(tmp_path / "serial"))
    wanted = machine(kernel, FIND_MARK + MARK + say("a") + RESTART, serial=serial)
    with no_new_fds(), Vm(wanted, loop) as built:
        after(built, 3, lambda: kernel(FIND_MARK + say("b") + POWER_OFF))
        assert built.run().kind == OFF
        said = (tmp_path / "serial").read_bytes()
        assert re.fullmatch(b"a{3,}b", said) and len(said) == built.restarts + 1


@pytest.mark.parametrize("prefault", [False, True])
def test_memory_stays_the_same_file(kernel, loop, prefault):
    """A backend's mapping of it shows what the guest sees now; pages go back unless they were promised."""
    wanted = machine(kernel, SPIN, memory=cfg.MemoryConfig(32 << 20, prefault=prefault))
    with Vm(wanted, loop) as built, memoryview(built.ram) as ram:
        ram[1 << 20 : 9 << 20] = b"x" * (8 << 20)

        def steps():
            old = built.board
            restart(built)
            assert built.board is not old
            assert not any(ram[1 << 20 : 4 << 20])
            blocks = os.fstat(built.ram.fd).st_blocks * 512
            assert blocks >= 32 << 20 if prefault else blocks < 4 << 20

        scenario(built, loop, steps)


def test_backends_stay(kernel, loop):
    """The same processes serve the next machine's driver, which begins at index 0 of rings elsewhere."""
    before = children()
    with Vm(machine(kernel, SPIN, RNG, CONSOLE), loop) as built:
        serving = children() - before

        def steps():
            for base in (RINGS, MORE_RINGS, RINGS):
                device = Entropy(built, 1, base)
                device.start()
                assert device.ask() and device.ask()
                restart(built)
            assert children() - before == serving

        scenario(built, loop, steps)
    assert children() == before


def test_a_restart_as_backends_see_it(kernel, loop):
    """Rings are stopped before memory is emptied, on the same connection; nothing else is asked."""
    backend = FakeBackend()
    device = cfg.GenericDevice("rng", fd=os.dup(backend.frontend_end.fileno()), queue_sizes=(8,))
    with Vm(machine(kernel, SPIN, device), loop) as built:

        def steps():
            Entropy(built, 1, RINGS).start()
            asked = len(backend.seen)
            with memoryview(built.ram) as ram:
                ram[RINGS] = 1
                backend.script["GET_VRING_BASE"] = look
                restart(built)
                assert (found, ram[RINGS]) == ([1], 0)
            assert backend.names[asked:] == ["SET_VRING_ENABLE", "GET_VRING_BASE"]
            Entropy(built, 1, RINGS).start()
            bases = [payload for name, payload, _ in backend.seen if name == "SET_VRING_BASE"]
            assert bases == [VringState(0, 0)] * 2
            assert backend.counts["SET_OWNER"] == 1 and not backend.error

        def look(peer, message):
            with memoryview(built.ram) as ram:
                found.append(ram[RINGS])
            return peer.answer(message)

        found = []
        scenario(built, loop, steps)
    backend.close()


def test_a_backend_that_does_not_stop_is_lost_and_the_guest_restarts(kernel, loop, capfd):
    backend = FakeBackend(script={"GET_VRING_BASE": fake.silence})
    device = cfg.GenericDevice("rng", fd=os.dup(backend.frontend_end.fileno()), queue_sizes=(8,))
    with Vm(machine(kernel, SPIN, device, RNG, deadline=0.3), loop) as built:

        def steps():
            Entropy(built, 1, RINGS).start()
            restart(built)
            living = Entropy(built, 2, MORE_RINGS)
            living.start()
            assert living.ask()
            lost = Entropy(built, 1, RINGS)
            lost.start()
            assert lost.driver.status & spec.NEEDS_RESET

        scenario(built, loop, steps)
    backend.close()


@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_a_backend_that_was_killed_is_replaced(kernel, loop, pause):
    """Before the guest restarts; the next driver gets a device that works, now or a little later."""
    before = children()
    with Vm(machine(kernel, SPIN, RNG), loop) as built:

        def steps():
            device = Entropy(built, 1, RINGS)
            device.start()
            assert device.ask()
            (old,) = children() - before
            os.kill(old, signal.SIGKILL)
            time.sleep(pause)
            restart(built)
            device = Entropy(built, 1, MORE_RINGS)
            device.start()
            assert device.ask(LIMIT)
            assert children() - before - {old}

        scenario(built, loop, steps)
    assert children() == before


def test_a_backend_may_want_an_answer_before_it_stops(kernel, loop):
    """Its own request arrives while a restart waits for it; the loop answers."""
    backend = FakeBackend()
    device = cfg.GenericDevice("vsock", fd=os.dup(backend.frontend_end.fileno()), queue_sizes=(8, 8, 8))

    def ask_first(peer, message):
        peer.ask("CONFIG_CHANGE_MSG")
        acked.append(select.select([peer.requests], [], [], 10)[0])
        return peer.answer(message)

    with Vm(machine(kernel, SPIN, device), loop) as built:

        def steps():
            Entropy(built, 1, RINGS).start()
            backend.script["GET_VRING_BASE", 0] = ask_first
            restart(built)
            assert acked[0]
            Entropy(built, 1, RINGS).start()
            assert backend.counts["SET_FEATURES"] == 2

        acked = []
        scenario(built, loop, steps)
    backend.close()


# -- ends of a guest that restarted ----------------------------------------------------------


@pytest.mark.parametrize(("code", "kind"), [(POWER_OFF, OFF), (UD2, CRASH)])
def test_how_a_guest_ends_later(kernel, loop, unhurried, code, kind):
    with no_new_fds(), Vm(machine(kernel, RESTART, RNG, cpus=cfg.CpusConfig(2)), loop) as built:
        after(built, 2, lambda: kernel(code))
        outcome = built.run()
    assert outcome.kind == kind
    assert bool(re.search(r"triple fault.* at 0x400000", outcome.report)) == (kind == CRASH)


def test_stop_while_the_guest_restarts(kernel, loop, unhurried):
    with no_new_fds(), Vm(machine(kernel, RESTART, RNG, CONSOLE), loop) as built:
        after(built, 5, built.stop)
        assert built.run().kind == STOPPED


def test_stop_while_a_backend_keeps_a_restart_waiting(kernel, loop):
    backend = FakeBackend(script={"GET_VRING_BASE": fake.silence})
    device = cfg.GenericDevice("rng", fd=os.dup(backend.frontend_end.fileno()), queue_sizes=(8,))
    with Vm(machine(kernel, SPIN, device, deadline=50.0), loop) as built:

        def steps():
            Entropy(built, 1, RINGS).start()
            built.board.pio.write(layout.PORT_RESET, 1, 1)
            eventually(lambda: backend.counts["GET_VRING_BASE"])
            stopped.append(time.monotonic())

        stopped = []
        scenario(built, loop, steps)
    assert time.monotonic() - stopped[0] < 10
    backend.close()


def test_a_kernel_that_is_gone_is_told(kernel, loop, unhurried):
    with no_new_fds(), Vm(machine(kernel, RESTART, RNG), loop) as built:
        after(built, 2, kernel.path.unlink)
        with pytest.raises(ConfigError, match=r"the guest restarts, but kernel .*vmlinux: No such file"):
            built.run()


# -- storms ------------------------------------------------------------------------------------


def threads():
    """How many there are, without the one that newer kernels give each virtual machine."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has just ended
            names.append(path.read_text())
    return sum(not name.startswith("kvm") for name in names)


def census():
    """Descriptors by what they are, mappings, and memory that is not the guest's in KiB."""
    files = [re.sub(r"\d+", "", target) for target in _open_fds().values()]
    pss = re.search(r"^Pss_Anon:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "files": sorted(files),
        "maps": len(maps),
        "ram": sum("pyvmm-ram" in line for line in maps),
        "pss": int(pss[1]),
    }


def test_two_hundred_restarts_leave_nothing(kernel, loop, unhurried):
    """Of a machine with four CPUs, counted when the machine is off in between, so at the same point."""
    taken, before = [], threads()
    with Vm(machine(kernel, RESTART, RNG, CONSOLE, cpus=cfg.CpusConfig(4)), loop) as built:
        restart_again = built._restart

        def counting():
            if built.restarts in (20, 200):
                eventually(lambda: threads() == before)  # those that were joined need a moment more
                gc.collect()  # marks every object: pages shared with the backends until then are our own
                taken.append(census())
            if built.restarts == 200:
                kernel(POWER_OFF)
            restart_again()

        built._restart = counting
        assert built.run().kind == OFF
        assert built.restarts == 200
    first, last = taken
    for same in ("files", "ram"):
        assert first[same] == last[same]
    assert last["maps"] <= first["maps"] + 10  # the allocator's
    assert last["pss"] <= first["pss"] + 1024, "KiB"
    assert first["files"].count("anon_inode:kvm-vm") == 1


def test_a_storm_is_told_and_slowed_down(kernel, loop, monkeypatch, capfd):
    monkeypatch.setattr(vm, "STORM", 3)
    monkeypatch.setattr(vm, "BRIEF", 0.4)
    with Vm(machine(kernel, RESTART), loop) as built:
        start = time.monotonic()
        after(built, 6, built.stop)
        assert built.run().kind == STOPPED
    assert time.monotonic() - start > 3 * 0.4  # the third to the fifth were held back
    assert capfd.readouterr().err.count("times at once; give --no-reboot") == 1


# -- as users see it -----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with kernels that restart and that end."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "restart").write_bytes(pvh_elf(RESTART))
    (tmp_path / "console").write_bytes(b"")
    return tmp_path


def test_each_restart_is_a_line_when_asked_for(folder):
    with Program(folder, "--kernel", "restart", "-v", *DEVICES) as run:
        run.await_stderr(b"the guest restarts (3)")
        (folder / "new").write_bytes(pvh_elf(POWER_OFF))
        (folder / "new").rename(folder / "restart")
        assert run.finish() == 0
    lines = run.stderr.decode().splitlines()
    assert lines[:3] == [f"pyvmm: the guest restarts ({number})" for number in (1, 2, 3)]


def test_no_reboot(folder):
    assert program.run(folder, "--kernel", "restart", "--no-reboot", *DEVICES) == (0, "", "")


def test_a_kernel_that_became_something_else(folder):
    with Program(folder, "--kernel", "restart", "-v", *DEVICES) as run:
        run.await_stderr(b"(2)")
        (folder / "new").write_bytes(b"not a kernel")
        (folder / "new").rename(folder / "restart")
        assert run.finish() == 2
        run.check_gone()
    assert run.stderr.splitlines()[-1].startswith(b"pyvmm: the guest restarts, but kernel restart: ")


@pytest.mark.parametrize("moment", [0.0, 0.003, 0.006, 0.01, 0.02, 0.04, 0.06])
def test_a_signal_at_any_moment_of_a_restart(folder, moment):
    with Program(folder, "--kernel", "restart", "-v", "--serial", "socket=serial", *DEVICES) as run:
        run.await_stderr(b"(2)")
        time.sleep(moment)
        run.process.terminate()
        assert run.finish() == 143, run.stderr
        assert b"Traceback" not in run.stderr
        run.check_gone()
