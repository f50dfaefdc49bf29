"""Whole machines whose backends are killed: found again, started again, or the end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from threading import Timer

import pytest
from fakes.backend import no_new_fds
from fakes.entropy import Entropy, restart, scenario
from fakes.program import POWER_OFF, SPIN, Program, children, environment, pvh_elf

from pyvmm import config as cfg
from pyvmm.errors import BackendLost, ConfigError
from pyvmm.loop import EventLoop
from pyvmm.virtio import spec
from pyvmm.vm import Vm

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("need_kvm")]

BASE, RINGS = 0x40_0000, 0x10_0000
KILLS = 100
BACKEND = (sys.executable, "-P", "-m", "pyvmm.backend.rng", "--source", "/dev/zero")
SIZES = (8,)


@pytest.fixture
def loop():
    with EventLoop() as loop:
        yield loop


@pytest.fixture
def started():
    """Gives the process ids of children that came since, and that live."""
    before = children()
    return lambda: sorted(pid for pid in children() - before if alive(pid))


def alive(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def machine(tmp_path, loop):
    """Makes configurations around a guest that spins."""

    def make(*devices, code=SPIN, **more):
        kernel = tmp_path / "vmlinux"
        kernel.write_bytes(pvh_elf(code, base=BASE))
        payload = cfg.PayloadConfig(str(kernel))
        return cfg.VmConfig(payload, memory=cfg.MemoryConfig(64 << 20), devices=devices, **more)

    return make


@pytest.fixture
def listening(tmp_path):
    """Starts an entropy backend at a path; with `connect` one that connects there."""
    running = []

    def start(path):
        running.append(subprocess.Popen([*BACKEND, "--socket-path", str(path)], env=environment()))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


def until(condition, seconds=20.0):
    due = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < due, "it did not happen in time"
        time.sleep(0.002)


def exec_device(place):
    return cfg.GenericDevice("rng", exec=(*BACKEND, *place), queue_sizes=SIZES)


OWN = {
    "forked": cfg.RngDevice("/dev/zero"),
    "inherits its socket": exec_device(("--fd", "{fd}")),
    "makes its socket": exec_device(("--socket-path", "{socket}")),
}


@pytest.mark.parametrize("case", OWN)
def test_what_we_started_is_started_again(machine, loop, started, monkeypatch, case):
    monkeypatch.setenv("PYTHONPATH", environment().get("PYTHONPATH", ""))
    with no_new_fds(), Vm(machine(OWN[case]), loop) as built:
        device = Entropy(built, 1, RINGS)

        def steps():
            device.start()
            for _ in range(3):
                assert device.ask()
                (pid,) = started()
                os.kill(pid, signal.SIGKILL)
                until(lambda pid=pid: started() not in ([], [pid]))
                assert device.ask()
                until(lambda: not device.driver.status & spec.NEEDS_RESET)

        scenario(built, loop, steps)
    assert not started()


@pytest.mark.parametrize("policy", ["fail", "reconnect"])
@pytest.mark.parametrize("case", OWN)
def test_what_does_not_stop_is_gone_before_the_guest_is_told(
    machine, loop, started, monkeypatch, case, policy
):
    monkeypatch.setenv("PYTHONPATH", environment().get("PYTHONPATH", ""))
    with no_new_fds(), Vm(machine(OWN[case], deadline=0.5, on_backend_loss=policy), loop) as built:
        device = Entropy(built, 1, RINGS)

        def steps():
            device.start()
            assert device.ask()
            (pid,) = started()
            os.kill(pid, signal.SIGSTOP)
            device.driver.reset()
            assert not device.driver.status and pid not in started()
            if policy == "reconnect":
                until(started)

        scenario(built, loop, steps)
    assert not started()


def test_a_restart_waits_for_that_too(machine, loop, started):
    with Vm(machine(OWN["forked"], deadline=0.5, reboot=True), loop) as built:

        def steps():
            device = Entropy(built, 1, RINGS)
            device.start()
            assert device.ask()
            (pid,) = started()
            os.kill(pid, signal.SIGSTOP)
            restart(built)
            assert pid not in started()
            device = Entropy(built, 1, RINGS)
            device.start()
            assert device.ask()

        scenario(built, loop, steps)


def test_a_hundred_kills_lose_no_buffer(machine, loop, started, capfd):
    with Vm(machine(cfg.RngDevice("/dev/zero"), cfg.RngDevice("/dev/zero")), loop) as built:
        dying, living = Entropy(built, 1, RINGS), Entropy(built, 2, RINGS + 0x1_0000)

        def steps():
            dying.start()
            living.start()
            victim, other = started()
            for _ in range(KILLS):
                os.kill(victim, signal.SIGKILL)
                assert dying.ask() and living.ask()
                until(lambda victim=victim: set(started()) - {victim, other})
                (victim,) = set(started()) - {other}
                assert dying.ask()
                until(lambda: not dying.driver.status & spec.NEEDS_RESET)
                held.append((len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))

        held = []
        scenario(built, loop, steps)
        assert held[-1] <= held[0], held
    errors = capfd.readouterr().err
    assert errors.count("rng: the backend is lost") == errors.count("rng: reconnected after") == KILLS
    assert not started()


def test_a_socket_is_connected_to_again(machine, loop, listening, tmp_path):
    path = tmp_path / "sock"
    first = listening(path)
    with Vm(machine(cfg.GenericDevice("rng", str(path), SIZES)), loop) as built:
        device = Entropy(built, 1, RINGS)

        def steps():
            device.start()
            assert device.ask()
            first.kill()
            until(lambda: device.driver.status & spec.NEEDS_RESET)
            assert not device.ask(0.1)
            listening(path)
            until(lambda: not device.driver.status & spec.NEEDS_RESET)
            assert device.ask()

        scenario(built, loop, steps)


def test_a_driver_that_resets_while_nobody_is_there(machine, loop, listening, tmp_path):
    path = tmp_path / "sock"
    first = listening(path)
    with Vm(machine(cfg.GenericDevice("rng", str(path), SIZES)), loop) as built:
        device = Entropy(built, 1, RINGS)

        def steps():
            device.start()
            first.kill()
            until(lambda: device.driver.status & spec.NEEDS_RESET)
            begin = time.monotonic()
            device.driver.reset()
            assert not device.driver.status
            with memoryview(built.ram) as ram:
                ram[RINGS : RINGS + 0x1000] = bytes(0x1000)
            again = Entropy(built, 1, RINGS)
            again.start()
            assert time.monotonic() - begin < 5.0
            listening(path)
            assert again.ask()

        scenario(built, loop, steps)


def test_backends_that_connect(machine, loop, tmp_path, started):
    """Each end of a pair of sockets would do as a backend's; here a process takes the one that connects."""
    path = tmp_path / "sock"

    def connect():
        with socket.socket(socket.AF_UNIX) as sock:
            until(lambda: not sock.connect_ex(str(path)))
            fd = sock.fileno()
            return subprocess.Popen([*BACKEND, "--fd", str(fd)], pass_fds=[fd], env=environment())

    device = cfg.GenericDevice("rng", str(path), SIZES, server=True)
    processes = []
    Timer(0.1, lambda: processes.append(connect())).start()
    with Vm(machine(device), loop) as built:
        entropy = Entropy(built, 1, RINGS)

        def steps():
            entropy.start()
            assert entropy.ask()
            processes[0].kill()
            until(lambda: entropy.driver.status & spec.NEEDS_RESET)
            processes.append(connect())
            assert entropy.ask()

        scenario(built, loop, steps)
    assert not path.exists()
    for process in processes:
        process.kill()
        process.wait()


