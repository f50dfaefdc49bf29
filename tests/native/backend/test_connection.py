"""The backend library against frontends of every habit, in one process over a socketpair.

In one file because every case drives the same connection through the same driver.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from contextlib import suppress

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.packed_driver import FRESH, PackedQueue
from fakes.ring_driver import (
    REPLY_ACK,
    RING_PACKED,
    USER_BASE,
    DriverQueue,
    Ram,
    RawFrontend,
    addresses,
    receive_backend_request,
)

from pyvmm.backend import ConfigSpace, Device, serve
from pyvmm.backend.loop import DeviceLoop
from pyvmm.vhost_user.payloads import (
    U64,
    Config,
    MemRegion,
    MemTable,
    SingleRegion,
    VringAddr,
    VringFile,
    VringState,
)

PROTOCOL = 1 << 30
EVENT_IDX = 1 << 29


class Upper(Device):
    """Gives back in upper case; remembers what it was told."""

    device_id = 63
    features = 1 << 3
    queue_sizes = (16, 16)

    def __init__(self):
        super().__init__()
        self.config = ConfigSpace([("a", 1), ("b", 2), ("c", 4)], b"\1\2\3\4\5\6\7")
        self.calls = []

    def on_queue(self, queue):
        for chain in queue:
            chain.write(chain.read().upper())

    def on_features(self, features):
        self.calls.append(("features", features))

    def on_connect(self):
        self.calls.append("connect")

    def on_disconnect(self):
        self.calls.append("disconnect")

    def on_start(self, queue):
        self.calls.append(("start", queue.index))

    def on_stop(self, queue):
        self.calls.append(("stop", queue.index))

    def on_reset(self):
        self.calls.append("reset")


class Bench:
    """A device served in a thread at a listening socket, and what a test plugs into it."""

    def __init__(self, device, path):
        self.device, self.path = device, path
        self.loop = DeviceLoop()
        self.failure = None
        self.ram = Ram()
        self.queues = []
        self.frontends = []
        self.thread = threading.Thread(target=self._serve)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(1)
        self.listener = listener
        self.thread.start()

    def _serve(self):
        try:
            serve(self.device, self.listener.detach(), loop=self.loop)
        except BaseException as error:
            self.failure = error

    def connect(self):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.path)
        self.frontends.append(RawFrontend(sock))
        return self.frontends[-1]

    def queue(self, kind=DriverQueue, **options):
        self.queues.append(kind(self.ram, **options))
        return self.queues[-1]

    def ready(self, **options):
        """A negotiated frontend with the memory shared."""
        frontend = self.connect()
        frontend.negotiate(**options)
        assert frontend.share(self.ram) == 0
        return frontend

    def close(self):
        for frontend in self.frontends:
            frontend.close()
        self.loop.stop()
        self.thread.join(10)
        self.loop.close()
        for queue in self.queues:
            queue.close()
        self.ram.close()
        assert not self.thread.is_alive()
        assert self.failure is None


@pytest.fixture
def bench(tmp_path):
    bench = Bench(Upper(), str(tmp_path / "sock"))
    yield bench
    bench.close()


def check_works(frontend, queue, index=0):
    queue.reset()
    assert frontend.start(index, queue) == 0
    queue.add([b"hello"], [8])
    queue.kick()
    assert queue.wait()[0][1] == b"HELLO"


def test_a_chain_goes_round(bench):
    check_works(bench.ready(), bench.queue(event_idx=True))


@pytest.mark.parametrize("features", [PROTOCOL | 1 << 32, PROTOCOL | 1 << 32 | EVENT_IDX])
@pytest.mark.parametrize("parts", [1, 2])
def test_with_and_without_event_index_and_regions(bench, features, parts):
    frontend = bench.connect()
    frontend.negotiate(features)
    queue = bench.queue(event_idx=bool(features & EVENT_IDX))
    assert frontend.share(bench.ram, parts) == 0
    check_works(frontend, queue)
    for _ in range(100):
        queue.add([b"again"], [8])
        queue.kick()
        assert queue.wait()[0][1] == b"AGAIN"


def test_without_protocol_features_rings_run_at_once(bench):
    """Section "Ring states": no SET_VRING_ENABLE exists then."""
    frontend = bench.connect()
    frontend.tell("SET_OWNER")
    offered = frontend.number("GET_FEATURES")
    frontend.tell("SET_FEATURES", U64(offered & ~PROTOCOL & ~EVENT_IDX & ~RING_PACKED))
    frontend.share(bench.ram)
    queue = bench.queue()
    frontend.tell("SET_VRING_NUM", VringState(0, queue.size))
    frontend.tell("SET_VRING_ADDR", addresses(0, queue))
    frontend.tell("SET_VRING_BASE", VringState(0, 0))
    queue.add([b"early"], [8])
    frontend.tell("SET_VRING_CALL", VringFile(0, True), [queue.call_fd])
    frontend.tell("SET_VRING_KICK", VringFile(0, True), [queue.kick_fd])
    assert queue.wait()[0][1] == b"EARLY"


def test_qemu_order_and_a_call_descriptor_that_comes_late(bench):
    frontend = bench.connect()
    frontend.negotiate(protocol=0)  # no acks
    assert frontend.number("GET_FEATURES")  # QEMU asks twice
    frontend.share(bench.ram)
    queue = bench.queue(event_idx=True)
    queue.add([b"early"], [8])
    frontend.tell("SET_VRING_CALL", VringFile(0, False))
    frontend.tell("SET_VRING_NUM", VringState(0, queue.size))
    frontend.tell("SET_VRING_BASE", VringState(0, 0))
    frontend.tell("SET_VRING_ADDR", addresses(0, queue))
    frontend.tell("SET_VRING_KICK", VringFile(0, True), [queue.kick_fd])
    frontend.tell("SET_VRING_ENABLE", VringState(0, 1))
    frontend.number("GET_FEATURES")  # its barrier
    frontend.tell("SET_VRING_CALL", VringFile(0, True), [queue.call_fd])
    assert os.eventfd_read(wait_readable(queue.call_fd)) == 1  # made up for
    assert queue.collect()[0][1] == b"EARLY"


def test_queues_that_are_enabled_before_anything_is_accepted(bench):
    """As QEMU has it for network cards."""
    frontend = bench.connect()
    frontend.tell("SET_OWNER")
    frontend.number("GET_FEATURES")
    frontend.tell("SET_VRING_ENABLE", VringState(0, 1))
    frontend.negotiate()
    frontend.share(bench.ram)
    check_works(frontend, bench.queue(event_idx=True))


def wait_readable(fd):
    import select

    assert select.select([fd], [], [], 5)[0]
    return fd


def test_queue_without_a_kick_descriptor_is_polled(bench):
    frontend = bench.ready()
    queue = bench.queue(event_idx=True)
    frontend.tell("SET_VRING_NUM", VringState(0, queue.size))
    frontend.tell("SET_VRING_ADDR", addresses(0, queue))
    frontend.tell("SET_VRING_CALL", VringFile(0, True), [queue.call_fd])
    frontend.tell("SET_VRING_KICK", VringFile(0, False))
    frontend.tell("SET_VRING_ENABLE", VringState(0, 1))
    frontend.tell("SET_VRING_ENABLE", VringState(0, 1))
    for _ in range(3):
        queue.add([b"polled"], [8])
        assert queue.wait()[0][1] == b"POLLED"


def test_disabled_queue_rests(bench):
    frontend = bench.ready()
    queue = bench.queue(event_idx=True)
    check_works(frontend, queue)
    assert frontend.tell("SET_VRING_ENABLE", VringState(0, 0)) == 0
    queue.add([b"later"], [8])
    queue.kick()
    assert queue.wait(0.2) == []
    frontend.tell("SET_VRING_ENABLE", VringState(0, 1))
    assert queue.wait()[0][1] == b"LATER"


def test_stop_tells_the_base_and_start_goes_on(bench):
    frontend = bench.ready()
    queue = bench.queue(event_idx=True)
    check_works(frontend, queue)
    assert frontend.stop(0) == 1
    assert frontend.start(0, queue, base=1) == 0
    queue.add([b"more"], [8])
    queue.kick()
    assert queue.wait()[0][1] == b"MORE"
    assert bench.device.calls.count(("start", 0)) == 2
    assert bench.device.calls.count(("stop", 0)) == 1


def test_the_device_hears_the_end_of_a_broken_ring_too(bench):
    frontend, queue = bench.ready(), bench.queue(event_idx=True)
    check_works(frontend, queue)
    queue.offer(queue.size)
    queue.kick()
    frontend.stop(0)
    assert bench.device.calls[-2:] == [("start", 0), ("stop", 0)]
    check_works(frontend, queue)


def test_driver_that_adds_while_it_is_served_without_a_kick(bench):
    """One turn is bounded, and with event indices the driver need not kick in the meantime."""
    frontend = bench.ready()
    queue = bench.queue(size=16, event_idx=True)
    seen = []

    def on_queue(device_queue):
        for chain in device_queue:
            seen.append(chain.read())
            chain.push()
            queue.collect()
            if len(seen) + 15 < 100:
                queue.add_rows([(64, 4, 0)])

    bench.device.on_queue = on_queue
    for _ in range(15):
        queue.add_rows([(64, 4, 0)])
    frontend.start(0, queue)
    end = time.monotonic() + 5
    while len(seen) < 99 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(seen) == 99


def test_more_chains_than_one_turn_takes(bench):
    frontend = bench.ready()
    queue = bench.queue(size=16, event_idx=True)
    check_works(frontend, queue)
    for _ in range(2000):
        while queue.free:
            queue.add_rows([(64, 4, 0)])
        queue.kick()
        queue.collect()
    while queue.chains:
        assert queue.wait()


def test_driver_that_kicks_all_the_time_does_not_pile_up_work(bench):
    frontend, queue, turns = bench.ready(), bench.queue(event_idx=True), []

    def on_queue(device_queue):
        for _ in device_queue:  # what a driver on another CPU does meanwhile
            queue.offer(0)
            queue.kick()
        turns.append(len(bench.loop._timers))
        device_queue.enabled = len(turns) < 500

    bench.device.on_queue = on_queue
    queue.descriptor(0, 64, 4)
    for _ in range(16):
        queue.offer(0)
    frontend.start(0, queue)
    end = time.monotonic() + 10
    while len(turns) < 500 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(turns) >= 500 and max(turns) <= 2


def test_memory_regions_come_and_go_one_by_one(bench):
    frontend = bench.connect()
    frontend.negotiate()
    assert frontend.number("GET_MAX_MEM_SLOTS") > 32
    region = SingleRegion(0, bench.ram.size, USER_BASE, 0)
    assert frontend.tell("ADD_MEM_REG", region, [bench.ram.fd]) == 0
    queue = bench.queue(event_idx=True)
    check_works(frontend, queue)
    other = SingleRegion(bench.ram.size, bench.ram.size, USER_BASE + bench.ram.size, 0)
    assert frontend.tell("ADD_MEM_REG", other, [bench.ram.fd]) == 0
    assert frontend.tell("REM_MEM_REG", other) == 0
    queue.add([b"same"], [8])
    queue.kick()
    assert queue.wait()[0][1] == b"SAME"
    assert frontend.tell("REM_MEM_REG", region) == 1  # the ring is in it: it stops
    frontend.tell("ADD_MEM_REG", region, [bench.ram.fd])
    frontend.stop(0)
    check_works(frontend, queue)


def test_region_at_an_odd_file_offset(bench):
    frontend = bench.connect()
    frontend.negotiate()
    region = MemRegion(0, bench.ram.size - 512, USER_BASE, 512)
    assert frontend.tell("SET_MEM_TABLE", MemTable((region,)), [bench.ram.fd]) == 0
    bench.ram.alloc(512)
    queue = bench.queue(event_idx=True)
    queue.reset()
    at = bench.ram.put(b"shift")
    places = (USER_BASE + part - 512 for part in (queue.desc, queue.used, queue.avail))
    frontend.tell("SET_VRING_NUM", VringState(0, queue.size))
    assert frontend.tell("SET_VRING_ADDR", VringAddr(0, 0, *places, 0)) == 0
    frontend.tell("SET_VRING_CALL", VringFile(0, True), [queue.call_fd])
    frontend.tell("SET_VRING_KICK", VringFile(0, True), [queue.kick_fd])
    frontend.tell("SET_VRING_ENABLE", VringState(0, 1))
    room = bench.ram.alloc(8)
    queue.add_rows([(at - 512, 5, 0), (room - 512, 8, 2)])
    queue.kick()
    assert queue.wait()
    assert bench.ram.data[room : room + 5] == b"SHIFT"


@pytest.mark.parametrize("event_idx", [False, True])
def test_packed_rings(bench, event_idx):
    frontend = bench.connect()
    offered = frontend.negotiate(PROTOCOL | 1 << 32 | RING_PACKED | EVENT_IDX * event_idx)
    assert offered & RING_PACKED
    assert frontend.share(bench.ram) == 0
    queue = bench.queue(kind=PackedQueue, size=12, event_idx=event_idx)
    base = FRESH
    for turn in range(30):
        assert frontend.start(0, queue, base=base) == 0
        for _ in range(1 + turn % 3):
            queue.add([b"packed"], [8])
        queue.kick()
        got = []
        while len(got) < 1 + turn % 3:
            got += [data for _, data in queue.wait()]
        assert set(got) == {b"PACKED"}
        base = frontend.stop(0)
        place = queue.place | queue.wrap << 15
        assert base == place | place << 16
    assert frontend.start(0, queue, base=0x7FFF) == 1  # beyond the ring


def test_config_space(bench):
    frontend = bench.ready()
    assert frontend.ask("GET_CONFIG", Config(0, 0, bytes(7))).data == b"\1\2\3\4\5\6\7"
    assert frontend.ask("GET_CONFIG", Config(1, 0, bytes(2))).data == b"\2\3"
    assert frontend.ask("GET_CONFIG", Config(5, 0, bytes(9))).data == b"\6\7" + bytes(7)
    for flags in (0, 1):
        assert frontend.tell("SET_CONFIG", Config(1, flags, bytes([9, flags]))) == 0
        assert frontend.ask("GET_CONFIG", Config(0, 0, bytes(4))).data == bytes([1, 9, flags, 4])
    assert frontend.tell("SET_CONFIG", Config(200, 0, b"lost")) == 0
    assert len(bench.device.config) == 7


def test_config_change_notification(bench):
    frontend = bench.ready()
    bench.loop.call_soon_threadsafe(bench.device.config_changed)  # nobody listens yet
    channel = frontend.backend_channel()
    bench.loop.call_soon_threadsafe(bench.device.config_changed)
    assert receive_backend_request(channel).request.name == "CONFIG_CHANGE_MSG"
    channel.close()
    bench.loop.call_soon_threadsafe(bench.device.config_changed)
    assert frontend.number("GET_QUEUE_NUM") == 2


def test_reset_device(bench):
    frontend = bench.ready()
    queue = bench.queue(event_idx=True)
    check_works(frontend, queue)
    assert frontend.tell("RESET_DEVICE") == 0
    assert bench.device.calls[-2:] == [("stop", 0), "reset"]
    frontend.tell("SET_FEATURES", U64(frontend.number("GET_FEATURES") & ~RING_PACKED))
    check_works(frontend, queue)


def test_frontends_come_one_after_another(bench):
    queue = bench.queue(event_idx=True)
    for _ in range(50):
        frontend = bench.ready()
        check_works(frontend, queue)
        frontend.close()
    assert bench.device.calls.count("connect") == 50


def test_descriptors_do_not_leak(bench):
    queue = bench.queue(event_idx=True)

    def once():
        frontend = bench.ready()
        channel = frontend.backend_channel()
        check_works(frontend, queue)
        frontend.close()
        channel.close()
        probe = bench.ready()  # the one before is gone when this is served
        probe.close()

    once()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        once()
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def bad_address(frontend, queue):
    frontend.tell("SET_VRING_NUM", VringState(0, queue.size))
    frontend.tell("SET_VRING_KICK", VringFile(0, True), [queue.kick_fd])
    frontend.tell("SET_VRING_ADDR", VringAddr(0, 0, USER_BASE + 8, USER_BASE, USER_BASE, 0))
    return frontend.tell("SET_VRING_ENABLE", VringState(0, 1))


def no_address(frontend, queue):
    frontend.tell("SET_VRING_KICK", VringFile(0, True), [queue.kick_fd])
    return frontend.tell("SET_VRING_ENABLE", VringState(0, 1))


def too_large(frontend, queue):
    return frontend.tell("SET_VRING_NUM", VringState(0, 32))


def not_a_power_of_two(frontend, queue):
    return frontend.tell("SET_VRING_NUM", VringState(0, 12))


@pytest.mark.parametrize("act", [bad_address, no_address, too_large, not_a_power_of_two])
def test_what_a_guest_can_cause_is_refused_and_forgiven(bench, act):
    frontend = bench.ready()
    queue = bench.queue(event_idx=True)
    assert act(frontend, queue) == 1
    frontend.stop(0)
    check_works(frontend, queue)


def raw(number, flags, payload=b""):
    return struct.pack("=III", number, flags, len(payload)) + payload


FORBIDDEN = {
    "unknown request": raw(999, 1),
    "known but not served": raw(33, 1),
    "not negotiated": raw(24, 1, struct.pack("=III", 0, 4, 0) + bytes(4)),
    "wrong version": raw(1, 2),
    "a reply": raw(1, 5, bytes(8)),
    "wrong size": raw(2, 1, bytes(4)),
    "huge size": struct.pack("=III", 2, 1, 0xFFFF_FFFF),
    "features never offered": raw(2, 1, struct.pack("=Q", 1 << 63)),
    "queue out of range": raw(8, 1, struct.pack("=II", 99, 16)),
    "kick without its descriptor": raw(12, 1, struct.pack("=Q", 0)),
    "memory without descriptors": raw(5, 1, struct.pack("=II4Q", 1, 0, 0, 4096, 0, 0)),
}


@pytest.mark.parametrize("data", FORBIDDEN.values(), ids=FORBIDDEN)
def test_forbidden_message_costs_the_connection_only(bench, data):
    frontend = bench.connect()
    frontend.sock.sendall(data)
    with suppress(ConnectionResetError):  # when it did not even read all of it
        assert frontend.sock.recv(1) == b""
    check_works(bench.ready(), bench.queue(event_idx=True))


def region_beyond_its_file(frontend, ram):
    frontend.tell("SET_MEM_TABLE", MemTable((MemRegion(0, ram.size + 1, 0, 0),)), [ram.fd])


def region_over_the_end_of_the_world(frontend, ram):
    frontend.tell("SET_MEM_TABLE", MemTable((MemRegion((1 << 64) - 4096, 8192, 0, 0),)), [ram.fd])


def overlapping_regions(frontend, ram):
    regions = (MemRegion(0, 8192, 0, 0), MemRegion(4096, 8192, 1 << 40, 0))
    frontend.tell("SET_MEM_TABLE", MemTable(regions), [ram.fd, ram.fd])


def empty_region(frontend, ram):
    frontend.tell("SET_MEM_TABLE", MemTable((MemRegion(0, 0, 0, 0),)), [ram.fd])


def absent_region_removed(frontend, ram):
    frontend.tell("REM_MEM_REG", SingleRegion(5, 6, 7, 0))


def backend_channel_that_is_no_socket(frontend, ram):
    frontend.tell("SET_BACKEND_REQ_FD", None, [ram.fd])


@pytest.mark.parametrize(
    "act",
    [
        region_beyond_its_file,
        region_over_the_end_of_the_world,
        overlapping_regions,
        empty_region,
        absent_region_removed,
        backend_channel_that_is_no_socket,
    ],
)
def test_impossible_request_costs_the_connection_only(bench, act):
    frontend = bench.connect()
    frontend.negotiate()
    with pytest.raises((EOFError, ConnectionError)):
        act(frontend, bench.ram)
        frontend.number("GET_FEATURES")
    check_works(bench.ready(), bench.queue(event_idx=True))


def test_frontend_that_does_not_read_its_replies(bench):
    frontend = bench.connect()
    frontend.sock.settimeout(0.5)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        for _ in range(200_000):
            frontend.send("GET_FEATURES")
    check_works(bench.ready(), bench.queue(event_idx=True))


def test_random_bytes_never_end_the_process(bench):
    rng = random.Random(4)
    sizes = (0, 0, 8, 8, 8, 40, 12, 16, 31)
    for _ in range(200):
        frontend = bench.connect()
        data = b"".join(
            raw(rng.randrange(1, 50), rng.choice((1, 9)), rng.randbytes(rng.choice(sizes))) for _ in range(8)
        )
        with suppress(ConnectionError):
            socket.send_fds(frontend.sock, [data], [bench.ram.fd] * rng.randrange(3))
        frontend.close()
    check_works(bench.ready(), bench.queue(event_idx=True))


def test_random_rings_never_end_the_process(bench):
    rng = random.Random(5)
    frontend = bench.ready()
    queue = bench.queue(size=16)
    for _ in range(300):
        for at, length in ((queue.desc, 256), (queue.avail, 38)):
            bench.ram.data[at : at + length] = rng.randbytes(length)
        bench.ram.set_u16(queue.avail + 2, rng.randrange(20))
        frontend.start(0, queue)
        queue.kick()
        frontend.stop(0)
    check_works(frontend, bench.queue(event_idx=True))
    assert frontend.acks and REPLY_ACK
