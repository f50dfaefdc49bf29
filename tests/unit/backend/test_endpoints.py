"""What carries a port's bytes: nothing ever blocks, shared descriptors keep their flags."""

from __future__ import annotations

import fcntl
import os
import socket

import pytest

from pyvmm.backend.endpoints import PIECE, Files, PortConfig, Stream, endpoint_of


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    owned = [reader, writer]
    yield reader, writer, owned
    for fd in owned:
        os.close(fd)


def room(size=16):
    return memoryview(bytearray(size))


def test_pipe_is_written_in_pieces_until_full(pipe):
    reader, writer, owned = pipe
    owned.remove(writer)
    flags = fcntl.fcntl(writer, fcntl.F_GETFL)
    endpoint = Files(-1, writer)
    total = 0
    while (count := endpoint.write([b"x" * 100_000])) is not None:
        assert 0 < count <= PIECE
        total += count
    assert total == 65536
    assert fcntl.fcntl(writer, fcntl.F_GETFL) == flags
    assert len(os.read(reader, 1 << 20)) == total
    assert endpoint.write([b"again"]) == 5
    endpoint.close()
    endpoint.close()


def test_output_nobody_reads_vanishes(pipe, capfd):
    reader, writer, owned = pipe
    os.close(reader)
    owned.clear()
    endpoint = Files(-1, writer)
    assert endpoint.write([b"a", b"bc"]) == 3
    assert endpoint.write([b"more"]) == 4
    assert not endpoint.lost
    assert capfd.readouterr().err.count("Broken pipe") == 1
    endpoint.close()


def test_file_takes_everything_at_once(tmp_path):
    fd = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    endpoint = Files(-1, fd)
    assert endpoint.write([b"x" * 100_000, b"end"]) == 100_003
    endpoint.close()
    assert (tmp_path / "out").stat().st_size == 100_003


def test_nothing_takes_everything():
    endpoint = endpoint_of(PortConfig())
    assert endpoint.write([b"abc", b"d"]) == 4
    endpoint.close()


def test_pipe_is_read_until_its_end(pipe):
    reader, writer, owned = pipe
    owned.remove(reader)
    endpoint = Files(reader, -1)
    os.write(writer, b"hello")
    first, second = room(3), room(8)
    assert endpoint.read([first, second]) == 5
    assert bytes(first) + bytes(second[:2]) == b"hello"
    os.close(writer)
    owned.clear()
    assert endpoint.read([room()]) == 0
    assert not endpoint.lost
    endpoint.close()


@pytest.fixture
def stream():
    ours, theirs = socket.socketpair()
    fd = theirs.detach()
    endpoint = endpoint_of(PortConfig("x", input_fd=fd, output_fd=fd))
    assert isinstance(endpoint, Stream)
    with ours:
        yield ours, endpoint
    endpoint.close()


def test_socket_that_would_block(stream):
    _, endpoint = stream
    assert endpoint.read([room()]) is None
    while endpoint.write([b"x" * 65536]) is not None:
        pass
    assert not endpoint.lost


def test_socket_closed_by_the_peer(stream):
    ours, endpoint = stream
    ours.sendall(b"bye")
    ours.close()
    buffer = room()
    assert endpoint.read([buffer]) == 3
    assert not endpoint.lost
    assert endpoint.read([buffer]) == 0
    assert endpoint.lost


def test_socket_half_closed_by_the_peer(stream):
    ours, endpoint = stream
    ours.shutdown(socket.SHUT_WR)
    assert endpoint.read([room()]) == 0
    assert not endpoint.lost
    assert endpoint.write([b"still"]) == 5
    assert ours.recv(5) == b"still"


def test_writing_to_a_closed_socket(stream):
    ours, endpoint = stream
    ours.close()
    assert endpoint.write([b"to nobody"]) == 9
    assert endpoint.lost


def test_descriptors_of_a_port():
    assert PortConfig().fds == ()
    assert PortConfig("x", input_fd=3, output_fd=3, listen_fd=0).fds == (3, 3, 0)