def test_what_a_command_prints_is_passed_on(machine, loop, started, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment().get("PYTHONPATH", ""))
    script = tmp_path / "chatty"
    script.write_text(
        "#!/bin/sh\necho begin; printf 'two\\nlines and %s' half >&2; (sleep 0.3; echo '; done') &\n"
        f"exec {' '.join(BACKEND)} --fd $1\n"
    )
    script.chmod(0o755)
    with Vm(machine(cfg.GenericDevice("rng", exec=(str(script), "{fd}"), queue_sizes=SIZES)), loop) as built:
        device = Entropy(built, 1, RINGS)
        said = []

        def steps():
            device.start()
            assert device.ask()
            due = time.monotonic() + 20
            while "done" not in "".join(said) and time.monotonic() < due:
                said.append(capfd.readouterr().err)
                time.sleep(0.01)

        scenario(built, loop, steps)
    text = "".join(said) + capfd.readouterr().err
    lines = [line.partition("chatty: ")[2] for line in text.splitlines() if "chatty: " in line]
    assert lines == ["begin", "two", "lines and half; done"]


@pytest.mark.parametrize("words", [("false", "{fd}"), ("false", "{socket}")])
def test_a_command_that_ends_at_once(machine, loop, started, words):
    with no_new_fds(), pytest.raises(ConfigError, match="it ended with status 1"):
        Vm(machine(cfg.GenericDevice("rng", exec=words, queue_sizes=SIZES)), loop)
    assert not started()


