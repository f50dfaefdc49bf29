"""Real `pyvmm` processes that are interrupted, lose their backends, crash: what is left of them.

Guests are a few bytes that spin, power off or fault; no Linux is needed to see whether a
process, a socket or a raw terminal stays behind.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import resource
import select
import signal
import socket
import termios
import time
from pathlib import Path

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes import kernels, program
from fakes.program import LIMIT, POWER_OFF, RESTART, SPIN, Program, pvh_elf

from pyvmm.cli import boot
from pyvmm.host import accel

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("need_kvm")]

TRIPLE_FAULT = bytes.fromhex("0f0b")  # ud2; there is no interrupt table
NOWHERE = bytes.fromhex("b8000000d0 ffe0")  # mov eax, 0xd0000000; jmp eax: no memory is there
CHATTER = bytes.fromhex("66baf803 b078 ee ebfd")  # mov dx, 0x3f8; mov al, "x"; again: out dx, al; jmp again
MOMENTS = 12
DEVICES = ("--console", "file=console", "--serial", "socket=serial", "--rng", "src=/dev/zero")
BOOT = ("--kernel", "spin", *DEVICES)
DISK = ("--disk", "path=disk")
BACKENDS = 3  # of BOOT and DISK


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with kernels and a disk."""
    monkeypatch.chdir(tmp_path)
    for name, code in (("spin", SPIN), ("off", POWER_OFF), ("restart", RESTART), ("fault", TRIPLE_FAULT)):
        (tmp_path / name).write_bytes(pvh_elf(code))
    (tmp_path / "nowhere").write_bytes(pvh_elf(NOWHERE))
    (tmp_path / "console").write_bytes(b"")
    with (tmp_path / "disk").open("wb") as disk:
        disk.truncate(1 << 20)
    return tmp_path


class Terminal:
    """A pseudo terminal; `run` starts the program with it as controlling terminal."""

    def __init__(self):
        self.ours, self.theirs = os.openpty()
        self.modes = termios.tcgetattr(self.theirs)
        self.text = b""

    def run(self, folder, *argv):
        def take():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        streams = dict.fromkeys(("stdin", "stdout", "stderr"), self.theirs)
        return Program(folder, *argv, start_new_session=True, preexec_fn=take, **streams)

    def raw(self):
        return not termios.tcgetattr(self.theirs)[3] & termios.ISIG

    def restored(self):
        return termios.tcgetattr(self.theirs) == self.modes

    def read(self):
        """What was printed."""
        while select.select([self.ours], [], [], 0)[0]:
            self.text += os.read(self.ours, 65536)
        return self.text.replace(b"\r\n", b"\n").decode()

    def close(self):
        os.close(self.ours)
        os.close(self.theirs)


@pytest.fixture
def terminal():
    made = Terminal()
    yield made
    made.close()


def booted(folder):
    """Whether the serial port's socket is there, which is shortly before the guest runs."""
    return (folder / "serial").exists()


def await_true(test, *arguments):
    due = time.monotonic() + LIMIT
    while not test(*arguments):
        assert time.monotonic() < due, f"{test.__name__} stays false"
        time.sleep(0.005)


# -- plain ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["off", "restart"])
def test_a_guest_that_ends_is_a_success(folder, kernel):
    assert program.run(folder, "--kernel", kernel, "--no-reboot", *DEVICES, *DISK) == (0, "", "")


def test_closed_standard_streams_become_nothing(folder):
    """A device must not get their numbers: it would be sent our messages."""
    shell = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "-")
    assert program.run(folder, "--kernel", "off", *DISK, under=shell) == (0, "", "")
    assert program.run(folder, "--kernel", "missing", *DISK, under=shell) == (2, "", "")
    assert not any((folder / "disk").read_bytes())


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [("fault", r"triple fault"), ("nowhere", r"KVM_EXIT_INTERNAL_ERROR, suberror 1")],
)
def test_a_crash_is_told_with_registers_and_code(folder, kernel, reason):
    status, stdout, stderr = program.run(folder, "--kernel", kernel, "--console", "off")
    assert (status, stdout) == (126, "")
    first, *rest = stderr.splitlines()
    assert first.startswith("pyvmm: virtual CPU 0: ") and reason in first
    text = "\n".join(rest)
    for part in ("  code: ", " rip 0", " rax 0", "cr0 ", " cs "):
        assert part in text
    assert "Traceback" not in stderr


