"""Our own small devices, each in a process of its own, and the programs that serve them."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
import zlib

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.console_driver import CONSOLE_PORT, PORT_NAME, ConsoleDriver
from fakes.packed_driver import FRESH, PackedQueue
from fakes.ring_driver import DriverQueue, Ram, RawFrontend

from pyvmm.backend.process import spawn
from pyvmm.vhost_user.payloads import U64, VringState


@pytest.fixture
def plug():
    """Serve a device in a process; a negotiated frontend with `count` running queues."""
    running = []

    def plug(make, count=1, size=64):
        process = spawn(make)
        ram = Ram()
        frontend = RawFrontend(process.take_socket())
        frontend.negotiate()
        frontend.share(ram)
        queues = [DriverQueue(ram, size, event_idx=True) for _ in range(count)]
        for index, queue in enumerate(queues):
            assert frontend.start(index, queue) == 0
        running.extend((frontend, *queues, ram, process))
        return frontend, *queues

    yield plug
    for thing in running:
        thing.close()


def make_rng(source="/dev/urandom"):
    def make():
        from pyvmm.backend.rng import Rng

        return Rng(source)

    return make


def make_echo(**options):
    def make():
        from pyvmm.backend.echo import Echo

        return Echo(**options)

    return make


def test_rng(plug):
    _, queue = plug(make_rng())
    queue.add([], [64])
    queue.add([], [64])
    queue.kick()
    got = []
    while len(got) < 2:
        got += [data for _, data in queue.wait()]
    assert [len(data) for data in got] == [64, 64]
    assert got[0] != got[1] != bytes(64)


def test_rng_from_a_file_that_ends(plug, tmp_path):
    source = tmp_path / "bytes"
    source.write_bytes(b"0123456789")
    _, queue = plug(make_rng(str(source)))
    for _ in range(3):
        queue.add([], [8])
    queue.kick()
    got = []
    while len(got) < 2:
        got += [data for _, data in queue.wait()]
    assert got == [b"01234567", b"89"]
    assert queue.wait(0.2) == []


@pytest.mark.parametrize("native", [True, False])
def test_echo(plug, native):
    frontend, first, second = plug(make_echo(queues=2, native=native), 2)
    for queue in (first, second):
        queue.add([b"one ", b"two ", b"three"], [3, 20])
        queue.add([b"too long for it"], [8], indirect=True)
        queue.kick()
        got = []
        while len(got) < 2:
            got += [data for _, data in queue.wait()]
        assert got == [b"one two three", b"too long"]
    frontend.stop(1)
    first.add([b"still"], [8])
    first.kick()
    assert first.wait()[0][1] == b"still"


@pytest.mark.parametrize("native", [True, False])
def test_echo_over_a_packed_ring(native):
    process, ram = spawn(make_echo(native=native)), Ram()
    frontend = RawFrontend(process.take_socket())
    frontend.negotiate(1 << 30 | 1 << 32 | 1 << 34)
    frontend.share(ram)
    queue = PackedQueue(ram, 7)
    assert frontend.start(0, queue, base=FRESH) == 0
    for turn in range(200):
        queue.add_rows([(0, 4, 0), (64, 4, 2)][: 1 + turn % 2])
        queue.kick()
        assert len(queue.wait()) == 1
    for thing in (frontend, queue, ram, process):
        thing.close()


@pytest.mark.parametrize("native", [True, False])
def test_echo_keeps_order_and_content_over_many_buffers(plug, native):
    _, queue = plug(make_echo(native=native), size=64)
    ram = queue.ram
    sent = got = 0
    source, target = ram.alloc(64 * 32), ram.alloc(64 * 32)
    total = 50_000 if native else 20_000
    left, back = zlib.crc32(b""), zlib.crc32(b"")
    slots = list(range(32))
    where = {}
    while got < total:
        while slots and len(queue.free) >= 2 and sent < total:
            slot = slots.pop()
            data = sent.to_bytes(8, "little") * 8
            ram.data[source + 64 * slot : source + 64 * slot + 64] = data
            left = zlib.crc32(data, left)
            where[queue.add_rows([(source + 64 * slot, 64, 0), (target + 64 * slot, 64, 2)])] = slot
            sent += 1
        queue.kick()
        done = queue.wait()
        assert done, f"stuck after {got} of {sent}"
        for head, data in done:
            slots.append(where.pop(head))
            back = zlib.crc32(data, back)
            got += 1
    assert left == back


def test_echo_keeps_every_byte_across_reconnects(tmp_path):
    """`scripts/bench echo` does this with a thousand connections and ten million buffers."""
    path, rng = str(tmp_path / "echo.sock"), random.Random(4)
    left = back = 0
    with program("echo", "--socket-path", path) as process:
        for _ in range(40):
            ram, frontend = Ram(), RawFrontend(connect(path, process))
            frontend.negotiate()
            frontend.share(ram)
            queue = DriverQueue(ram, 64, event_idx=True)
            assert frontend.start(0, queue) == 0
            for _ in range(10):
                batch = [rng.randbytes(rng.randrange(1, 200)) for _ in range(32)]
                for data in batch:
                    queue.add([data], [len(data)])
                    left = zlib.crc32(data, left)
                queue.kick()
                got = []
                while len(got) < len(batch):
                    got += [data for _, data in queue.wait(20)]
                for data in got:
                    back = zlib.crc32(data, back)
            for thing in (frontend, queue, ram):
                thing.close()
        process.terminate()
        assert process.wait(10) == 0
    assert left == back


def test_echo_survives_a_change_of_memory_and_call_descriptor(plug):
    frontend, queue = plug(make_echo())
    assert frontend.share(queue.ram, 2) == 0
    from pyvmm.vhost_user.payloads import VringFile

    fresh = os.eventfd(0)
    assert frontend.tell("SET_VRING_CALL", VringFile(0, True), [fresh]) == 0
    queue.add([b"moved"], [8])
    queue.kick()
    assert select.select([fresh], [], [], 5)[0]
    assert queue.collect()[0][1] == b"moved"
    os.close(fresh)


def test_echo_with_a_broken_ring(plug):
    frontend, queue = plug(make_echo())
    queue.offer(999)
    queue.kick()
    time.sleep(0.1)
    frontend.stop(0)
    queue.reset()
    assert frontend.start(0, queue) == 0
    queue.add([b"healed"], [8])
    queue.kick()
    assert queue.wait()[0][1] == b"healed"


def test_device_that_cannot_be_made_ends_its_process(capfd):
    process = spawn(make_rng("/nonexistent"), name="rng")
    assert process.wait(5) == 70
    process.close()
    assert "rng backend failed: ConfigError: /nonexistent: No such file" in capfd.readouterr().err


# -- programs ----------------------------------------------------------------------------


def program(kind, *arguments, **options):
    command = [sys.executable, "-P", "-m", f"pyvmm.backend.{kind}", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def connect(path, process):
    end = time.monotonic() + 10
    while time.monotonic() < end:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
            return sock
        except OSError:
            sock.close()
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
    raise AssertionError("the backend does not listen")


@pytest.mark.parametrize(
    ("kind", "type_"), [("console", "console"), ("rng", "rng"), ("echo", "echo"), ("blk", "block")]
)
def test_capabilities(kind, type_):
    process = program(kind, "--print-capabilities", stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=20)
    assert (json.loads(out)["type"], err, process.returncode) == (type_, "", 0)


def test_program_listens_serves_again_and_cleans_up(tmp_path):
    path = str(tmp_path / "echo.sock")
    with program("echo", "--socket-path", path) as process:
        for _ in range(3):
            frontend = RawFrontend(connect(path, process))
            assert frontend.negotiate()
            frontend.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert not os.path.exists(path)
        assert process.stderr.read() == ""


def test_program_with_an_inherited_descriptor():
    ours, theirs = socket.socketpair()
    with theirs:
        process = program("rng", "--fd", str(theirs.fileno()), pass_fds=[theirs.fileno()])
    frontend = RawFrontend(ours)
    frontend.negotiate()
    assert frontend.number("GET_QUEUE_NUM") == 1
    frontend.close()
    with process:
        assert process.wait(10) == 0


def test_console_program(tmp_path):
    path, log = str(tmp_path / "console.sock"), tmp_path / "log"
    log.write_bytes(b"of before")
    ports = ("--port", f"console=on,to=file={log}", "--port", f"name=chat,to=socket={tmp_path}/chat")
    with program("console", "--socket-path", path, *ports) as process:
        driver = ConsoleDriver(connect(path, process), 2)
        driver.boot()
        driver.wait_for(0, CONSOLE_PORT, 1)
        assert driver.wait_for(1, PORT_NAME) == b"chat"
        driver.write(0, b"Linux version")
        client = connect(f"{tmp_path}/chat", process)
        driver.offer(1)
        driver.open(1)
        client.sendall(b"hi")
        assert driver.read(1, 2) == b"hi"
        client.close()
        driver.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    assert log.read_bytes() == b"Linux version"
    assert sorted(os.listdir(tmp_path)) == ["log"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--port", "nme=x"], "did you mean 'name'"),
        (["--port", "to=file=/nonexistent/x"], "/nonexistent/x"),
        (["--port", "to=tty", "--port", "to=tty"], "only one port"),
        (["--port", "fd=77"], "--port: fd=77: Bad file descriptor"),
        (["--port", "to=file=log", "--port", "to=file=/nonexistent/x"], "/nonexistent/x"),
    ],
)
def test_console_program_with_wrong_ports(tmp_path, arguments, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log").write_bytes(b"of before")
    with program("console", "--socket-path", str(tmp_path / "s"), *arguments) as process:
        assert process.wait(20) == 2
        message = process.stderr.read()
    assert text in message
    assert message.count("\n") == 1
    assert (tmp_path / "log").read_bytes() == b"of before"


def test_numbers_of_queues(plug):
    frontend, *_ = plug(make_echo(queues=5), 1)
    assert frontend.ask("GET_QUEUE_NUM") == U64(5)
    assert frontend.ask("GET_VRING_BASE", VringState(4, 0)) == VringState(4, 0)


def test_descriptions_are_found_and_their_programs_run(tmp_path, monkeypatch):
    from pyvmm.backend import describe
    from pyvmm.host import backends

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "da ta"))
    describe.main([])
    ours = [entry for entry in backends.descriptions() if "pyvmm" in entry.path.rsplit("/", 1)[1]]
    assert [entry.type for entry in ours] == ["block", "console", "net", "rng"]
    for entry in ours:
        done = subprocess.run(
            [entry.binary, "--print-capabilities"], check=True, capture_output=True, timeout=20
        )
        assert json.loads(done.stdout)["type"] == entry.type
        assert done.stderr == b""
