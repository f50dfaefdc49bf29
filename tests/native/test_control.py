"""The control socket of a real machine, and `pyvmm rings` at its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.backend import no_new_fds
from fakes.entropy import Entropy, PackedEntropy, scenario
from fakes.packed_driver import EVENTS_OFF
from fakes.program import SPIN, pvh_elf

from pyvmm import config as cfg
from pyvmm import control
from pyvmm.cli import rings
from pyvmm.errors import ConfigError
from pyvmm.loop import EventLoop
from pyvmm.vm import Vm

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("need_kvm")]

RINGS = 0x10_0000
FIRST_SLOT = 1


@pytest.fixture(params=["reconnect"])
def machine(tmp_path, request):
    """A machine with an entropy device that spins, and its control socket where all users get to.

    The parameter is what happens when a backend is lost.
    """
    folder = tempfile.mkdtemp(dir="/tmp")
    os.chmod(folder, 0o755)
    kernel, path = tmp_path / "vmlinux", f"{folder}/control"
    kernel.write_bytes(pvh_elf(SPIN, base=0x40_0000))
    config = cfg.VmConfig(
        cfg.PayloadConfig(str(kernel)),
        memory=cfg.MemoryConfig(64 << 20),
        devices=(cfg.RngDevice("/dev/zero"),),
        control=path,
        on_backend_loss=request.param,
    )
    with EventLoop() as loop, Vm(config, loop) as vm:
        yield vm, loop, path
    os.rmdir(folder)  # which is empty


def test_a_queue_at_work_and_stuck(machine, capsys):
    vm, loop, path = machine

    def steps():
        entropy = Entropy(vm, FIRST_SLOT, RINGS)
        assert rings.main([path, "--seconds", "0.01"]) == 0
        assert "rng" not in capsys.readouterr().out  # no driver, no queue
        entropy.start()
        assert entropy.ask()
        assert rings.main([path, "--seconds", "0.01"]) == 0
        assert capsys.readouterr().out.splitlines()[1].split() == ["rng", "0", "split", "8", "1", "1", "idle"]
        backend = vm._prepared[0]._backend.process
        os.kill(backend.pid, signal.SIGSTOP)
        try:
            assert not entropy.ask(0.05)
            assert rings.main([path, "--seconds", "0.1", "--descriptors"]) == 1
        finally:
            os.kill(backend.pid, signal.SIGCONT)
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].split() == ["rng", "0", "split", "8", "2", "1", "stuck", "0"]
        assert lines[2] == "    head 0: 0x300000, 64 bytes, device writes"
        assert rings.main([path, "--seconds", "0.3", "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["queues"]
        assert (row["device"], row["avail"], row["used"], row["state"]) == ("rng", 2, 2, "idle")

    scenario(vm, loop, steps)


@pytest.mark.parametrize("machine", ["fail"], indirect=True)  # where packed rings are offered
def test_a_packed_queue_at_work_and_stuck(machine, capsys):
    """For more than a lap; what it takes to say so is that the driver waits for an event."""
    vm, loop, path = machine

    def shown(*options):
        status = rings.main([path, *options])
        return status, [line.split() for line in capsys.readouterr().out.splitlines()[1:]]

    def steps():
        entropy = PackedEntropy(vm, FIRST_SLOT, RINGS)
        entropy.start()
        assert shown("--seconds", "0.01") == (0, [["rng", "0", "packed", "8", "0", "0", "idle"]])
        for _ in range(9):
            assert entropy.ask()
        assert shown("--seconds", "0.01") == (0, [["rng", "0", "packed", "8", "9", "9", "idle"]])
        backend = vm._prepared[0]._backend.process
        os.kill(backend.pid, signal.SIGSTOP)
        try:
            assert not entropy.ask(0.05)
            status, lines = shown("--seconds", "0.1", "--descriptors")
            assert (status, lines[0]) == (1, ["rng", "0", "packed", "8", "10", "9", "stuck", "1"])
            assert " ".join(lines[1]) == "head 1: 0x300000, 64 bytes, device writes"
            entropy.wait_for(0, EVENTS_OFF)
            unclear = ["rng", "0", "packed", "8", "10", "9", "unclear", "1?"]
            assert shown("--seconds", "0.1") == (0, [unclear])
        finally:
            os.kill(backend.pid, signal.SIGCONT)
        assert rings.main([path, "--seconds", "0.3", "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["queues"]
        assert (row["ring"], row["avail"], row["used"], row["state"]) == ("packed", 10, 10, "idle")
        assert (row["outstanding"], row["unsure"], row["chains"]) == (0, 0, {})

    scenario(vm, loop, steps)


def test_the_memory_cannot_be_written(machine):
    vm, loop, path = machine

    def steps():
        facts, fd = control.ask(path)
        assert facts["pid"] == os.getpid()
        assert facts["ram"] == [[0, 64 << 20, 0]]
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
        os.close(fd)

    scenario(vm, loop, steps)


def test_who_does_not_listen_costs_nothing(machine):
    """Peers that hang up at once, that send, that never read."""
    vm, loop, path = machine

    def steps():
        silent = []
        for index in range(50):
            peer = socket.socket(socket.AF_UNIX)
            peer.connect(path)
            with contextlib.suppress(BrokenPipeError):
                peer.send(b"garbage" * 100)
            silent.append(peer) if index % 2 else peer.close()
        _, fd = control.ask(path)
        os.close(fd)
        for peer in silent:
            peer.close()

    scenario(vm, loop, steps)


ASK = """
import os, socket, sys
os.seteuid(int(sys.argv[2]))
peer = socket.socket(socket.AF_UNIX)
peer.connect(sys.argv[1])
print(len(peer.recv(9)))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize(("user", "told"), [(0, b"9"), (65534, b"0")])
def test_other_users_are_told_nothing(machine, user, told):
    vm, loop, path = machine
    os.chmod(path, 0o777)

    def steps():
        done = subprocess.run([sys.executable, "-c", ASK, path, str(user)], capture_output=True, check=True)
        assert done.stdout.strip() == told

    scenario(vm, loop, steps)


