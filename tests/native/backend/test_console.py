"""The console backend in its own process, against a driver with Linux' habits.

In one file because every case needs the same process, ports and driver.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import struct
import time

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.console_driver import (
    CONSOLE_PORT,
    PORT_ADD,
    PORT_NAME,
    PORT_OPEN,
    RESIZE,
    ConsoleDriver,
)
from fakes.packed_driver import FRESH, PackedQueue
from fakes.ring_driver import RING_PACKED, Ram, RawFrontend

from pyvmm.backend import DeviceThread
from pyvmm.backend.console import Console
from pyvmm.backend.endpoints import PortConfig
from pyvmm.backend.process import spawn, spawn_console

F_SIZE, F_MULTIPORT = 1, 2
VERSION_1, PROTOCOL = 1 << 32, 1 << 30


@pytest.fixture
def start():
    """Start a backend process with ports, and a driver on it; everything ends with the test."""
    running = []

    def start(*ports, **options):
        process = spawn_console(ports)
        running.append(process)
        driver = ConsoleDriver(process.take_socket(), len(ports), **options)
        running.append(driver)
        return process, driver

    yield start
    for thing in reversed(running):
        thing.close()


@pytest.fixture
def pair():
    """A socketpair whose far end the test closes once the backend has it."""
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    yield ours, theirs
    ours.close()
    theirs.close()


def command_port(fd):
    return PortConfig("pyvmm.command", input_fd=fd, output_fd=fd)


def read_exactly(sock, count):
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        assert part, f"only {data!r} of {count} bytes came"
        data += part
    return data


def read_pipe(fd, count, timeout=5.0):
    data = b""
    while len(data) < count and select.select([fd], [], [], timeout)[0]:
        data += os.read(fd, count - len(data))
    return data


def test_ports_are_announced_with_their_roles_and_names(start, pair):
    _, theirs = pair
    _, driver = start(PortConfig("hvc", console=True), command_port(theirs.fileno()))
    driver.boot()
    driver.wait_for(0, CONSOLE_PORT, 1)
    assert driver.wait_for(1, PORT_NAME) == b"pyvmm.command"
    driver.wait_for(1, PORT_OPEN, 1)
    assert [event for event in driver.events if event[:2] == (1, CONSOLE_PORT)] == []
    driver.wait_for(1, PORT_ADD)


def test_bytes_both_ways(start, pair):
    ours, theirs = pair
    _, driver = start(PortConfig(console=True), command_port(theirs.fileno()))
    theirs.close()
    driver.boot()
    driver.wait_for(1, PORT_OPEN, 1)
    driver.offer(1)
    driver.open(1)
    ours.sendall(b"to the guest")
    assert driver.read(1, 12) == b"to the guest"
    driver.write(1, b"to the host")
    assert read_exactly(ours, 11) == b"to the host"


def test_input_waits_until_the_guest_opens_the_port(start, pair):
    ours, theirs = pair
    _, driver = start(PortConfig(console=True), command_port(theirs.fileno()))
    ours.sendall(b"early")
    driver.boot()
    driver.wait_for(1, PORT_OPEN, 1)
    driver.offer(1)
    assert driver.rx(1).wait(0.3) == []  # Linux would throw it away
    driver.open(1)
    assert driver.read(1, 5) == b"early"
    driver.control(1, PORT_OPEN, 0)
    ours.sendall(b"again")
    assert driver.rx(1).wait(0.3) == []
    driver.open(1)
    assert driver.read(1, 5) == b"again"


def test_megabytes_both_ways_at_once(start, pair):
    ours, theirs = pair
    _, driver = start(PortConfig(console=True), command_port(theirs.fileno()), size=8)
    theirs.close()
    driver.boot()
    driver.wait_for(1, PORT_OPEN, 1)
    driver.offer(1, 8, 3000)
    driver.open(1)
    ours.setblocking(False)
    data = bytes(range(251)) * 1200  # 300 KB; the ring memory of the fake is never reused
    sent = got = b""
    out = [data[at : at + 5000] for at in range(0, len(data), 5000)]
    back = b""
    end = time.monotonic() + 30
    while (len(got) < len(data) or len(back) < len(data)) and time.monotonic() < end:
        if len(sent) < len(data):
            try:
                count = ours.send(data[len(sent) :])
            except BlockingIOError:
                count = 0
            sent += data[len(sent) : len(sent) + count]
        while out and driver.tx(1).free:
            driver.tx(1).add([out.pop(0)])
        driver.tx(1).kick()
        driver.tx(1).collect()
        for _, part in driver.rx(1).collect():
            got += part
            driver.offer(1, 1, 3000)
        try:
            back += ours.recv(65536)
        except BlockingIOError:
            time.sleep(0.001)
    assert got == data
    assert back == data


def test_output_of_a_port_waits_in_the_guest(start, pair):
    """A full socket stops the backend from taking more: no buffer without a bound."""
    ours, theirs = pair
    _, driver = start(PortConfig(console=True), command_port(theirs.fileno()), size=128)
    theirs.close()
    driver.boot()
    driver.wait_for(1, PORT_OPEN, 1)
    driver.open(1)
    for _ in range(100):
        driver.tx(1).add([b"x" * 32768])
    driver.tx(1).kick()
    time.sleep(0.5)
    taken = len(driver.tx(1).collect())
    assert taken < 50  # 100 * 32 KiB is much more than a socket holds
    assert len(read_exactly(ours, 100 * 32768)) == 100 * 32768
    time.sleep(0.2)
    assert taken + len(driver.tx(1).collect()) == 100


def test_console_output_to_a_stuck_pipe_has_a_cushion(start):
    reader, writer = os.pipe()
    try:
        _, driver = start(PortConfig(console=True, output_fd=writer), size=64)
        os.close(writer)
        driver.boot()
        for _ in range(40):
            driver.write(0, b"y" * 4096)  # 160 KiB into a pipe of 64 that nobody reads
        assert len(read_pipe(reader, 40 * 4096)) == 40 * 4096
    finally:
        os.close(reader)


@pytest.mark.parametrize("end", ["stop", "vanish"])
def test_output_queued_at_the_end_is_not_lost(start, end):
    reader, writer = os.pipe()
    try:
        process, driver = start(PortConfig(console=True), PortConfig("log", output_fd=writer), size=64)
        os.close(writer)
        driver.boot()
        driver.wait_for(1, PORT_OPEN, 1)
        for _ in range(32):
            driver.tx(1).add([b"z" * 4096])  # more than the pipe holds
        driver.tx(1).kick()
        time.sleep(0.2)
        if end == "stop":
            driver.shut_down()
        driver.frontend.close()
        assert len(read_pipe(reader, 32 * 4096)) == 32 * 4096
        process.close()
        assert process.status == 0
    finally:
        os.close(reader)


def test_host_that_hangs_up_closes_the_port(start, pair):
    ours, theirs = pair
    _, driver = start(PortConfig(console=True), command_port(theirs.fileno()))
    theirs.close()
    driver.boot()
    driver.wait_for(1, PORT_OPEN, 1)
    driver.offer(1)
    driver.open(1)
    ours.sendall(b"last words")
    ours.close()
    assert driver.read(1, 10) == b"last words"
    driver.wait_for(1, PORT_OPEN, 0)
    driver.write(1, b"to nobody")  # completes: the guest must not hang on it


def test_host_done_with_sending_still_receives(start, pair):
    ours, theirs = pair
    _, driver = start(PortConfig(console=True), command_port(theirs.fileno()))
    theirs.close()
    driver.boot()
    driver.wait_for(1, PORT_OPEN, 1)
    driver.offer(1)
    driver.open(1)
    ours.sendall(b"question")
    ours.shutdown(socket.SHUT_WR)
    assert driver.read(1, 8) == b"question"
    driver.write(1, b"answer")
    assert read_exactly(ours, 6) == b"answer"
    ours.close()
    driver.wait_for(1, PORT_OPEN, 0)


def test_clients_of_a_listening_socket_come_and_go(start, tmp_path):
    path = str(tmp_path / "console.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)
    _, driver = start(PortConfig(console=True), PortConfig("chat", listen_fd=listener.fileno()))
    listener.close()
    driver.boot()
    driver.wait_for(1, PORT_OPEN, 0)
    driver.offer(1)
    driver.open(1)
    for word in (b"first", b"other"):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(path)
            driver.wait_for(1, PORT_OPEN, 1)
            client.sendall(word)
            assert driver.read(1, 5) == word
            driver.write(1, word)
            assert read_exactly(client, 5) == word
        driver.wait_for(1, PORT_OPEN, 0)


def test_pty(start):
    import tty

    ours, theirs = os.openpty()
    tty.setraw(theirs)
    _, driver = start(PortConfig(console=True, input_fd=ours, output_fd=ours), PortConfig())
    os.close(ours)
    driver.boot()
    driver.wait_for(0, CONSOLE_PORT, 1)
    driver.offer(0)
    os.write(theirs, b"ls\n")
    assert driver.read(0, 3) == b"ls\n"
    driver.write(0, b"file")
    assert os.read(theirs, 10) == b"file"
    os.close(theirs)


def test_files_as_input_and_output(start, tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"from a file" * 1000)
    read_fd = os.open(source, os.O_RDONLY)
    write_fd = os.open(target, os.O_WRONLY | os.O_CREAT)
    _, driver = start(PortConfig(console=True, input_fd=read_fd, output_fd=write_fd), PortConfig())
    os.close(read_fd)
    os.close(write_fd)
    driver.boot()
    driver.wait_for(0, CONSOLE_PORT, 1)
    driver.poll_control()
    driver.offer(0, 2)
    assert driver.read(0, 11000) == b"from a file" * 1000
    driver.write(0, b"into a file")
    assert target.read_bytes() == b"into a file"


def test_sizes(start):
    process, driver = start(PortConfig(console=True), PortConfig())
    driver.boot()
    driver.wait_for(0, CONSOLE_PORT, 1)
    channel = driver.frontend.backend_channel()
    process.resize(0, 132, 43)
    assert struct.unpack("<HH", driver.wait_for(0, RESIZE)) == (43, 132)
    assert struct.unpack("=III", channel.recv(12))[0] == 2  # CONFIG_CHANGE_MSG
    from pyvmm.vhost_user.payloads import Config

    reply = driver.frontend.ask("GET_CONFIG", Config(0, 0, bytes(12)))
    assert struct.unpack("<HHII", reply.data) == (132, 43, 2, 0)
    channel.close()


def test_emergency_write(start):
    from pyvmm.vhost_user.payloads import Config

    reader, writer = os.pipe()
    _, driver = start(PortConfig(console=True, output_fd=writer))
    os.close(writer)
    assert driver.frontend.tell("SET_CONFIG", Config(8, 0, b"!\0\0\0")) == 0
    assert driver.frontend.tell("SET_CONFIG", Config(4, 0, b"\xff\xff\xff\xff")) == 0
    assert read_pipe(reader, 1) == b"!"
    assert driver.frontend.ask("GET_CONFIG", Config(4, 0, bytes(4))).data == b"\1\0\0\0"
    os.close(reader)


def test_driver_without_multiport(start, pair):
    ours, theirs = pair
    console = PortConfig(console=True, input_fd=theirs.fileno(), output_fd=theirs.fileno())
    _, driver = start(console, PortConfig("unused"), features=VERSION_1 | PROTOCOL)
    theirs.close()
    for index in (0, 1):
        driver.frontend.start(index, driver.queues[index])
    driver.offer(0)
    ours.sendall(b"plain")
    assert driver.read(0, 5) == b"plain"
    driver.write(0, b"old")
    assert read_exactly(ours, 3) == b"old"


def test_a_lone_console_needs_no_dialogue(start, pair):
    """So that Linux has hvc0 before its first process; the size is there at the first output."""
    ours, theirs = pair
    process, driver = start(PortConfig(console=True, input_fd=theirs.fileno(), output_fd=theirs.fileno()))
    theirs.close()
    assert not driver.frontend.ask("GET_FEATURES").value & F_MULTIPORT
    channel = driver.frontend.backend_channel()
    process.resize(0, 132, 43)
    assert struct.unpack("=III", channel.recv(12))[0] == 2  # CONFIG_CHANGE_MSG, which no driver hears yet
    for index in (0, 1):
        driver.frontend.start(index, driver.queues[index])
    driver.offer(0)
    ours.sendall(b"typed")
    assert driver.read(0, 5) == b"typed"
    for word in (b"first", b"again"):
        driver.write(0, word)
        assert read_exactly(ours, 5) == word
    assert struct.unpack("=III", channel.recv(12))[0] == 2
    channel.setblocking(False)
    with pytest.raises(BlockingIOError):
        channel.recv(12)
    channel.close()


def test_pause_and_resume_loses_nothing(start, pair):
    ours, theirs = pair
    _, driver = start(PortConfig(console=True), command_port(theirs.fileno()))
    theirs.close()
    driver.boot()
    driver.wait_for(1, PORT_OPEN, 1)
    driver.offer(1)
    driver.open(1)
    ours.sendall(b"one")
    assert driver.read(1, 3) == b"one"
    bases = [driver.frontend.stop(index) for index in range(4 + 2)]
    assert bases[4] == 1  # the buffer that the device held in hand was not counted
    ours.sendall(b"two")
    time.sleep(0.1)
    for index, base in enumerate(bases):
        driver.frontend.start(index, driver.queues[index], base)
    assert driver.read(1, 3) == b"two"  # the port is still open, nobody announced it again


def test_a_second_driver_after_the_first(start, pair):
    """A reboot: queues stop and start again from zero on the same connection."""
    ours, theirs = pair
    _, driver = start(PortConfig(console=True), command_port(theirs.fileno()))
    theirs.close()
    for word in (b"first", b"again"):
        driver.boot()
        driver.wait_for(1, PORT_OPEN, 1)
        driver.offer(1)
        ours.sendall(word)
        assert driver.rx(1).wait(0.2) == []
        driver.open(1)
        assert driver.read(1, 5) == word
        driver.shut_down()
        driver.events.clear()
        for queue in driver.queues:
            queue.reset()


def test_garbage_from_the_guest_costs_nothing(start, pair):
    ours, theirs = pair
    process, driver = start(PortConfig(console=True), command_port(theirs.fileno()))
    driver.boot()
    for data in (b"", b"x", b"\xff" * 8, b"\xff" * 4096, struct.pack("<IHH", 1, PORT_ADD, 1)):
        driver.queues[3].add_rows([(driver.ram.put(data or b"x"), len(data), 0)])
        driver.queues[3].kick()
        assert driver.queues[3].wait()
    driver.queues[4].add_rows([(0, 0, 0)])  # a receive buffer without room
    driver.offer(1)
    driver.open(1)
    ours.sendall(b"fine")
    assert driver.read(1, 4) == b"fine"
    assert process.wait(0) is None


def test_broken_ring_stops_that_queue_until_it_is_set_up_again(start, pair):
    ours, theirs = pair
    process, driver = start(PortConfig(console=True), command_port(theirs.fileno()))
    driver.boot()
    driver.wait_for(1, PORT_OPEN, 1)
    driver.tx(1).offer(999)
    driver.tx(1).kick()
    time.sleep(0.1)
    driver.control(1, PORT_OPEN, 1)  # others go on
    driver.frontend.stop(5)
    driver.tx(1).reset()
    driver.frontend.start(5, driver.tx(1))
    driver.write(1, b"healed")
    assert read_exactly(ours, 6) == b"healed"
    assert process.wait(0) is None


def test_control_c_does_not_reach_it_and_sigterm_does(start):
    process, driver = start(PortConfig(console=True), PortConfig())
    driver.boot()
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGHUP)
    driver.wait_for(0, CONSOLE_PORT, 1)
    assert os.getsid(process.pid) == process.pid
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(5) == 0


def test_it_keeps_no_descriptor_that_it_was_not_given(start):
    extra = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(extra, True)
    process, driver = start(PortConfig(console=True), PortConfig())
    driver.boot()
    targets = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd")]
    os.close(extra)
    assert "/etc/passwd" not in targets
    assert targets.count("/dev/null") == 2 + (os.readlink("/proc/self/fd/2") == "/dev/null")


def test_it_dies_with_its_parent():
    """Also when somebody else still holds the frontend's end of the connection."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            process = spawn_console([PortConfig(console=True)])
            socket.send_fds(theirs, [str(process.pid).encode()], [process.socket.fileno()])
            time.sleep(60)
        finally:
            os._exit(0)
    data, (fd,), _, _ = socket.recv_fds(ours, 20, 1)
    frontend = RawFrontend(socket.socket(fileno=fd))
    assert frontend.number("GET_FEATURES")  # it is up
    pidfd = os.pidfd_open(int(data))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert select.select([pidfd], [], [], 5)[0], "the backend outlives its parent"
    os.close(pidfd)
    frontend.close()
    ours.close()
    theirs.close()


