"""A user's device as a program: what `main` says of what goes wrong, and of itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.program import environment
from native.backend.test_faults import Driver

SOURCE = """
from pyvmm.backend import Device
from pyvmm.backend.program import main
from pyvmm.errors import ConfigError


class Own(Device):
    device_id = 63
    queue_sizes = (16,)

    def __init__(self, when, error):
        super().__init__()
        self.when, self.error = when, error
        self.fail("make")

    def fail(self, when):
        if self.when == when:
            raise self.error

    def open(self, loop):
        self.fail("open")

    def on_queue(self, queue):
        for chain in queue:
            self.fail("on_queue")


ERRORS = {"ConfigError": ConfigError, "OSError": OSError, "ValueError": ValueError}
OPTIONS = [("--when", None, "when to fail"), ("--error", None, "and how")]
if __name__ == "__main__":
    main("own", lambda options: Own(options.when, ERRORS[options.error]("as told")), OPTIONS)
"""


@pytest.fixture
def ends(tmp_path):
    """How the program ended that was used once, and what it said."""
    (tmp_path / "own.py").write_text(SOURCE)

    def ends(when, error, *options):
        ours, theirs = socket.socketpair()
        command = [sys.executable, "own.py", "--when", when, "--error", error, *options]
        with theirs:
            process = subprocess.Popen(
                [*command, "--fd", str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=tmp_path,
                stderr=subprocess.PIPE, text=True, env=environment(),
            )  # fmt: skip
        with ours, process, ExitStack() as stack:
            if when == "on_queue":
                driver = stack.enter_context(closing(Driver(ours)))
                driver.send(b"x")
            return process.wait(20), process.stderr.read()

    return ends


@pytest.mark.parametrize(
    ("when", "error"),
    [
        ("make", "ConfigError"),
        ("make", "OSError"),
        ("make", "ValueError"),
        ("open", "ConfigError"),
        ("on_queue", "ConfigError"),
    ],
)
def test_what_the_user_can_mend_is_one_line(ends, when, error):
    assert ends(when, error) == (2, "pyvmm: own backend: as told\n")


@pytest.mark.parametrize("error", ["OSError", "ValueError"])
def test_and_has_a_traceback_for_those_who_ask(ends, error):
    status, text = ends("make", error, "-vv")
    assert status == 2
    assert f"{error}: as told" in text and "own.py" in text


@pytest.mark.parametrize("when", ["open", "on_queue"])
@pytest.mark.parametrize("error", ["OSError", "ValueError"])
def test_bug_in_the_device_has_a_traceback(ends, when, error):
    status, text = ends(when, error)
    assert status == 1
    assert "Traceback" in text and f"{error}: as told" in text and "own.py" in text


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["own.py"], "own.py"),
        (["-m", "own"], "python -m own"),
        (["-m", "pyvmm.backend.rng"], "python -m pyvmm.backend.rng"),
        (["-m", "pyvmm.backend.console"], "python -m pyvmm.backend.console"),
    ],
)
def test_help_names_the_program_as_it_was_started(tmp_path, words, name):
    (tmp_path / "own.py").write_text(SOURCE)
    command = [sys.executable, *words, "--help"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=environment(), check=False
    )
    assert done.stdout.startswith(f"usage: {name} [-h]")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rng --fd 0", "--fd 0: Socket operation on non-socket; pass a Unix stream socket"),
        ("rng --fd 99999999999", "--fd 99999999999: "),
        ("rng --socket-path .", "--socket-path .: Address already in use; give a path where nothing is yet"),
        ("rng --socket-path s --source .", ".: is a directory; name a readable file or device"),
        ("rng --socket-path s --source pipe", "pipe: is a pipe; name a readable file or device"),
        ("rng --socket-path=", "argument --socket-path: an empty value"),
        ("rng --socket-path s --faults=", "argument --faults: an empty value"),
        ("blk --socket-path s --blk-file own --num-queues=-1", "--num-queues -1: a number from 1 to 256 is"),
        ("blk --socket-path s --blk-file own --num-queues 65536", "--num-queues 65536: a number from 1 to"),
        ("echo --socket-path s --queues 4294967296", "--queues 4294967296: a number from 1 to 256 is needed"),
        ("echo --socket-path s --size x", "--size x: a number from 1 to 32768 is needed"),
        ("console --socket-path s --port fd=0 --port fd=0", "--port: fd=0: two ports cannot have the same"),
        ("console --socket-path s --port fd=99999999999", "--port: fd=99999999999: "),
        ("console --socket-path s --port to=socket=s", "--port: cannot listen at s: Address already in use"),
        ("proxy --socket-path s --to x --record pipe", "--record: pipe: nobody is at its other end; a writ"),
    ],
)
def test_options_that_cannot_be(tmp_path, line, message):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "own").write_bytes(bytes(512))
    before = set(os.listdir(tmp_path))
    name, *words = line.split()
    done = subprocess.run(
        [sys.executable, "-P", "-m", f"pyvmm.backend.{name}", *words], stdin=subprocess.DEVNULL,
        cwd=tmp_path, capture_output=True, text=True, env=environment(), check=False, timeout=20,
    )  # fmt: skip
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("buffered", ["", "1"])
def test_capabilities_that_nobody_takes(buffered):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pyvmm.backend.rng", "--print-capabilities"], stdout=full,
            stderr=subprocess.PIPE, env={**environment(), "PYTHONUNBUFFERED": buffered}, check=False,
        )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_socket(tmp_path, number):
    command = [
        sys.executable,
        "-P",
        "-m",
        "pyvmm.backend.console",
        "--socket-path",
        "s",
        "--port",
        "to=socket=c",
    ]
    with subprocess.Popen(command, cwd=tmp_path, env=environment()) as process:
        due = time.monotonic() + 20
        while len(os.listdir(tmp_path)) < 2:
            assert process.poll() is None and time.monotonic() < due
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(20) == 0
    assert not os.listdir(tmp_path)


def test_socket_that_cannot_be(tmp_path):
    (tmp_path / "own.py").write_text(SOURCE)
    command = [sys.executable, "own.py", "--when", "never", "--error", "OSError"]
    for where in (["--fd", "77"], ["--socket-path", "/none/sock"]):
        done = subprocess.run(
            [*command, *where], cwd=tmp_path, capture_output=True, text=True, env=environment(), check=False
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
