"""The socket's edges: partial sends, deadlines, truncation, broken connections, connecting."""

from __future__ import annotations

import os
import socket
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep

import pytest
from fakes.backend import no_new_fds

from pyvmm import log
from pyvmm.errors import BackendLost, ConfigError, LocalProtocolError, RemoteProtocolError
from pyvmm.vhost_user import endpoint
from pyvmm.vhost_user.channel import Channel
from pyvmm.vhost_user.codec import Decoder, encode_reply, encode_request
from pyvmm.vhost_user.messages import FRONTEND_REQUESTS
from pyvmm.vhost_user.payloads import U64, Empty, VringFile

ROW = FRONTEND_REQUESTS.by_name


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    with no_new_fds():
        ours, theirs = socket.socketpair()
        channel = Channel(ours)
        yield channel, theirs
        channel.close()
        theirs.close()


def requests() -> Decoder:
    return Decoder(FRONTEND_REQUESTS, os.close)


def soon(seconds: float = 5.0) -> float:
    return monotonic() + seconds


def test_descriptors_arrive_with_their_message_and_close_on_exec(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    fds = [os.eventfd(0), os.eventfd(0)]
    for index, fd in enumerate(fds):
        data = encode_request(ROW["SET_VRING_KICK"], VringFile(index, True), 1)
        socket.send_fds(theirs, [data], [fd])
    decoder = requests()
    for index, fd in enumerate(fds):
        message = channel.receive(decoder, soon())
        assert message.payload == VringFile(index, True)
        (received,) = message.fds
        assert not os.get_inheritable(received)
        os.eventfd_write(received, index + 1)
        assert os.eventfd_read(fd) == index + 1
        message.close()
        os.close(fd)


def test_large_messages_go_out_in_pieces(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    data = os.urandom(4 << 20)
    received = bytearray()

    def read() -> None:
        while len(received) < len(data):
            received.extend(theirs.recv(1 << 16))

    reader = threading.Thread(target=read)
    reader.start()
    channel.send(data, deadline=soon(30))
    reader.join()
    assert received == data


def test_peer_that_does_not_read(ends: tuple[Channel, socket.socket]) -> None:
    channel, _ = ends
    start = monotonic()
    with pytest.raises(BackendLost, match="did not take a message in time"):
        channel.send(bytes(16 << 20), deadline=soon(0.1))
    assert 0.05 < monotonic() - start < 3


def test_peer_that_does_not_answer(ends: tuple[Channel, socket.socket]) -> None:
    channel, _ = ends
    start = monotonic()
    with pytest.raises(BackendLost, match="did not answer in time"):
        channel.receive(requests(), soon(0.1))
    assert 0.05 < monotonic() - start < 3


def test_a_deadline_may_be_farther_away_than_poll_can_wait(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    threading.Timer(0.05, theirs.send, (encode_request(ROW["SET_FEATURES"], U64(7)),)).start()
    assert channel.receive(requests(), soon(1e9)).payload == U64(7)


def test_a_wait_that_is_too_long_for_one_goes_on(
    ends: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    channel, theirs = ends
    monkeypatch.setattr("pyvmm.vhost_user.channel.LONGEST_WAIT", 0.01)
    threading.Timer(0.05, theirs.send, (encode_request(ROW["SET_FEATURES"], U64(7)),)).start()
    assert channel.receive(requests(), soon()).payload == U64(7)
    start = monotonic()
    with pytest.raises(BackendLost, match="did not answer in time"):
        channel.receive(requests(), soon(0.05))
    assert 0.04 < monotonic() - start < 3


def test_dripping_does_not_extend_the_deadline(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    data = encode_request(ROW["SET_FEATURES"], U64(1))
    stop = threading.Event()

    def drip() -> None:
        for byte in data:
            if stop.wait(0.05):
                return
            theirs.send(bytes([byte]))

    dripper = threading.Thread(target=drip)
    dripper.start()
    with pytest.raises(BackendLost, match="in time"):
        channel.receive(requests(), soon(0.2))
    stop.set()
    dripper.join()


def test_too_many_descriptors_are_closed(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    fds = array("i", [theirs.fileno()] * 40)
    theirs.sendmsg([b"x" * 12], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    with pytest.raises(RemoteProtocolError, match="more than 32 descriptors"):
        channel.receive(requests(), soon())


def test_descriptors_of_an_unfinished_message_are_closed(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    socket.send_fds(theirs, [b"\x0c"], [theirs.fileno()])
    theirs.shutdown(socket.SHUT_WR)
    decoder = requests()
    with pytest.raises(BackendLost, match="in the middle of a message"):
        channel.receive(decoder, soon())
    decoder.close()


def test_what_is_not_there_yet_is_not_waited_for(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    decoder = requests()
    assert channel.receive_now(decoder) is None
    data = encode_request(ROW["SET_FEATURES"], U64(7))
    theirs.send(data[:15])
    assert channel.receive_now(decoder) is None
    theirs.send(data[15:] + data)
    for _ in range(2):
        message = channel.receive_now(decoder)
        assert message is not None and message.payload == U64(7)
    assert channel.receive_now(decoder) is None


def test_a_closed_peer(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    theirs.close()
    with pytest.raises(BackendLost, match="the connection was closed$"):
        channel.receive_now(requests())
    with pytest.raises(BackendLost, match="the connection broke: Broken pipe"):
        channel.send(b"x", deadline=soon())


def test_unread_bytes_at_the_peers_end_reset_the_connection(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    channel.send(b"never read", deadline=soon())
    theirs.close()
    with pytest.raises(BackendLost, match="Connection reset by peer"):
        channel.receive(requests(), soon())


def test_a_closed_descriptor_of_ours_is_our_own_fault(ends: tuple[Channel, socket.socket]) -> None:
    channel, _ = ends
    fd = os.eventfd(0)
    os.close(fd)
    with pytest.raises(LocalProtocolError, match="descriptor to be sent is closed"):
        channel.send(b"x", [fd], soon())


def test_shutdown_wakes_a_reader_and_may_be_repeated(ends: tuple[Channel, socket.socket]) -> None:
    channel, _ = ends
    threading.Timer(0.05, channel.shutdown).start()
    with pytest.raises(BackendLost, match="was closed"):
        channel.receive(requests(), soon(30))
    channel.shutdown()
    channel.close()
    channel.shutdown()


def test_replies_are_read_as_replies(ends: tuple[Channel, socket.socket]) -> None:
    channel, theirs = ends
    theirs.send(encode_reply(ROW["GET_CONFIG"], Empty()))
    message = channel.receive(Decoder(FRONTEND_REQUESTS, os.close, replies=True), soon())
    assert message.payload == Empty()


# -- endpoints ---------------------------------------------------------------------


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with no_new_fds(), socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        yield sock


def test_connecting_to_a_path(listener: socket.socket) -> None:
    listener.listen()
    endpoint.endpoint(listener.getsockname()).connect(1).close()


def test_connecting_waits_for_a_backend_that_starts(tmp_path: Path) -> None:
    with no_new_fds(), socket.socket(socket.AF_UNIX) as sock:

        def start() -> None:
            sock.bind(str(tmp_path / "s"))
            sleep(0.05)
            sock.listen()

        starter = threading.Timer(0.05, start)
        starter.start()
        endpoint.endpoint(str(tmp_path / "s")).connect(10).close()
        starter.join()


def test_the_user_is_told_of_a_long_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(endpoint, "PATIENCE", 0.01)
    monkeypatch.setattr(log, "_said", set())
    with pytest.raises(ConfigError):
        endpoint.endpoint(str(tmp_path / "s")).connect(0.1)
    assert capfd.readouterr().err == f"pyvmm: waiting for a backend at socket {tmp_path}/s\n"


def test_absent_socket(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"socket /.*/s: does not exist \(waited 0.05 s\); start the backend"
    ):
        endpoint.endpoint(str(tmp_path / "s")).connect(0.05)


def test_nobody_listens(listener: socket.socket) -> None:
    with pytest.raises(ConfigError, match="nobody listens there"):
        endpoint.endpoint(listener.getsockname()).connect(0.05)


def test_a_backend_that_serves_another(listener: socket.socket) -> None:
    listener.listen(0)
    where = endpoint.endpoint(listener.getsockname())
    first = where.connect(0.05)
    with pytest.raises(ConfigError, match="no connection is taken"):
        where.connect(0.05)
    first.close()


def test_not_a_socket(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path):
        start = monotonic()
        with pytest.raises(ConfigError, match="is not a socket"):
            endpoint.endpoint(str(path)).connect(30)
        assert monotonic() - start < 5, "no use in waiting"


def test_datagram_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "s"))
        with pytest.raises(ConfigError, match="is no stream socket"):
            endpoint.endpoint(str(tmp_path / "s")).connect(30)


def test_long_path() -> None:
    with pytest.raises(ConfigError, match="longer than 107 bytes"):
        endpoint.endpoint("/" + "x" * 107).connect(1)


def test_inherited_descriptor() -> None:
    with no_new_fds():
        ours, theirs = socket.socketpair()
        os.set_inheritable(ours.fileno(), True)
        where = endpoint.endpoint(ours.detach())
        sock = where.connect(1)
        assert not os.get_inheritable(sock.fileno())
        with pytest.raises(ConfigError, match="serves only once"):
            where.connect(1)
        sock.close()
        theirs.close()


def test_inherited_descriptor_of_another_kind(tmp_path: Path) -> None:
    with no_new_fds():
        with pytest.raises(ConfigError, match="fd 987: Bad file descriptor; pass a connected Unix"):
            endpoint.endpoint(987).connect(1)
        fd = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(ConfigError, match="not a socket|non-socket"):
            endpoint.endpoint(fd).connect(1)
        os.close(fd)
        unconnected = socket.socket(socket.AF_UNIX)
        with pytest.raises(ConfigError, match="endpoint is not connected"):
            endpoint.endpoint(unconnected.detach()).connect(1)
        one, other = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with pytest.raises(ConfigError, match="is no Unix stream socket"):
            endpoint.endpoint(one.detach()).connect(1)
        other.close()
