"""The proxy between a frontend and a backend: nothing changes but what a plan of faults says."""

from __future__ import annotations

import os
import re
import socket
import time
from threading import Thread

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.ring_driver import receive_backend_request
from native.backend.test_faults import SEEN, Driver, Upper

from pyvmm.backend import Device
from pyvmm.backend.faults import Faults
from pyvmm.backend.local import DeviceThread
from pyvmm.backend.loop import DeviceLoop
from pyvmm.backend.proxy import Proxy
from pyvmm.backend.server import serve
from pyvmm.backend.shadow import ShadowMemory
from pyvmm.errors import ConfigError
from pyvmm.vhost_user.payloads import U64, Config
from pyvmm.vhost_user.recording import Recorder, read
from pyvmm.vhost_user.replay import replay


class Changing(Upper):
    """Changes its configuration with each chain."""

    def on_queue(self, queue):
        for chain in queue:
            chain.write(chain.read())
            self.config["word"] += 1
            self.config_changed()


class Mute(Device):
    """Takes chains and never gives them back."""

    queue_sizes = (16,)

    def on_queue(self, queue):
        for chain in queue:
            queue.keep(chain)


class Listener:
    """A device at a socket in the file system, served in a thread."""

    def __init__(self, device, path):
        self.loop = DeviceLoop()
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(path)
        sock.listen(1)
        self.thread = Thread(target=serve, args=(device, sock), kwargs={"loop": self.loop})
        self.thread.start()

    def close(self):
        if self.thread.is_alive():
            self.loop.stop()
            self.thread.join()
            self.loop.close()


@pytest.fixture
def plug(tmp_path):
    """A backend process behind a proxy in a thread, and the driver before both."""
    running = []

    def plug(make=Upper, record="", driver=Driver, **plan):
        path = str(tmp_path / f"backend{len(running)}")
        backend = Listener(make(), path)
        running.append(backend)
        proxy, faults = Proxy(path, record), Faults(**plan)
        faults.attach(proxy)
        thread = DeviceThread(proxy)
        running.append(thread)
        front = driver(thread.take_socket())
        running.append(front)
        front.backend, front.faults, front.path = backend, faults, path
        return front

    yield plug
    for thing in reversed(running):
        thing.close()


def until(driver, count, seconds=20.0):
    """The used elements, once there are so many."""
    end = time.monotonic() + seconds
    while len(driver.used()) < count and time.monotonic() < end:
        driver.called(0.5)
    return driver.used()


def test_data_passes_both_ways(plug):
    driver = plug()
    for round_ in range(3):
        heads = driver.send(b"abc", b"defg")
        used = until(driver, 2 * round_ + 2)
        assert sorted(used[-2:]) == sorted([(heads[0], 3), (heads[1], 4)])
    chains = driver.queue.collect()
    assert {data for _, data in chains} == {b"ABC", b"DEFG"}


def test_rings_longer_than_their_size(plug):
    driver = plug()
    for number in range(100):
        driver.send(b"ab")
        assert until(driver, 1) and driver.queue.wait()[0][1] == b"AB", number


@pytest.mark.parametrize("fault", SEEN)
def test_used_ring_shows_the_fault(plug, fault):
    driver = plug(**{fault: {1}})
    heads = driver.send(b"ab", b"cde", b"fghi")
    want = SEEN[fault](*heads)
    assert until(driver, len(want)) == want
    assert [(hit.number, hit.fault) for hit in driver.faults.hits] == [(1, fault)]


def test_lost_call(plug):
    driver = plug(never_call={0})
    driver.send(b"ab")
    assert not driver.called(1)
    assert len(driver.used()) == 1
    driver.send(b"cd")
    assert driver.called()


class Boasting(Upper):
    """Says that it wrote more than there is room for."""

    def on_queue(self, queue):
        for chain in queue:
            queue.keep(chain)
            queue.ring.use(chain.head, 5000)


def test_a_backends_own_lie_is_for_the_driver_to_see(plug):
    driver = plug(make=Boasting)
    heads = driver.send(b"ab", b"cd")
    assert until(driver, 2) == [(head, 5000) for head in heads]


def test_needs_reset_ends_the_frontends_connection_alone(plug):
    driver = plug(needs_reset={0})
    driver.send(b"ab")
    with pytest.raises((EOFError, ConnectionError)):
        driver.frontend.receive()
    assert driver.backend.thread.is_alive()


def test_features_and_configuration(plug):
    driver = plug(features=1 << 3 | 1 << 5, config_flip={1})
    assert driver.offered & 0xFF == 1 << 5
    reads = [driver.frontend.ask("GET_CONFIG", Config(0, 0, bytes(4))).data for _ in range(3)]
    assert reads[0] == reads[2] == bytes(4)
    assert int.from_bytes(reads[1], "little").bit_count() == 1


def test_a_queue_stops_and_goes_on(plug):
    driver = plug()
    driver.send(b"ab")
    until(driver, 1)
    assert driver.frontend.stop(0) == 1
    driver.send(b"cd")
    assert driver.frontend.start(0, driver.queue, base=1) == 0
    assert [length for _, length in until(driver, 2)] == [2, 2]


def test_a_lost_backend_is_told_by_hanging_up(plug):
    driver = plug(make=Mute)
    driver.send(b"ab")
    driver.settle()
    driver.backend.close()
    with pytest.raises((EOFError, ConnectionError)):
        driver.frontend.receive()


def test_the_backend_cannot_shorten_the_rings_in_between():
    """Touching them would kill the proxy."""
    rings = ShadowMemory()
    with pytest.raises(PermissionError):
        os.ftruncate(rings.fd, 0)
    rings.close()