def test_the_parent_s_objects_are_not_finalised_in_the_child(tmp_path):
    """Their descriptors have new meanings there: closing one would hit something else."""

    class Finalised:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            if os.getpid() != parent:
                (tmp_path / "finalised").touch()

    def make():
        gc.collect()
        raise RuntimeError("enough")

    parent = os.getpid()
    gc.disable()
    try:
        Finalised()
        process = spawn(make)
        assert process.wait(5) == 70
        process.close()
    finally:
        gc.enable()
    assert not (tmp_path / "finalised").exists()


def test_new_driver_over_packed_rings_has_opened_nothing():
    """Unlike one that goes on from a pause."""
    console, ram = Console([PortConfig(), PortConfig("chat")]), Ram()
    with DeviceThread(console) as thread:
        frontend, queue = RawFrontend(thread.take_socket()), PackedQueue(ram, 16)
        frontend.negotiate(VERSION_1 | PROTOCOL | RING_PACKED | F_MULTIPORT)
        frontend.share(ram)
        for base, is_open in ((0x8005_8005, True), (FRESH, False)):
            console.ports[1].guest_open = True
            assert frontend.start(4, queue, base=base) == 0
            assert console.ports[1].guest_open == is_open
            frontend.stop(4)
        frontend.close()
    queue.close()
    ram.close()


def test_closing_reaps(start):
    process, driver = start(PortConfig(console=True), PortConfig())
    driver.close()
    process.close()
    assert process.status == 0
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    process.close()
