"""`pyvmm lab` as its users see it: streams, status, files, terminal, size, and its end.

These run the real QEMU, virtiofsd and Debian's kernel; each start takes some seconds.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path

import pytest

import pyvmm
from pyvmm.host import accel, emulator, kernels
from pyvmm.host.backends import find_virtiofsd

pytestmark = [pytest.mark.lab, pytest.mark.slow]

DEADLINE = 120
PYVMM = [sys.executable, "-P", "-m", "pyvmm"]
COMMAND = [*PYVMM, "lab"]
LIMIT = ("--timeout", "100")
Lab = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture(scope="module", autouse=True)
def need_lab() -> None:
    if not shutil.which(emulator.QEMU):
        pytest.skip("no QEMU (apt-get install qemu-system-x86)")
    if not find_virtiofsd():
        pytest.skip("no virtiofsd (apt-get install qemu-system-common)")
    if not [kernel for kernel in kernels.find_kernels() if kernel.source in ("debian", "boot")]:
        pytest.skip("no kernel of Debian's (scripts/demo fetches one)")


def environment() -> dict[str, str]:
    """This process's, with this pyvmm importable by children."""
    return {**os.environ, "PYTHONPATH": str(Path(pyvmm.__file__).parents[1])}


@pytest.fixture
def lab() -> Lab:
    def run(
        *argv: str, options: tuple[str, ...] = (), stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        return execute(*COMMAND, *options, "--", *argv, stdin=stdin)

    return run


def execute(*argv: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        argv, input=stdin, capture_output=True, timeout=DEADLINE, env=environment(), check=False
    )


def test_streams_status_kvm_size_and_surroundings(lab: Lab) -> None:
    script = "test -c /dev/kvm && pwd && echo $HOME && uname -n && echo $PYVMM_LAB && echo err >&2; "
    script += "nproc; grep MemTotal /proc/meminfo; exit 7"
    done = lab("sh", "-c", script, options=("--cpus", "3", "--memory", "2G"))
    *lines, total = done.stdout.decode().splitlines()
    assert lines == [os.getcwd(), os.environ["HOME"], "lab", "1", "3"]
    assert 0.85 * 2048 < int(total.split()[1]) / 1024 <= 2048
    assert done.stderr == b"err\n"
    assert done.returncode == 7


def test_input_output_and_shares(lab: Lab, tmp_path: Path) -> None:
    data = os.urandom(5_000_000)
    hidden = tmp_path / "hidden"
    shared = tmp_path / "shared"
    shared.mkdir()
    script = f"cat; head -c 1000000 /dev/zero >&2; echo kept >{shared}/file; echo lost >{hidden}; kill -9 $$"
    done = lab("sh", "-c", script, options=("--share", str(shared)), stdin=data)
    assert done.stdout == data
    assert done.stderr == bytes(1_000_000)
    assert done.returncode == 128 + signal.SIGKILL
    assert (shared / "file").read_text() == "kept\n"
    assert not hidden.exists()


def test_a_program_that_is_not_there(lab: Lab) -> None:
    done = lab("no-such-program", options=("-v",))
    assert done.returncode == 127
    assert b"cannot run 'no-such-program' in the guest: No such file" in done.stderr
    assert b"Linux version" in done.stderr  # -v shows the machine's console


def test_a_panic_has_its_own_status(lab: Lab) -> None:
    done = lab("sh", "-c", "echo c >/proc/sysrq-trigger; sleep 100")
    assert done.returncode == 125
    assert b"its kernel panicked: sysrq triggered crash" in done.stderr


def test_time_runs_out(lab: Lab) -> None:
    done = lab("sleep", "1000", options=("--timeout", "12"))
    assert done.returncode == 124
    assert b"within 12 s" in done.stderr


def test_what_the_command_leaves_behind_is_ended(lab: Lab) -> None:
    begin = time.monotonic()
    done = lab("sh", "-c", "trap '' TERM; sleep 1000 & echo started")
    assert (done.returncode, done.stdout) == (0, b"started\n")
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize("wanted", ["lab", "auto"])
def test_run_goes_into_the_lab_when_told_to_or_when_it_must(wanted: str, tmp_path: Path) -> None:
    """The command's streams and status come out of the guest in the machine; `auto` says why it is there."""
    reason = accel.why_not() if wanted == "auto" else ""
    if wanted == "auto" and not reason:
        pytest.skip("this host's KVM runs kernels")
    script = f"uname -n; cat; pwd >{tmp_path}/kept; echo err >&2; exit 9"
    done = execute(
        *(*PYVMM, "run", "--accel", wanted, "--share", str(tmp_path), "--timeout", "100"),
        *("--", "sh", "-c", script),
        stdin=b"in\0put",
    )
    line = f"pyvmm: {reason}: using an emulated machine instead (pyvmm lab), " if reason else ""
    first, _, rest = done.stderr.decode().rpartition("err\n")
    assert (done.returncode, done.stdout, rest) == (9, b"pyvmm\nin\0put", ""), done.stderr
    assert first.startswith(line) and first.count("\n") == bool(line)
    assert (tmp_path / "kept").read_text() == f"{os.getcwd()}\n"


def helpers_of(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_it(number: signal.Signals) -> None:
    with subprocess.Popen([*COMMAND, *LIMIT, "--", "sleep", "1000"], env=environment()) as process:
        deadline = time.monotonic() + 30
        while len(helpers_of(process.pid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        helpers = helpers_of(process.pid)
        process.send_signal(number)
        status = process.wait(30)
    assert status == (128 + number if number == signal.SIGTERM else -number)
    for helper in helpers:
        deadline = time.monotonic() + 10
        while Path(f"/proc/{helper}/exe").is_symlink() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not is_running(helper)


def is_running(pid: int) -> bool:
    """Whether there is such a process that is no zombie."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


class Terminal:
    """The lab's shell, which is what it runs without a command, on a pseudo terminal."""

    def __init__(self) -> None:
        self.fd, child = os.openpty()
        self.resize(31, 101)
        self.process = subprocess.Popen(
            [*COMMAND, *LIMIT],
            stdin=child,
            stdout=child,
            stderr=child,
            env={**environment(), "SHELL": "/bin/sh"},
            start_new_session=True,
        )
        self.child = child
        self.text = b""

    def resize(self, rows: int, columns: int) -> None:
        ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def expect(self, wanted: bytes) -> None:
        deadline = time.monotonic() + DEADLINE
        while wanted not in self.text:
            assert time.monotonic() < deadline, f"no {wanted!r} in {self.text!r}"
            if select.select([self.fd], [], [], 1)[0]:
                self.text += os.read(self.fd, 4096)
        self.text = self.text.partition(wanted)[2]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(30)
        os.close(self.fd)
        os.close(self.child)


@pytest.fixture
def shell() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def test_a_terminal_is_a_terminal(shell: Terminal) -> None:
    before = termios.tcgetattr(shell.child)
    shell.type(b"stty size; tty\n")
    shell.expect(b"31 101\r\n")
    shell.expect(b"/dev/pts/0\r\n")
    assert termios.tcgetattr(shell.child) != before  # raw while it runs
    shell.resize(40, 120)
    os.kill(shell.process.pid, signal.SIGWINCH)
    time.sleep(1)
    shell.type(b"stty size\n")
    shell.expect(b"40 120\r\n")
    shell.type(b"sleep 1000\n")
    time.sleep(1)
    shell.type(b"\x03")  # Ctrl-C is for the guest's terminal
    shell.type(b"echo status $?\n")
    shell.expect(b"status 130\r\n")
    shell.type(b"exit 9\n")
    assert shell.process.wait(60) == 9
    assert termios.tcgetattr(shell.child) == before