@pytest.mark.parametrize("what", ["absent", "file", "silent", "foreign"])
def test_what_is_no_control_socket(tmp_path, what):
    path = tmp_path / "socket"
    listener = socket.socket(socket.AF_UNIX)
    if what == "file":
        path.write_text("text")
    elif what != "absent":
        listener.bind(str(path))
        listener.listen()
        peer = socket.socket(socket.AF_UNIX)
    with no_new_fds(), pytest.raises(ConfigError, match="machine|control socket"):
        if what == "foreign":
            import threading

            def answer():
                with listener.accept()[0] as peer, open("/dev/null") as null:
                    socket.send_fds(peer, [b"hello"], [null.fileno()])

            thread = threading.Thread(target=answer)
            thread.start()
            try:
                control.ask(str(path))
            finally:
                thread.join()
        control.PATIENCE, patience = 0.1, control.PATIENCE
        try:
            control.ask(str(path))
        finally:
            control.PATIENCE = patience
    listener.close()
    if what in ("silent", "foreign"):
        peer.close()


@pytest.mark.parametrize("words", [[], ["a", "b"], ["--seconds", "0", "x"], ["--nope"]])
def test_bad_words(words):
    with pytest.raises(ConfigError):
        rings.main(words)


def test_without_numpy(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pyvmm.ringview")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("pyvmm.ringview", raising=False)
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ConfigError, match=r"needs numpy: pip install 'pyvmm\[numpy\]'"):
        rings.main(["/run/vm.sock"])


RAM = '{"ram": [[0, 4096, 0]], "devices": '


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("[" * 100_000, "this is no control socket of pyvmm"),
        ("[]", "it tells no machine .TypeError: "),
        ("{}", "it tells no machine .KeyError: 'ram'.; name the --control socket of one"),
        ('{"ram": [[0]], "devices": []}', "it tells no machine"),
        (
            '{"ram": [[0, 9999999, 0]], "devices": []}',
            "it tells no machine .ValueError: the RAM file has 4096",
        ),
        (RAM + "[{}]}", "it tells no machine"),
    ],
)
def test_a_socket_that_tells_nonsense(tmp_path, monkeypatch, said, message):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener, open(tmp_path / "ram", "wb+") as ram, no_new_fds():
        ram.truncate(4096)
        listener.bind("control")
        listener.listen()

        def tell():
            peer, _ = listener.accept()
            with peer, contextlib.suppress(OSError):
                socket.send_fds(peer, [said.encode()], [ram.fileno()])

        teller = threading.Thread(target=tell)
        teller.start()
        with pytest.raises(ConfigError, match=message):
            rings.main(["control"])
        teller.join()


def test_a_socket_that_tells_for_ever(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(control, "PATIENCE", 0.5)
    with socket.socket(socket.AF_UNIX) as listener, open(tmp_path / "ram", "wb+") as ram:
        listener.bind("control")
        listener.listen()

        def tell():
            peer, _ = listener.accept()
            with peer, contextlib.suppress(OSError):
                socket.send_fds(peer, [b" "], [ram.fileno()])
                while True:
                    peer.send(b" ")
                    time.sleep(0.01)

        teller = threading.Thread(target=tell)
        teller.start()
        with pytest.raises(ConfigError, match="this is no control socket of pyvmm"):
            control.ask("control")
        teller.join()
