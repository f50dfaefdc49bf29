"""Real `pyvmm` processes where outputs are full, files run out, and backends' programs do anything."""

from __future__ import annotations

import os
import sys
import time

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes import program
from fakes.program import LIMIT, POWER_OFF, SPIN, Program, pvh_elf

import pyvmm

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("need_kvm")]

DEVICES = (
    "--console",
    "file=console",
    "--serial",
    "socket=serial",
    "--rng",
    "src=/dev/zero",
    "--disk",
    "path=disk",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with kernels and a disk."""
    monkeypatch.chdir(tmp_path)
    for name, code in (("spin", SPIN), ("off", POWER_OFF)):
        (tmp_path / name).write_bytes(pvh_elf(code))
    (tmp_path / "console").write_bytes(b"")
    with (tmp_path / "disk").open("wb") as disk:
        disk.truncate(1 << 20)
    return tmp_path


def until(test):
    due = time.monotonic() + LIMIT
    while not test():
        assert time.monotonic() < due
        time.sleep(0.005)


@pytest.mark.parametrize("words", ["--help", "--version", "run --help", "devices", "devices fs"])
@pytest.mark.parametrize("buffered", ["", "1"])
def test_output_that_nobody_takes(folder, words, buffered):
    env = {"PYTHONUNBUFFERED": buffered}
    full = ("sh", "-c", 'exec "$@" >/dev/full', "-")
    assert program.run(folder, *words.split(), under=full, env=env) == (
        70, "", "pyvmm: the host refused: [Errno 28] No space left on device\n"
    )  # fmt: skip
    reader, writer = os.pipe()
    os.close(reader)
    with Program(folder, *words.split(), stdout=writer, env=env) as run:
        os.close(writer)
        assert (run.finish(), run.stderr) == (141, b"")


@pytest.mark.parametrize("files", range(6, 32, 2))
def test_too_few_open_files(folder, files):
    """Wherever they run out: one line, and no directory of a backend's socket stays."""
    limit = ("sh", "-c", f'ulimit -n {files}; exec "$@"', "-")
    status, stdout, stderr = program.run(folder, "--kernel", "off", *DEVICES, under=limit)
    assert (status, stdout) in ((0, ""), (2, ""), (70, ""))
    assert stderr.count("\n") == (1 if status else 0) and "Traceback" not in stderr


@pytest.mark.parametrize("made", ["mkdir $1", "mkdir $1.d $1.d/x; touch $1.d/y", "ln -s / $1"])
def test_whatever_a_command_makes_beside_its_socket_goes(folder, made):
    (folder / "make").write_text(f"#!/bin/sh\n{made}\nexit 3\n")
    (folder / "make").chmod(0o755)
    device = "device_type=rng,exec=./make {socket}"
    status, _, stderr = program.run(folder, "--kernel", "off", "--generic-vhost-user", device)
    assert status == 2 and stderr == "pyvmm: make did not listen (it ended with status 3)\n"


TALKATIVE = "yes a line of a hundred bytes or so | head -c 1000000 >&2"
OWN = f"exec {sys.executable} -P -m pyvmm.backend.rng"


@pytest.mark.parametrize("where", ["--socket-path $1|{socket}", "--fd $1|{fd}"])
def test_a_command_that_has_much_to_say_before_it_listens(folder, where):
    option, mark = where.split("|")
    (folder / "talk").write_text(f"#!/bin/sh\n{TALKATIVE}\n{OWN} {option}\n")
    (folder / "talk").chmod(0o755)
    device = f"device_type=rng,exec=./talk {mark}"
    status, _, stderr = program.run(
        folder, "--kernel", "off", "--console", "off", "--generic-vhost-user", device,
        env={"PYTHONPATH": os.path.dirname(os.path.dirname(pyvmm.__file__))},
    )  # fmt: skip
    assert status == 0 and stderr.count("a line of") > 20_000


def test_a_command_that_says_more_than_anybody_reads(folder):
    (folder / "talk").write_text(f"#!/bin/sh\nyes >&2 &\n{OWN} --fd $1\n")
    (folder / "talk").chmod(0o755)
    device = "device_type=rng,exec=./talk {fd}"
    words = ("--kernel", "spin", "--console", "off", "--serial", "socket=serial")
    env = {"PYTHONPATH": os.path.dirname(os.path.dirname(pyvmm.__file__))}
    with Program(folder, *words, "--generic-vhost-user", device, env=env) as run:
        until((folder / "serial").exists)
        time.sleep(1.5)  # by now our own standard error is full
        run.process.terminate()
        assert run.process.wait(10) == 143
        run.check_gone(seconds=1)


def test_a_command_that_is_a_script_around_the_backend(folder):
    """It ends at SIGTERM, and what it waited for goes with it."""
    (folder / "wrap").write_text(f"#!/bin/sh\n{OWN.removeprefix('exec ')} --fd $1\nsleep 300\n")
    (folder / "wrap").chmod(0o755)
    env = {"PYTHONPATH": os.path.dirname(os.path.dirname(pyvmm.__file__))}
    device = "device_type=rng,exec=./wrap {fd}"
    words = ("--kernel", "off", "--console", "off", "--generic-vhost-user", device)
    with Program(folder, *words, env=env) as run:
        assert run.finish() == 0
        run.check_gone(seconds=1)