def test_a_command_that_does_not_exist(machine, loop):
    with no_new_fds(), pytest.raises(ConfigError, match="no-such-program cannot be started: No such file"):
        Vm(machine(cfg.GenericDevice("rng", exec=("no-such-program", "{fd}"))), loop)


def test_one_that_ends_at_once_later_is_not_started_all_the_time(
    machine, loop, started, tmp_path, capfd, monkeypatch
):
    """A script that serves the first time only."""
    monkeypatch.setenv("PYTHONPATH", environment().get("PYTHONPATH", ""))
    script = tmp_path / "once"
    script.write_text(
        f"#!/bin/sh\necho x >> {tmp_path}/starts\n"
        f"[ -e {tmp_path}/served ] && echo I am tired >&2 && exit 7\n"
        f"touch {tmp_path}/served; exec {' '.join(BACKEND)} --fd $1\n"
    )
    script.chmod(0o755)
    with Vm(machine(cfg.GenericDevice("rng", exec=(str(script), "{fd}"), queue_sizes=SIZES)), loop) as built:
        device = Entropy(built, 1, RINGS)

        def steps():
            device.start()
            assert device.ask()
            os.kill(started()[0], signal.SIGKILL)
            time.sleep(1.5)

        scenario(built, loop, steps)
    assert 3 <= (tmp_path / "starts").read_text().count("x") <= 8
    errors = capfd.readouterr().err
    assert errors.count("(it ended with status 7: I am tired)") == 1, "the reason is told once"
    assert "pyvmm: once: I am tired\n" in errors, "what a program prints is passed on"
    assert not started()


def test_stop(machine, loop, started):
    with Vm(machine(cfg.RngDevice("/dev/zero"), on_backend_loss="stop"), loop) as built:
        os.kill(started()[0], signal.SIGKILL)
        with pytest.raises(BackendLost, match="rng: the backend is lost: .*--on-backend-loss stop"):
            built.run()
    assert not started()


def test_a_device_may_be_more_important_than_others(machine, loop, started):
    device = cfg.GenericDevice("rng", exec=(*BACKEND, "--fd", "{fd}"), queue_sizes=SIZES, on_loss="stop")
    with Vm(machine(device, on_backend_loss="fail"), loop) as built:
        os.kill(started()[0], signal.SIGKILL)
        with pytest.raises(BackendLost):
            built.run()


def test_the_program_says_what_it_lost(tmp_path):
    (tmp_path / "vmlinux").write_bytes(pvh_elf(SPIN))
    (tmp_path / "off").write_bytes(pvh_elf(POWER_OFF))
    words = ["--kernel", "vmlinux", "--console", "off", "--rng", "src=/dev/zero", "--on-backend-loss", "stop"]
    with Program(tmp_path, *words) as run:
        (backend,) = run.await_descendants(1)
        time.sleep(0.5)
        os.kill(backend, signal.SIGKILL)
        assert run.finish() == 70
    assert b"pyvmm: rng: the backend is lost: the backend closed the connection" in run.stderr
