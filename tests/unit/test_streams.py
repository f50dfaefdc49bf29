"""Where console bytes go: descriptors, terminals, sockets, and how they are left."""

from __future__ import annotations

import os
import socket
import termios
from pathlib import Path

import pytest
from fakes.backend import no_new_fds

from pyvmm import streams
from pyvmm.config import StreamConfig
from pyvmm.errors import ConfigError
from pyvmm.streams import ListeningStream, Terminal, open_stream


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("mode", ["off", "null"])
def test_nothing(mode: str) -> None:
    stream = open_stream("--x", StreamConfig(mode))
    assert (stream.input_fd, stream.output_fd) == (-1, -1)
    stream.start()
    stream.close()


def test_a_descriptor_stays_its_owners() -> None:
    reader, writer = os.pipe()
    stream = open_stream("--x", StreamConfig("fd", fd=reader))
    stream.close()
    os.fstat(reader)
    os.close(reader)
    os.close(writer)


def test_a_file_is_emptied_at_the_start_and_appended_to(here: Path) -> None:
    (here / "f").write_bytes(b"old")
    with no_new_fds():
        stream = open_stream("--x", StreamConfig("file", "f"))
        assert (here / "f").read_bytes() == b"old", "the guest may not come to run"
        stream.start()
        os.write(stream.output_fd, b"new")
        stream.close()
        stream.close()
    assert (here / "f").read_bytes() == b"new"


def test_a_pipe_with_a_reader(here: Path) -> None:
    os.mkfifo("p")
    reader = os.open("p", os.O_RDONLY | os.O_NONBLOCK)
    stream = open_stream("--x", StreamConfig("file", "p"))
    stream.start()
    os.write(stream.output_fd, b"x")
    assert os.read(reader, 9) == b"x"
    stream.close()
    os.close(reader)


def test_a_pty_is_announced_and_raw(capfd: pytest.CaptureFixture[str]) -> None:
    with no_new_fds():
        stream = open_stream("--x", StreamConfig("pty"))
        path = capfd.readouterr().err.removeprefix("pyvmm: --x: connect to ").strip()
        far = os.open(path, os.O_RDWR | os.O_NOCTTY)
        os.write(far, b"\x03")
        assert os.read(stream.input_fd, 9) == b"\x03"
        os.close(far)
        stream.close()


def test_a_terminal_is_raw_from_start_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    saved = os.dup(0)
    os.dup2(theirs, 0)
    try:
        before = termios.tcgetattr(0)
        terminal = Terminal()
        assert termios.tcgetattr(0) == before
        terminal.start()
        assert not termios.tcgetattr(0)[3] & (termios.ISIG | termios.ECHO)
        terminal.close()
        terminal.close()
        assert termios.tcgetattr(0) == before
        terminal.start()
        os.close(ours)
        terminal.close()  # the terminal is gone
    finally:
        os.dup2(saved, 0)
        os.close(saved)
        os.close(theirs)


def test_no_terminal_is_no_error() -> None:
    terminal = Terminal()
    terminal.start()
    terminal.close()


def listening(path: str = "s") -> ListeningStream:
    stream = open_stream("--x", StreamConfig("socket", path))
    assert isinstance(stream, ListeningStream)
    return stream


def test_a_socket_takes_one_peer_after_the_other(here: Path) -> None:
    with no_new_fds():
        stream = listening()
        for word in (b"one", b"two"):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect("s")
                stream.accept()
                os.write(stream.output_fd, word)
                assert peer.recv(9) == word
        stream.close()
        stream.close()
    assert not (here / "s").exists()


def test_a_socket_left_over_is_replaced(here: Path) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind("s")
    listening().close()
    assert not (here / "s").exists()


def test_a_socket_in_use_is_left_alone(here: Path) -> None:
    first = listening()
    with (
        no_new_fds(),
        pytest.raises(ConfigError, match="cannot listen at s: Address already in use; use"),
    ):
        listening()
    with pytest.raises(BlockingIOError):
        first.listener.accept()  # it was not disturbed either
    first.close()


def test_another_ones_socket_is_not_removed(here: Path) -> None:
    first = listening()
    os.unlink("s")
    second = listening()
    first.close()
    assert (here / "s").exists()
    second.close()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no/where", "--x: cannot listen at no/where: No such file or directory; use another path"),
        ("x" * 108, "--x: x+: is longer than 107 bytes; use a shorter path"),
        (".", "--x: cannot listen at .: Address already in use; use another path"),
    ],
)
def test_where_nobody_can_listen(here: Path, path: str, message: str) -> None:
    with no_new_fds(), pytest.raises(ConfigError, match=message):
        listening(path)


def test_a_file_is_not_replaced_by_a_socket(here: Path) -> None:
    (here / "s").write_bytes(b"mine")
    with no_new_fds(), pytest.raises(ConfigError, match="Address already in use"):
        listening()
    assert (here / "s").read_bytes() == b"mine"


def test_every_mode_has_an_opener() -> None:
    assert set(streams._OPENERS) == {"off", "null", "tty", "pty", "file", "socket"}
