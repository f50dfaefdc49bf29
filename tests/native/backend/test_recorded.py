"""`pyvmm trace` with recordings of the proxy."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from threading import Thread

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.program import environment
from fakes.ring_driver import RawFrontend
from native.backend.test_proxy import Listener, Odd, Upper, plug, recording  # noqa: F401 (fixtures)

from pyvmm.backend import serve
from pyvmm.backend.proxy import Proxy
from pyvmm.cli import main
from pyvmm.vhost_user.payloads import Config


def test_show(recording, capsys):  # noqa: F811
    assert main(["trace", "show", str(recording[0])]) == 0
    shown = capsys.readouterr().out
    assert "SET_MEM_TABLE" in shown
    assert "(memfd, memfd)" in shown
    assert "readable 3, writable 3" in shown


@pytest.mark.parametrize(("make", "status"), [(Upper, 0), (Odd, 1)])
def test_replay(recording, tmp_path, capsys, make, status):  # noqa: F811
    path = str(tmp_path / "socket")
    backend = Listener(make(), path)
    try:
        assert main(["trace", "replay", str(recording[0]), "--to", path]) == status
    finally:
        backend.close()
    assert ("GET_CONFIG" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize(
    "words",
    [[], ["show"], ["draw", "x"], ["show", "/none"], ["replay", "/none"], ["replay", "/x", "--to", "/y"]],
)
def test_what_is_wrong_is_one_line(words, capfd):
    assert main(["trace", *words]) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_reader_that_goes_away_is_no_error(recording):  # noqa: F811
    """As in `pyvmm trace show FILE | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-P", "-m", "pyvmm", "trace", "show", str(recording[0])]
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, env=environment(), check=False, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# -- several connections -------------------------------------------------------------------------

PAUSE = 0.3  # seconds between two questions of each connection


class Counting(Upper):
    """Its configuration says how many connections there were."""

    def on_connect(self):
        self.config["word"] += 1


def connected(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


@pytest.fixture
def twice(tmp_path):
    """A recording of two connections."""
    backend = Listener(Counting(), str(tmp_path / "backend"))
    proxy = Listener(Proxy(str(tmp_path / "backend"), str(tmp_path / "record")), str(tmp_path / "proxy"))
    for number in (1, 2):
        frontend = RawFrontend(connected(str(tmp_path / "proxy")))
        frontend.negotiate()
        time.sleep(PAUSE)
        assert frontend.ask("GET_CONFIG", Config(0, 0, bytes(4))).data[0] == number
        frontend.close()
    proxy.close()
    backend.close()
    return str(tmp_path / "record")


@pytest.fixture
def backend(tmp_path):
    path = str(tmp_path / "again")
    backend = Listener(Counting(), path)
    yield path
    backend.close()


def test_each_connection_is_had_again_on_one_of_its_own(twice, backend, capsys):
    assert main(["trace", "replay", twice, "--to", backend]) == 0
    assert main(["trace", "show", twice]) == 0
    assert capsys.readouterr().out.count("a frontend connected") == 2


@pytest.mark.parametrize(("number", "status"), [("1", 0), ("2", 1), ("3", 2), ("one", 2)])
def test_one_of_the_connections(twice, backend, capfd, number, status):
    assert main(["trace", "replay", twice, "--to", backend, "--connection", number]) == status
    said = capfd.readouterr()
    assert said.out.startswith("connection 2\n") == (number == "2")
    assert ("has those from 1 to 2" in said.err) == (status == 2)


def test_recorded_times(twice, backend):
    begin = time.monotonic()
    assert main(["trace", "replay", twice, "--to", backend, "--paced"]) == 0
    assert time.monotonic() - begin >= 2 * PAUSE


def test_backend_that_serves_one_connection(twice, tmp_path, capfd):
    path = str(tmp_path / "once")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)

    def once():
        client, _ = listener.accept()
        listener.close()
        os.unlink(path)
        serve(Counting(), client)

    thread = Thread(target=once)
    thread.start()
    assert main(["trace", "replay", twice, "--to", path]) == 2
    thread.join()
    said = capfd.readouterr().err
    assert f"{path}: connection 2 (a backend may serve only one: ask with --connection): No such file" in said