def test_no_backend(tmp_path):
    with DeviceThread(Proxy(str(tmp_path / "none"))) as thread:
        assert thread.take_socket().recv(1) == b""


class Listening(Driver):
    """Takes the protocol features that requests of the backend need."""

    def __init__(self, sock):
        super().__init__(sock)
        self.frontend.tell("SET_PROTOCOL_FEATURES", U64(1 << 5 | 1 << 9))
        self.requests = self.frontend.backend_channel()

    def close(self):
        self.requests.close()
        super().close()


def test_requests_of_the_backend_reach_the_frontend(plug):
    driver = plug(make=Changing, driver=Listening)
    driver.send(b"ab")
    assert receive_backend_request(driver.requests).request.name == "CONFIG_CHANGE_MSG"
    assert driver.frontend.ask("GET_CONFIG", Config(0, 0, bytes(4))).data == b"\1\0\0\0"


# -- recordings ---------------------------------------------------------------------------------


@pytest.fixture
def recording(plug, tmp_path):
    path = tmp_path / "recording"
    driver = plug(record=str(path))
    heads = driver.send(b"abc")
    until(driver, 1)
    driver.frontend.ask("GET_CONFIG", Config(0, 0, bytes(4)))
    driver.frontend.stop(0)
    return path, heads[0], driver.path, driver


def test_recording_has_messages_descriptors_and_chains(recording):
    path, head, _, _ = recording
    lines = list(read(str(path)))
    assert [line.at for line in lines] == sorted(line.at for line in lines)
    table = next(line for line in lines if line.message == "SET_MEM_TABLE")
    assert table.fds == ("memfd", "memfd")
    assert len(table.payload.regions) == 2
    (chain,) = [line for line in lines if line.kind == "chain"]
    assert (chain.head, chain.readable, chain.writable) == (head, (3,), (3,))
    (used,) = [line for line in lines if line.kind == "used"]
    assert (used.head, used.length) == (head, 3)
    text = "".join(line.as_text() for line in lines)
    assert "GET_VRING_BASE index=0 num=1" in text
    assert "(eventfd)" in text


def test_recording_has_the_faults(plug, tmp_path):
    """After what the backend did."""
    path = str(tmp_path / "recording")
    driver = plug(record=path, drop={1}, config_flip={0}, features=1 << 5)
    heads = driver.send(b"ab", b"cd", b"ef")
    until(driver, 2)
    driver.frontend.ask("GET_CONFIG", Config(0, 0, bytes(4)))
    driver.settle()
    texts = [line.as_text()[13:] for line in read(path)]
    at = texts.index(f"queue 0 chain {heads[1]} used, 2 bytes\n")
    assert texts[at + 1] == f"queue 0 chain {heads[1]} fault drop (number 1)\n"
    faults = [text for text in texts if text.startswith("fault")]
    assert faults[0] == "fault features: 0x20\n"
    assert faults[1].startswith("fault config_flip (number 0): bit ")


def play(path, make, tmp_path):
    socket_path = str(tmp_path / "again")
    backend = Listener(make(), socket_path)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(socket_path)
            return replay(read(str(path)), sock.dup())
    finally:
        backend.close()


class Wider(Upper):
    features = 1 << 3 | 1 << 7


class Odd(Upper):
    def __init__(self):
        super().__init__()
        self.config["word"] = 77


def test_replay_finds_no_difference_in_the_same_backend(recording, tmp_path):
    assert play(recording[0], Upper, tmp_path) is None


@pytest.mark.parametrize(("make", "message"), [(Wider, "GET_FEATURES"), (Odd, "GET_CONFIG")])
def test_replay_names_the_first_difference(recording, tmp_path, make, message):
    difference = play(recording[0], make, tmp_path)
    assert difference is not None
    assert difference.recorded.message == message


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "no JSON"),
        ("{}", "no recording"),
        ('{"pyvmm-recording": 9}', "version 9"),
        ('{"pyvmm-recording": 1}\n{"at": 0}', "line 2"),
        ('{"pyvmm-recording": 1}\n[]', "line 2"),
        ('{"pyvmm-recording": 1}\n{"at":0,"kind":"request","channel":"frontend","message":"X"}', "line 2"),
        ('{"pyvmm-recording": 1}\n{"at":"0","kind":"connect"}', "line 2"),
        ('{"pyvmm-recording": 1}\n{"at":0,"kind":"bogus"}', "line 2"),
        ('{"pyvmm-recording": 1}\n{"at":0,"kind":{}}', "line 2"),
        ('{"pyvmm-recording": 1}\n{"at":0,"kind":"chain","readable":5}', "line 2"),
        ('{"pyvmm-recording": 1}\n{"at":0,"kind":"fault","message":"\\ud800"}', "line 2"),
        ('{"pyvmm-recording": 1}\n' + "[" * 100_000, "line 2"),
    ],
)
def test_files_that_are_no_recordings(tmp_path, text, cause):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ConfigError, match=cause):
        list(read(str(tmp_path / "file")))


def test_places_of_recordings_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, "/dev/zero", tmp_path / "pipe", tmp_path / "absent"):
        with pytest.raises(ConfigError, match=re.escape(f"{path}: ")):
            list(read(str(path)))
    with pytest.raises(ConfigError, match="--record: .*pipe: nobody is at its other end; a writable file"):
        Recorder(str(tmp_path / "pipe"))


def test_a_recording_ends_where_the_disk_is_full(capfd):
    recorder = Recorder("/dev/full")
    recorder.add("connect")
    recorder.close()
    assert capfd.readouterr().err == (
        "pyvmm: --record: /dev/full: No space left on device; the recording ends here\n"
    )
