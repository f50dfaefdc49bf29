"""The network device by itself and on a stream, as a raw driver and the stream's other end see it."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import ExitStack, suppress

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.backend import no_new_fds
from fakes.net_driver import (
    F_MAC,
    F_MTU,
    F_STATUS,
    MAC,
    NO_HEADER,
    PLAIN,
    RECEIVED,
    RX,
    TX,
    Card,
    Peer,
    cpu_ticks,
    frame,
)
from fakes.ring_driver import WRITE

from pyvmm.backend.loop import DeviceLoop
from pyvmm.backend.net import CONFIG, Net
from pyvmm.backend.process import spawn
from pyvmm.backend.wire import Gone, StreamWire
from pyvmm.vhost_user.payloads import Config
from pyvmm.virtio import kinds


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def listener(tmp_path, stack):
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(str(tmp_path / "peer"))
    listener.listen(1)
    listener.settimeout(10)
    return listener


@pytest.fixture
def plug(listener, stack):
    """A card whose wire is a stream, its process, and what is at the other end."""

    def plug(features=PLAIN, size=256, **options):
        path = listener.getsockname()
        process = spawn(lambda: Net(lambda: StreamWire(path), size=size, **options))
        stack.callback(process.close)
        peer = Peer(listener)
        stack.callback(peer.close)
        card = Card(process.take_socket(), features, size)
        stack.callback(card.close)
        return card.start(), peer, process

    return plug


# -- a stream --------------------------------------------------------------------------------


def test_frames_go_both_ways(plug):
    card, peer, _ = plug()
    card.give(2)
    peer.send(frame(1), frame(2, 1514))
    assert card.receive(2) == [RECEIVED + frame(1), RECEIVED + frame(2, 1514)]
    assert card.send(NO_HEADER, frame(3))
    assert card.send(NO_HEADER + frame(4)[:20], frame(4)[20:])
    assert [peer.receive(), peer.receive()] == [frame(3), frame(4)]


def test_the_largest_frame(plug):
    card, peer, _ = plug()
    whole = frame(1, 65553)
    card.queues[RX].add([], [12, 40000, 30000])
    card.queues[RX].kick()
    peer.send(whole)
    assert card.receive() == [RECEIVED + whole]
    assert card.send(NO_HEADER, whole)
    assert peer.receive() == whole


def test_frames_that_arrive_in_pieces(plug):
    card, peer, _ = plug()
    card.give(3)
    stream = b"".join(struct.pack(">I", 60) + frame(number) for number in range(3))
    for at in range(0, len(stream), 7):
        peer.sock.sendall(stream[at : at + 7])
        time.sleep(0.001)
    assert card.receive(3) == [RECEIVED + frame(number) for number in range(3)]


def test_frames_wait_for_buffers_and_none_is_lost(plug):
    """More than a turn, a ring and what one wake-up may do; between them the device sleeps."""
    card, peer, process = plug(size=128)
    numbers = iter(range(300))
    peer.send(*map(frame, range(300)))
    time.sleep(0.1)
    for count in (0, 1, 2, 97, 0, 128, 72):
        before = cpu_ticks(process.pid)
        if not count:
            time.sleep(0.5)
            assert cpu_ticks(process.pid) - before <= 2, "it does not sleep"
        card.give(count, 100)
        assert card.receive(count) == [RECEIVED + frame(next(numbers)) for _ in range(count)]
    assert next(numbers, None) is None


def test_the_driver_waits_for_a_stream_that_is_full(plug):
    card, peer, process = plug()
    queue = card.queues[TX]
    place = card.ram.alloc(12 + 60_000)
    card.ram.data[place + 12 : place + 12 + 60_000] = frame(7, 60_000)
    for _ in range(64):
        queue.add_rows([(place, 12 + 60_000, 0)])
        queue.kick()
    done = len(queue.wait(1.0))
    time.sleep(0.2)
    done += len(queue.collect())
    before = cpu_ticks(process.pid)
    time.sleep(0.5)
    assert done < 64 and cpu_ticks(process.pid) - before <= 2
    card.give()
    peer.send(frame(1))
    assert card.receive() == [RECEIVED + frame(1)]  # the other way is open
    assert [peer.receive() for _ in range(64)] == [frame(7, 60_000)] * 64
    while done < 64:
        found = len(queue.wait())
        assert found
        done += found


def test_a_whole_round_of_the_queue_is_followed_by_a_look_for_more(plug):
    """Without it nothing would ask the driver for its next kick."""
    card, peer, _ = plug(size=4)
    queue, done = card.queues[TX], 0
    for number in range(4):
        queue.add([NO_HEADER + frame(number)])
    queue.kick()
    while done < 4:
        done += len(queue.wait())
    assert [peer.receive() for _ in range(4)] == list(map(frame, range(4)))
    time.sleep(0.1)
    assert card.ram.u16(queue.used + 4 + 8 * 4) == 4  # avail_event (section 2.7.10)


MALFORMED = {
    "nothing to read": [],
    "half of a header": [NO_HEADER[:5]],
    "header only": [NO_HEADER],
    "no Ethernet header": [NO_HEADER, frame()[:13]],
    "too long": [NO_HEADER, frame(0, 65554)],
}


@pytest.mark.parametrize("parts", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_frame_is_given_back_and_not_sent(plug, parts):
    card, peer, process = plug()
    if parts:
        assert card.send(*parts)
    else:
        card.queues[TX].add([], [100])
        card.queues[TX].kick()
        assert card.queues[TX].wait()[0][1] == b""
    assert card.send(NO_HEADER, frame(1))
    assert peer.receive() == frame(1)
    assert process.wait(0) is None


@pytest.mark.parametrize("room", [71, 12, 1, 0])
def test_a_buffer_that_is_too_small_comes_back_empty(plug, room):
    card, peer, _ = plug()
    queue = card.queues[RX]
    queue.add([] if room else [b"to read"], [room] if room else [])
    card.give()
    peer.send(frame(1), frame(2))
    assert card.receive(2) == [b"", RECEIVED + frame(2)]


def test_a_broken_ring_ends_one_direction_only(plug):
    card, peer, process = plug()
    card.queues[RX].add_rows([(1 << 40, 2048, WRITE)])
    card.queues[RX].kick()
    peer.send(frame(1))
    assert card.send(NO_HEADER, frame(2))
    assert peer.receive() == frame(2)
    assert process.wait(0) is None


def test_a_driver_that_starts_again(plug):
    card, peer, _ = plug()
    card.give()
    peer.send(frame(1), frame(2))
    assert card.receive() == [RECEIVED + frame(1)]
    for index, queue in enumerate(card.queues):
        card.frontend.stop(index)
        queue.reset()
    card.start()
    time.sleep(0.1)  # what was in hand at the stop is lost
    peer.send(frame(3))
    card.give(2)
    assert card.receive() == [RECEIVED + frame(3)]
    assert card.send(NO_HEADER, frame(4))
    assert peer.receive() == frame(4)


def test_a_stream_that_closes_takes_the_link_down_until_it_is_back(plug, listener, stack):
    card, peer, process = plug()
    assert card.status() == 1
    peer.close()
    card.give(2)
    assert card.told() == "CONFIG_CHANGE_MSG"
    assert card.status() == 0
    assert card.send(NO_HEADER, frame(1))  # into nowhere
    again = Peer(listener)
    stack.callback(again.close)
    assert card.told() == "CONFIG_CHANGE_MSG"
    assert card.status() == 1
    again.send(frame(2))
    assert card.receive() == [RECEIVED + frame(2)]
    assert card.send(NO_HEADER, frame(3))
    assert again.receive() == frame(3)
    assert process.wait(0) is None


def test_a_stream_that_closes_while_it_is_full(plug):
    card, peer, _ = plug()
    place = card.ram.put(NO_HEADER + frame(1, 60_000))
    for _ in range(64):
        card.queues[TX].add_rows([(place, 12 + 60_000, 0)])
    card.queues[TX].kick()
    done = len(card.queues[TX].wait())
    assert done < 64
    peer.close()
    while done < 64:
        found = len(card.queues[TX].wait())
        assert found
        done += found
    assert card.told() == "CONFIG_CHANGE_MSG"


@pytest.mark.parametrize("size", [0, 13, 65554, 0xFFFF_FFFF])
def test_a_stream_that_says_nonsense_is_cut(plug, size):
    card, peer, process = plug()
    card.give()
    peer.sock.sendall(struct.pack(">I", size) + frame(1))
    assert card.told() == "CONFIG_CHANGE_MSG"
    assert card.receive(1, 0.2) == []
    with suppress(ConnectionResetError):
        assert peer.sock.recv(1) == b""
    assert process.wait(0) is None


def test_every_descriptor_has_an_owner(listener):
    with no_new_fds():
        loop = DeviceLoop()
        device = Net(lambda: StreamWire(listener.getsockname()))
        device.open(loop)
        listener.accept()[0].close()
        device._watch(True)
        device._lose(Gone("cut"))
        assert device.config["status"] == 0
        loop.call_later(1.5, loop.stop)  # it is tried again
        loop.run()
        assert device.config["status"] == 1
        device.close()
        loop.close()
        listener.accept()[0].close()


# -- what it is -----------------------------------------------------------------------------------


def test_configuration_space(plug):
    card, _, _ = plug(mac=MAC, mtu=9000)
    known = F_MAC | F_MTU | F_STATUS
    assert card.offered & ((1 << 24) - 1) == known
    assert card.frontend.number("GET_QUEUE_NUM") == 1
    assert card.config(0, 12) == MAC + struct.pack("<HHH", 1, 1, 9000)
    card.frontend.tell("SET_CONFIG", Config(0, 0, bytes(12)))
    assert card.config(0, 12) == MAC + struct.pack("<HHH", 1, 1, 9000)
    kind = kinds.of(1)
    assert kind.config[: len(CONFIG)] == CONFIG
    assert kind.backend_limit(1) >= kind.min_queues


def test_what_is_not_given_is_not_offered(plug):
    card, _, _ = plug()
    assert card.offered & ((1 << 24) - 1) == F_STATUS


# -- the program ---------------------------------------------------------------------------------


def program(*arguments, before=(), **options):
    command = [*before, sys.executable, "-P", "-m", "pyvmm.backend.net", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


NAME = "pyvmm0"
APART = ("unshare", "--net")
REFUSED = {
    "neither": ([], (), "one of --tap and --stream"),
    "both": (["--tap", NAME, "--stream", "s"], (), "one of --tap and --stream"),
    "name too long": (["--tap", "a" * 16], (), "1 to 15 bytes"),
    "no interface's name": (["--tap", "a/b"], APART, "no name for an interface"),
    "no TAP": (["--tap", "lo"], APART, "not a TAP interface"),
    "not allowed": (["--tap", NAME], (*APART, "setpriv", "--bounding-set=-all", "--inh-caps=-all"),
                    "CAP_NET_ADMIN is needed"),
    "nobody there": (["--stream", "/nonexistent"], (), "stream /nonexistent: No such file"),
    "path too long": (["--stream", "/" + "s" * 120], (), "too long"),
    "address": (["--stream", "/nonexistent", "--mac", "1"], (), "--mac 1: the address of one card"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "before", "text"), REFUSED.values(), ids=REFUSED)
def test_program_that_cannot_begin(tmp_path, arguments, before, text):
    if before and os.geteuid():
        pytest.skip("a network namespace needs root")
    with program("--socket-path", str(tmp_path / "s"), *arguments, before=before) as process:
        assert process.wait(20) == 2
        assert text in process.stderr.read()


def test_program(tmp_path, listener, stack):
    path = str(tmp_path / "net.sock")
    options = ("--stream", listener.getsockname(), "--mac", "52:54:00:12:34:56", "--mtu", "1400")
    with program("--socket-path", path, *options) as process:
        peer = Peer(listener)
        stack.callback(peer.close)
        while not os.path.exists(path):
            assert process.poll() is None
            time.sleep(0.01)
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        card = Card(sock, PLAIN).start()
        stack.callback(card.close)
        assert card.config(0, 12) == MAC + struct.pack("<HHH", 1, 1, 1400)
        assert card.send(NO_HEADER, frame(1))
        assert peer.receive() == frame(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