@pytest.mark.parametrize("known", ["native", "emulated"])
def test_a_host_that_emulates_ring_0_is_told_long_before_a_crash(folder, known, monkeypatch):
    """Whichever this host is: the answer is in the cache already."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    answer = Path(accel._memory_path("/dev/kvm"))
    answer.parent.mkdir(parents=True)
    answer.write_text(known)
    with Program(folder, "--kernel", "spin", "--console", "off", env={accel.LAB_MARK: ""}) as run:
        if known == "emulated":
            run.await_stderr(b"\n")
        else:
            time.sleep(boot.LOOK_SECONDS + 1)
        run.process.terminate()
        assert run.finish() == 143
    told = (
        b"pyvmm: the KVM of /dev/kvm emulates ring 0, so Linux cannot run on it; .*: pyvmm lab -- pyvmm ...\n"
    )
    assert re.fullmatch(told if known == "emulated" else b"", run.stderr)


def test_limits_may_be_farther_away_than_the_kernel_can_wait(folder):
    """Two milliard milliseconds are 25 days."""
    month = "2592000"
    limits = ("--deadline", month, "--connect-timeout", month, "--reconnect-timeout", month)
    assert program.run(folder, "--kernel", "off", *DEVICES, *limits) == (0, "", "")
    words = ("run", "--accel", "kvm", "--timeout", month, "--kernel", "off", "--", "true")
    assert program.run(folder, *words)[0] == 70


@pytest.mark.parametrize(("kernel", "how"), [("off", "it powered itself off"), ("restart", "it restarted")])
def test_a_run_whose_guest_ends_before_the_command_has_failed(folder, kernel, how):
    status, stdout, stderr = program.run(folder, "run", "--accel", "kvm", "--kernel", kernel, "--", "true")
    assert (status, stdout, stderr) == (70, "", f"pyvmm: the guest ended without a word; {how}\n")


def test_too_few_open_files_are_told(folder):
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    devices = ["--rng", "src=/dev/zero"] * 10
    status, _, stderr = program.run(folder, "--kernel", "off", "--console", "off", *devices, preexec_fn=limit)
    assert status == 70
    assert stderr.startswith("pyvmm: the host refused: [Errno 24]") and stderr.endswith("(ulimit -n)\n")
    assert stderr.count("\n") == 1


# -- signals -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_any_moment_leaves_nothing(folder, number):
    moments = random.Random(number)
    for _ in range(MOMENTS):
        with Program(folder, *BOOT, *DISK) as run:
            time.sleep(moments.uniform(0, 0.6))
            run.process.send_signal(number)
            status = run.finish()
            if b"Traceback" not in run.stderr or b"pyvmm/" in run.stderr:  # else it hit Python's own start
                assert status == 128 + number, run.stderr
            run.check_gone()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_many_signals_are_one(folder, number):
    """Whoever is impatient must not interrupt the cleaning up."""
    with Program(folder, *BOOT, *DISK) as run:
        await_true(booted, folder)
        for _ in range(20):
            run.process.send_signal(number)
            time.sleep(0.002)
        assert run.finish() == 128 + number
        assert run.stderr == b""
        run.check_gone()


def test_a_signal_ends_the_wait_for_a_socket(folder):
    device = "socket=absent,device_type=rng"
    with Program(folder, *BOOT, "--connect-timeout", "50", "--generic-vhost-user", device) as run:
        run.await_stderr(b"waiting for a backend")
        start = time.monotonic()
        run.process.terminate()
        assert run.finish() == 143
        assert time.monotonic() - start < 5
        run.check_gone()


def test_a_signal_ends_the_wait_for_an_answer(folder):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("silent")
        listener.listen()
        listener.settimeout(LIMIT)
        with Program(
            folder, *BOOT, "--deadline", "50", "--generic-vhost-user", "socket=silent,device_type=rng"
        ) as run:
            connection, _ = listener.accept()
            with connection:
                connection.recv(12)
                start = time.monotonic()
                run.process.send_signal(signal.SIGINT)
                assert run.finish() == 130
                assert time.monotonic() - start < 5
            run.check_gone()


def test_a_signal_ends_the_unpacking_of_a_kernel(folder):
    zeros = bytes(900 << 20)
    (folder / "bz").write_bytes(kernels.bzimage(kernels.payload(zeros, "zstd")))
    with Program(folder, "--kernel", "bz", *DEVICES) as run:
        await_true(lambda: list(folder.rglob(".unpacking*")))
        run.process.terminate()
        assert run.finish() == 143
        run.check_gone()
    assert not list(folder.rglob("bz-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_preparation_of_a_run(folder, number):
    compiler = folder / "cc"
    compiler.write_text("#!/bin/sh\n: >compiling\nexec sleep 60\n")
    compiler.chmod(0o755)
    words = ("run", "--accel", "kvm", "--kernel", "spin", "--", "true")
    with Program(folder, *words, env={"CC": str(compiler)}) as run:
        await_true((folder / "compiling").exists)
        (folder / "compiling").unlink()
        run.process.send_signal(number)
        assert run.finish() == 128 + number
        run.check_gone(seconds=2)  # the compiler is killed, and not waited for


def test_what_nohup_ignores_stays_ignored(folder):
    with Program(folder, *BOOT, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as run:
        await_true(booted, folder)
        run.process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert run.process.poll() is None
        run.process.terminate()
        assert run.finish() == 143
        run.check_gone()


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_reader_that_has_stopped_does_not_hold_up_the_end(folder, terminal, kind):
    (folder / "chatter").write_bytes(pvh_elf(CHATTER))
    words = ("--kernel", "chatter", "--console", "off", "--serial", "tty")
    with terminal.run(folder, *words) if kind == "terminal" else Program(folder, *words) as run:
        time.sleep(1.5)  # by now the buffer is full
        run.process.terminate()
        assert run.process.wait(5) == 143
        run.check_gone()


# -- deaths --------------------------------------------------------------------------------


def test_backends_die_with_a_killed_vmm(folder):
    with Program(folder, *BOOT, *DISK) as run:
        await_true(booted, folder)
        run.await_descendants(BACKENDS)
        run.process.kill()
        assert run.finish() == 137
        (folder / "serial").unlink()  # which nobody could
        run.check_gone(seconds=10)


def test_backends_get_no_descriptor_that_is_not_theirs(folder):
    """Not even one that the user handed to the machine, which would outlive it there."""
    reader, writer = os.pipe()
    with Program(folder, *BOOT, *DISK, pass_fds=(writer,)) as run:
        await_true(booted, folder)
        ours = os.readlink(f"/proc/self/fd/{writer}")
        assert ours in open_files(run.process.pid)
        for pid in run.await_descendants(BACKENDS):
            assert ours not in open_files(pid)
        run.process.terminate()
        assert run.finish() == 143
    os.close(reader)
    os.close(writer)


def open_files(pid):
    return [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]


@pytest.mark.parametrize("running", [False, True])
def test_the_machine_survives_its_backends(folder, running):
    """They die before the guest runs, or later; the signal still ends everything."""
    with Program(folder, *BOOT, *DISK) as run:
        found = run.await_descendants(BACKENDS)
        if running:
            await_true(booted, folder)
            time.sleep(0.3)
            for pid in found:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.3)
            assert run.process.poll() is None, run.stderr
            run.process.terminate()
            assert run.finish() == 143
        else:
            for pid in found:
                os.kill(pid, signal.SIGKILL)
            run.process.send_signal(signal.SIGTERM) if run.process.poll() is None else None
            assert run.finish() in (2, 143)
        assert b"Traceback" not in run.stderr
        run.check_gone()


# -- the terminal --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("--kernel missing", 2),
        ("--kernel off", 0),
        ("--kernel off --serial tty --console off", 0),
        ("--kernel fault", 126),
        ("--kernel spin --generic-vhost-user socket=absent,device_type=fs --connect-timeout 0.1", 2),
    ],
)
def test_the_terminal_is_as_it_was(folder, terminal, words, status):
    with terminal.run(folder, *words.split()) as run:
        assert run.finish() == status
        assert terminal.restored()
        assert terminal.read().startswith("pyvmm: " if status else "")
        run.check_gone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("words", ["--console tty", "--console off --serial tty"])
def test_the_terminal_is_as_it_was_after_a_signal(folder, terminal, number, words):
    with terminal.run(folder, "--kernel", "spin", *words.split()) as run:
        await_true(terminal.raw)
        run.process.send_signal(number)
        assert run.finish() == 128 + number
        assert terminal.restored() and terminal.read() == ""
        run.check_gone()


def test_ctrl_c_before_the_guest_runs_is_for_us(folder, terminal):
    device = "socket=absent,device_type=rng"
    with terminal.run(folder, "--kernel", "spin", "--generic-vhost-user", device) as run:
        await_true(lambda: "waiting for a backend" in terminal.read())
        os.write(terminal.ours, b"\x03")
        assert run.finish() == 130
        assert terminal.restored()
        run.check_gone()


def test_a_terminal_that_goes_away_ends_the_machine(folder):
    terminal = Terminal()
    with terminal.run(folder, "--kernel", "spin") as run:
        await_true(terminal.raw)
        terminal.close()
        assert run.finish() == 129
        run.check_gone()
