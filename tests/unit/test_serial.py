"""The serial port between guest and host: bytes both ways, listeners, peers that come and go."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest
from fakes.backend import no_new_fds
from fakes.limits import descriptors_left

from pyvmm.config import StreamConfig
from pyvmm.loop import EventLoop
from pyvmm.serial import SerialPort

DATA, STATUS, READY = 0, 5, 1  # registers of the 16550, and the bit that says a byte has come


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    with EventLoop() as loop:
        thread = threading.Thread(target=loop.run)
        thread.start()
        yield loop
        loop.stop()
        thread.join()


def port(loop: EventLoop, config: StreamConfig) -> SerialPort:
    """A port; made and closed in the loop's thread, as readers demand."""
    made: list[SerialPort] = []
    loop.call_soon_threadsafe(lambda: made.append(SerialPort("--serial", config, loop)))
    eventually(lambda: bool(made))
    return made[0]


def close(loop: EventLoop, serial: SerialPort) -> None:
    done = threading.Event()
    loop.call_soon_threadsafe(serial.close)
    loop.call_soon_threadsafe(done.set)
    assert done.wait(5)


def eventually(test: Callable[[], bool]) -> None:
    due = monotonic() + 5
    while not test():
        assert monotonic() < due
        sleep(0.002)


def say(serial: SerialPort, text: bytes) -> None:
    for byte in text:
        serial.uart.write(DATA, 1, byte)
    serial.uart.flush()


def hear(serial: SerialPort, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        eventually(lambda: bool(serial.uart.read(STATUS, 1) & READY))
        found.append(serial.uart.read(DATA, 1))
    return bytes(found)


def test_a_connected_socket_and_listeners(loop: EventLoop) -> None:
    ours, theirs = socket.socketpair()
    heard: list[bytes] = []
    with ours, theirs:
        serial = port(loop, StreamConfig("fd", fd=theirs.fileno()))
        serial.listeners.append(heard.append)
        say(serial, b"hello\n")
        assert ours.recv(99) == b"hello\n" == b"".join(heard)
        ours.send(b"hi")
        assert hear(serial, 2) == b"hi"
        close(loop, serial)


def test_the_end_of_the_input_is_not_the_end_of_the_output(loop: EventLoop) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        serial = port(loop, StreamConfig("fd", fd=theirs.fileno()))
        ours.shutdown(socket.SHUT_WR)
        sleep(0.05)
        say(serial, b"x")
        assert ours.recv(9) == b"x"
        close(loop, serial)


def test_a_reader_that_went_away_is_no_error(loop: EventLoop) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        serial = port(loop, StreamConfig("fd", fd=theirs.fileno()))
        ours.close()
        say(serial, b"lost\n")
        close(loop, serial)


def test_a_slow_reader_gets_everything(loop: EventLoop) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        serial = port(loop, StreamConfig("fd", fd=theirs.fileno()))
        text = bytes(range(256)) * 2000
        writer = threading.Thread(target=serial._output, args=(text,))
        writer.start()
        sleep(0.3)
        assert writer.is_alive()
        found = bytearray()
        while len(found) < len(text):
            found += ours.recv(65536)
        writer.join()
        assert found == text
        close(loop, serial)


def test_a_reader_that_has_stopped_does_not_hold_up_input(loop: EventLoop) -> None:
    """As when Ctrl-S was typed: the event loop, which brings the Ctrl-Q, waits for nobody."""
    reader, full = os.pipe()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        serial = port(loop, StreamConfig("fd", fd=theirs.fileno()))
        serial._stream.output_fd = full
        os.set_blocking(full, False)
        try:
            while True:
                os.write(full, bytes(4096))
        except BlockingIOError:
            os.set_blocking(full, True)
        writer = threading.Thread(target=say, args=(serial, b"x\n"))
        writer.start()
        writer.join(0.2)
        assert writer.is_alive()
        ours.send(b"hi")
        assert hear(serial, 2) == b"hi"
        assert writer.is_alive()
        os.read(reader, 1 << 20)
        writer.join()
        serial._stream.output_fd = -1
        close(loop, serial)
    os.close(full)
    with open(reader, "rb") as rest:
        assert rest.read() == b"x\n"


def test_a_reader_that_has_stopped_does_not_hold_up_the_end(loop: EventLoop) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        serial = port(loop, StreamConfig("fd", fd=theirs.fileno()))
        writer = threading.Thread(target=serial._output, args=(bytes(1 << 20),))
        writer.start()
        sleep(0.1)
        loop.stop()
        writer.join(5)
        assert not writer.is_alive()
        serial.close()


def test_a_full_disk_is_no_error(loop: EventLoop) -> None:
    serial = port(loop, StreamConfig("file", "/dev/full"))
    say(serial, b"x")
    close(loop, serial)


def test_a_listening_socket_and_its_peers(
    loop: EventLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with no_new_fds():
        serial = port(loop, StreamConfig("socket", "s"))
        say(serial, b"nobody hears\n")
        for word in (b"one", b"two"):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.settimeout(5)
                peer.connect("s")
                peer.send(word)
                assert hear(serial, 3) == word
                say(serial, word)
                assert peer.recv(9) == word
        close(loop, serial)
    assert os.listdir(tmp_path) == []


def test_what_was_for_a_peer_that_was_replaced_goes_nowhere_else(
    loop: EventLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptor's number is the next file's."""
    monkeypatch.chdir(tmp_path)
    serial = port(loop, StreamConfig("socket", "s"))
    with socket.socket(socket.AF_UNIX) as still, socket.socket(socket.AF_UNIX) as peer:
        still.connect("s")
        eventually(lambda: serial._stream.output_fd >= 0)
        before = serial._stream.output_fd
        writer = threading.Thread(target=serial._output, args=(bytes(1 << 20),))
        writer.start()
        sleep(0.3)
        assert writer.is_alive(), "this peer reads nothing"
        peer.connect("s")
        writer.join(5)
        assert not writer.is_alive()
        eventually(lambda: serial._stream.output_fd >= 0)
        others = [os.memfd_create(f"file {number}") for number in range(3)]
        assert before in [*others, serial._stream.output_fd]
        say(serial, b"for you")
        assert peer.recv(99) == b"for you"
        assert [os.fstat(fd).st_size for fd in others] == [0, 0, 0]
        close(loop, serial)
        for fd in others:
            os.close(fd)


def test_input_that_nobody_reads_stays_with_whoever_sent_it(loop: EventLoop) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        serial = port(loop, StreamConfig("fd", fd=theirs.fileno()))
        text = bytes(range(256)) * 4000
        sender = threading.Thread(target=ours.sendall, args=(text,))
        sender.start()
        sender.join(0.5)
        assert sender.is_alive() and serial.uart.waiting < len(text) / 4
        found = bytearray()
        due = monotonic() + 20
        while len(found) < len(text):
            assert monotonic() < due
            found += bytes(serial.uart.read(DATA, 1) for _ in range(serial.uart.waiting))
        sender.join()
        assert found == text
        close(loop, serial)


def test_a_peer_waits_while_descriptors_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with EventLoop() as loop:
        serial = SerialPort("--serial", StreamConfig("socket", path="s"), loop)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect("s")
            with descriptors_left(0):
                loop._turn(1)
                begin = monotonic()
                loop._turn(0.05)
                assert monotonic() - begin >= 0.05, "it is not looked at all the time"
            loop.call_later(0.2, loop.stop)
            loop.run()
            say(serial, b"here")
            assert peer.recv(99) == b"here"
        serial.close()
