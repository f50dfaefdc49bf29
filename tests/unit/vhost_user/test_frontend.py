"""The frontend against a scripted backend: order of messages, configuration, loss, hostility.

In one file because every case plays the same scripted backend.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from time import monotonic, sleep
from typing import Any

import pytest
from fakes import backend as fake
from fakes.backend import FakeBackend, FakeKind, Surroundings, no_new_fds
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import BackendLost, ConfigError, RemoteProtocolError
from pyvmm.vhost_user.codec import Decoder, Message, encode_request
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.vhost_user.memory import USER_BASE
from pyvmm.vhost_user.messages import BACKEND_REQUESTS, F_PROTOCOL_FEATURES, HEADER, Request, RequestTable
from pyvmm.vhost_user.messages import ProtocolFeature as P
from pyvmm.vhost_user.payloads import (
    U64,
    Config,
    Empty,
    Inflight,
    MemRegion,
    MemTable,
    Mmap,
    VringAddr,
    VringFile,
    VringState,
)
from pyvmm.virtio.queue import QueueSetup

ACKED = P.MQ | P.REPLY_ACK | P.CONFIG | P.BACKEND_REQ | P.INFLIGHT_SHMFD
SHORT = 0.3  # seconds: the deadline where a backend is silent


class Bench:
    """Builds frontends and backends and closes them."""

    def __init__(self) -> None:
        self.around = Surroundings()
        self.backends: list[FakeBackend] = []
        self.frontends: list[Frontend] = []
        self.lost: list[str] = []
        self.changes: list[None] = []
        self.eventfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]

    def backend(self, **options: Any) -> FakeBackend:
        self.backends.append(FakeBackend(**options))
        return self.backends[-1]

    def frontend(
        self,
        backend: FakeBackend,
        kind: FakeKind | None = None,
        sizes: tuple[int, ...] = (64, 128),
        **options: Any,
    ) -> Frontend:
        options = {"config": None, "deadline": 5.0, "name": "dev", **options}
        frontend = Frontend(
            backend.connect, kind or FakeKind(), sizes, ram=self.around.ram, loop=self.around.loop, **options
        )
        frontend.on_lost = self.lost.append
        frontend.on_config_change = lambda: self.changes.append(None)
        self.frontends.append(frontend)
        return frontend

    def watched(self, backend: FakeBackend, **options: Any) -> Frontend:
        frontend = self.frontend(backend, **options)
        frontend.start_watching()
        self.around.run()
        return frontend

    def queues(self, count: int = 2) -> list[QueueSetup]:
        return [
            QueueSetup(i, 64, 0x1000 + i * 0x4000, 0x2000 + i * 0x4000, 0x3000 + i * 0x4000, kick, call)
            for i, (kick, call) in enumerate(zip(self.eventfds[:2], self.eventfds[2:], strict=True))
        ][:count]

    def close(self) -> None:
        self.around.stop()
        for frontend in self.frontends:
            frontend.close()
        for backend in self.backends:
            backend.close()
        for fd in self.eventfds:
            os.close(fd)
        self.around.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with no_new_fds():
        bench = Bench()
        yield bench
        bench.close()


def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, "it did not happen in time"
        sleep(0.002)


# -- opening -----------------------------------------------------------------------


def test_opening_order(bench: Bench) -> None:
    backend = bench.backend()
    frontend = bench.frontend(backend)
    assert backend.names == [
        "SET_OWNER",
        "GET_FEATURES",
        "GET_PROTOCOL_FEATURES",
        "SET_PROTOCOL_FEATURES",
        "SET_BACKEND_REQ_FD",
        "GET_QUEUE_NUM",
        "GET_CONFIG",
    ]
    acked = next(p.value for n, p, _ in backend.seen if n == "SET_PROTOCOL_FEATURES" and isinstance(p, U64))
    assert acked == ACKED
    assert (frontend.device_id, frontend.queue_sizes, frontend.config_size) == (40, (64, 128), 16)
    assert frontend.shared_memory == ()


@pytest.mark.parametrize("bit", range(64))
def test_which_features_reach_the_guest(bench: Bench, bit: int) -> None:
    backend = bench.backend(virtio=1 << bit | F_PROTOCOL_FEATURES | 1 << 32)
    shown = bit <= 23 or bit >= 50 or bit in (28, 29, 32, 35, 36, 38)
    assert bool(bench.frontend(backend, on_loss="reconnect").features >> bit & 1) == shown


@pytest.mark.parametrize(("on_loss", "shown"), [("reconnect", False), ("stop", True), ("fail", True)])
def test_packed_rings_are_for_devices_that_go_on_with_no_other_backend(
    bench: Bench, on_loss: str, shown: bool
) -> None:
    """Memory does not tell where a lost backend stopped in a packed ring."""
    offered = 1 << 34 | 1 << 32 | F_PROTOCOL_FEATURES
    assert bool(bench.frontend(bench.backend(virtio=offered), on_loss=on_loss).features >> 34 & 1) == shown
    assert not bench.frontend(bench.backend(), on_loss=on_loss).features >> 34 & 1


def test_a_backend_without_protocol_features(bench: Bench) -> None:
    backend = bench.backend(virtio=1 << 32 | 1)
    frontend = bench.frontend(backend)
    frontend.activate(1 << 32 | 1, bench.queues())
    frontend.reset()
    assert backend.names[:2] == ["SET_OWNER", "GET_FEATURES"]
    assert "SET_VRING_ENABLE" not in backend.names
    assert backend.names[-3:] == ["GET_FEATURES", "GET_VRING_BASE", "GET_VRING_BASE"]
    assert ("SET_FEATURES", U64(1 << 32 | 1), 0) in backend.seen


def test_no_notices_without_config(bench: Bench) -> None:
    backend = bench.backend(protocol=fake.PROTOCOL & ~P.CONFIG)
    frontend = bench.frontend(backend)
    assert "SET_BACKEND_REQ_FD" not in backend.names
    assert frontend.read_config(0, 4) == bytes(4)
    backend = bench.backend()
    bench.frontend(backend, config=b"given")
    assert "SET_BACKEND_REQ_FD" not in backend.names


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((), {}, "0 queues; a device has 1 to 256"),
        ((64,) * 257, {}, "257 queues"),
        ((64,), {}, "fake drivers need 2.*--force"),
        ((64, 96), {}, "queue size 96; it must be a power of two"),
        ((64, 0), {}, "queue size 0"),
        ((64, 65536), {}, "queue size 65536"),
        ((64,) * 5, {}, "5 queues, but the backend has 4"),
    ],
)
def test_queues_that_do_not_fit(
    bench: Bench, sizes: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.frontend(bench.backend(), FakeKind(min_queues=2), sizes, **options)


def test_force_allows_fewer_queues(bench: Bench) -> None:
    assert bench.frontend(bench.backend(), FakeKind(min_queues=2), (64,), force=True).queue_sizes == (64,)


def test_without_mq_the_users_count_holds(bench: Bench) -> None:
    backend = bench.backend(protocol=P.REPLY_ACK)
    assert len(bench.frontend(backend, sizes=(64,) * 6).queue_sizes) == 6
    assert "GET_QUEUE_NUM" not in backend.names


# -- start and stop ----------------------------------------------------------------


def test_starting_and_stopping(bench: Bench) -> None:
    backend = bench.backend()
    frontend = bench.frontend(backend)
    del backend.seen[:]
    first, second = queues = bench.queues()
    frontend.activate(1 << 32 | 1, queues)
    regions = (
        MemRegion(0, 1 << 20, USER_BASE, 0),
        MemRegion(1 << 32, 1 << 20, USER_BASE + (1 << 32), 1 << 20),
    )
    expected = [
        ("SET_FEATURES", U64(1 << 32 | 1 | F_PROTOCOL_FEATURES), 0),
        ("SET_MEM_TABLE", MemTable(regions), 2),
        ("SET_VRING_NUM", VringState(0, 64), 0),
        ("SET_VRING_NUM", VringState(1, 64), 0),
        ("GET_INFLIGHT_FD", Inflight(0, 0, 2, 128), 0),
        ("SET_INFLIGHT_FD", Inflight(4096, 0, 2, 128), 1),
    ]
    for queue in (first, second):
        i = queue.index
        desc, used, avail = (USER_BASE + a for a in (queue.desc, queue.used, queue.avail))
        expected += [
            ("SET_VRING_BASE", VringState(i, 0), 0),
            ("SET_VRING_ADDR", VringAddr(i, 0, desc, used, avail, 0), 0),
            ("SET_VRING_CALL", VringFile(i, True), 1),
            ("SET_VRING_KICK", VringFile(i, True), 1),
        ]
    expected += [("SET_VRING_ENABLE", VringState(i, 1), 0) for i in range(2)]
    assert backend.seen == expected
    del backend.seen[:]
    frontend.reset()
    assert backend.seen == [
        ("SET_VRING_ENABLE", VringState(0, 0), 0),
        ("SET_VRING_ENABLE", VringState(1, 0), 0),
        ("GET_VRING_BASE", VringState(0, 0), 0),
        ("GET_VRING_BASE", VringState(1, 0), 0),
    ]
    del backend.seen[:]
    frontend.activate(1 << 32 | 1, queues)
    assert backend.seen == expected, "kick and call descriptors are sent again"


def test_everything_is_acked_once_acks_are_agreed_on(bench: Bench) -> None:
    backend = bench.backend()
    frontend = bench.frontend(backend)
    frontend.activate(1 << 32, bench.queues())
    assert backend.names.count("GET_FEATURES") == 1


def test_without_acks_a_reply_is_the_barrier(bench: Bench) -> None:
    backend = bench.backend(protocol=P.MQ)
    frontend = bench.frontend(backend)
    frontend.activate(1 << 32, bench.queues())
    assert backend.names[-3:] == ["SET_VRING_ENABLE", "SET_VRING_ENABLE", "GET_FEATURES"]


def test_features_that_were_not_offered_cannot_be_had(bench: Bench) -> None:
    backend = bench.backend()
    frontend = bench.frontend(backend)
    assert not frontend.agree((1 << 64) - 1) and frontend.agree(frontend.features)
    frontend.activate(frontend.features, bench.queues())
    assert backend.error is None
    sent = next(p.value for n, p, _ in backend.seen if n == "SET_FEATURES" and isinstance(p, U64))
    assert sent == fake.VIRTIO & ~(1 << 26)


def test_eventfds_are_the_ones_given(bench: Bench) -> None:
    backend = bench.backend()
    frontend = bench.frontend(backend)
    frontend.activate(1 << 32, bench.queues(1))
    call, kick = backend.fds[-2:]
    os.eventfd_write(bench.eventfds[0], 3)
    assert os.eventfd_read(kick) == 3
    os.eventfd_write(call, 4)
    assert os.eventfd_read(bench.eventfds[2]) == 4


def test_queue_without_interrupt(bench: Bench) -> None:
    backend = bench.backend()
    frontend = bench.frontend(backend)
    frontend.activate(1 << 32, [bench.queues(1)[0].replace(call=None)])
    assert ("SET_VRING_CALL", VringFile(0, False), 0) in backend.seen


def test_set_call(bench: Bench) -> None:
    backend = bench.backend()
    frontend = bench.frontend(backend)
    frontend.set_call(0, bench.eventfds[0])
    assert "SET_VRING_CALL" not in backend.names, "the queue does not run"
    frontend.activate(1 << 32, bench.queues())
    frontend.set_call(1, None)
    frontend.set_call(1, bench.eventfds[3])
    assert backend.seen[-2:] == [
        ("SET_VRING_CALL", VringFile(1, False), 0),
        ("SET_VRING_CALL", VringFile(1, True), 1),
    ]


def test_only_given_queues_are_started_under_their_own_index(bench: Bench) -> None:
    backend = bench.backend()
    frontend = bench.frontend(backend)
    frontend.activate(1 << 32, [bench.queues()[1]])
    frontend.reset()
    touched = {p.index for n, p, _ in backend.seen if isinstance(p, VringState | VringFile | VringAddr)}
    assert touched == {1}


def test_ring_outside_ram_is_refused(bench: Bench) -> None:
    frontend = bench.frontend(bench.backend())
    with pytest.raises(Exception, match="0x40000000 is not in RAM"):
        frontend.activate(1 << 32, [bench.queues()[0].replace(desc=1 << 30)])


# -- configuration space -----------------------------------------------------------


def test_reads_ask_from_offset_zero_and_are_cut(bench: Bench) -> None:
    backend = bench.backend()
    frontend = bench.frontend(backend)
    assert frontend.read_config(4, 4) == bytes([4, 5, 6, 7])
    assert frontend.read_config(14, 4) == bytes([14, 15, 0, 0])
    assert {p for n, p, _ in backend.seen if n == "GET_CONFIG"} == {Config(0, 0, bytes(16))}


def test_reads_are_not_cached(bench: Bench) -> None:
    backend = bench.backend()
    frontend = bench.frontend(backend)
    backend.config[0] = 99
    assert frontend.read_config(0, 1) == b"\x63"


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("forward", [Config(4, 0, b"ab")]),
        ("whole", [Config(0, 0, bytes([0, 1, 2, 3]) + b"ab" + bytes(range(6, 16)))]),
        ("absorb", []),
    ],
)
def test_write_policies(bench: Bench, policy: str, expected: list[Config]) -> None:
    backend = bench.backend()
    frontend = bench.frontend(backend, FakeKind(write_policy=policy))
    frontend.write_config(4, b"ab")
    frontend.write_config(16, b"beyond")
    assert [p for n, p, _ in backend.seen if n == "SET_CONFIG"] == expected


def test_given_configuration_stays_here(bench: Bench) -> None:
    backend = bench.backend()
    frontend = bench.frontend(backend, config=b"tag\0")
    assert (frontend.config_size, frontend.read_config(0, 6)) == (4, b"tag\0\0\0")
    frontend.write_config(2, b"gone")
    assert frontend.read_config(0, 4) == b"tago"
    assert not {"GET_CONFIG", "SET_CONFIG"} & set(backend.names)


@pytest.mark.parametrize("forget", [Frontend.reset, lambda frontend: frontend.agree(0)])
@pytest.mark.parametrize("config", [None, bytes(range(16))])
def test_what_we_kept_for_a_driver_ends_with_its_reset(
    bench: Bench, config: bytes | None, forget: Callable[[Frontend], object]
) -> None:
    """As virtio 1.3 wants of sense_size and cdb_size (5.6.4), whether the driver had come to run or not."""
    frontend = bench.frontend(bench.backend(), FakeKind(write_policy="absorb"), config=config)
    frontend.write_config(4, b"ab")
    assert frontend.read_config(3, 4) == b"\3ab\6"
    forget(frontend)
    assert frontend.read_config(3, 4) == b"\3\4\5\6"


def test_an_older_shorter_structure_is_found(bench: Bench) -> None:
    frontend = bench.frontend(bench.backend(config=bytes(range(9))), FakeKind(config_size=32))
    assert frontend.config_size == 8
    assert frontend.read_config(0, 8) == bytes(range(8))


def test_refused_write_keeps_the_device(bench: Bench) -> None:
    frontend = bench.frontend(bench.backend(script={"SET_CONFIG": fake.status(1)}))
    frontend.write_config(0, b"x")
    assert frontend.read_config(1, 1) == b"\1"


def test_failed_read_gives_the_last_bytes_and_loses_the_backend(bench: Bench) -> None:
    backend = bench.backend(script={("GET_CONFIG", 1): fake.hang_up})
    frontend = bench.watched(backend)
    assert frontend.read_config(3, 2) == b"\3\4"
    until(lambda: bench.lost)
    assert frontend.read_config(3, 2) == b"\3\4"


# -- the backend's requests --------------------------------------------------------


def ack(backend: FakeBackend, table: RequestTable = BACKEND_REQUESTS) -> int:
    assert backend.requests is not None
    decoder = Decoder(table, os.close, replies=True)
    reply = backend.requests.receive(decoder, monotonic() + 5).payload
    assert isinstance(reply, U64)
    return reply.value


def test_config_change(bench: Bench) -> None:
    backend = bench.backend()
    bench.watched(backend)
    backend.ask("CONFIG_CHANGE_MSG")
    assert ack(backend) == 0
    until(lambda: bench.changes)


def test_config_change_while_a_request_is_served(bench: Bench) -> None:
    """The backend waits for our ack before it answers a virtual CPU: no deadlock."""

    def ask_first(backend: FakeBackend, message: Any) -> bytes:
        backend.ask("CONFIG_CHANGE_MSG")
        assert ack(backend) == 0
        return backend.answer(message)

    backend = bench.backend(script={("GET_CONFIG", 1): ask_first})
    frontend = bench.watched(backend)
    assert frontend.read_config(0, 2) == b"\0\1"
    assert not bench.lost


@pytest.mark.parametrize("name", ["SET_BACKEND_REQ_FD", "GET_QUEUE_NUM", "GET_CONFIG"])
def test_a_backend_may_want_an_answer_before_the_first_connection_is_open(bench: Bench, name: str) -> None:
    def ask_first(backend: FakeBackend, message: Any) -> bytes:
        backend.ask("CONFIG_CHANGE_MSG")
        assert ack(backend) == 0
        return backend.answer(message)

    backend = bench.backend(script={name: ask_first})
    bench.watched(backend)
    assert backend.error is None
    until(lambda: bench.changes)


def test_a_flood_of_changes_is_coalesced(bench: Bench) -> None:
    backend = bench.backend()
    frontend = bench.frontend(backend)
    frontend.start_watching()
    for _ in range(60):
        backend.ask("CONFIG_CHANGE_MSG")
    bench.around.run()
    until(lambda: bench.changes)
    assert [ack(backend) for _ in range(60)] == [0] * 60
    assert len(bench.changes) == 1


def test_unread_acks_cost_the_device(bench: Bench) -> None:
    backend = bench.backend()
    bench.watched(backend)
    try:
        while not bench.lost:
            backend.ask("CONFIG_CHANGE_MSG")
    except BackendLost:
        until(lambda: bench.lost)
    assert "did not take a message" in bench.lost[0]


def test_ungated_request_costs_the_device(bench: Bench) -> None:
    backend = bench.backend()
    bench.watched(backend)
    with os.fdopen(os.memfd_create("map"), "rb") as file:
        backend.ask("SHMEM_MAP", Mmap(0, 0, 0, 4096, 0), [file.fileno()])
        until(lambda: bench.lost)
    assert "SHMEM_MAP without SHMEM" in bench.lost[0]


def test_unknown_request_is_refused_and_the_device_lives(bench: Bench) -> None:
    backend = bench.backend()
    frontend = bench.watched(backend)
    assert backend.requests is not None
    dance = Request(1006, "DANCE")
    backend.requests.send(encode_request(dance, Empty(), need_reply=True), (), monotonic() + 5)
    assert ack(backend, RequestTable("backend", (dance,))) == 95
    assert frontend.read_config(0, 1) == b"\0"


def test_backend_may_close_its_request_channel(bench: Bench) -> None:
    backend = bench.backend()
    frontend = bench.watched(backend)
    assert backend.requests is not None
    backend.requests.shutdown()
    until(lambda: frontend._link is not None and frontend._link.notices is None)
    assert frontend.read_config(0, 1) == b"\0" and not bench.lost


# -- loss --------------------------------------------------------------------------


def test_death_is_noticed(bench: Bench) -> None:
    backend = bench.backend()
    frontend = bench.watched(backend)
    frontend.activate(1 << 32, bench.queues())
    backend.channel.shutdown()
    until(lambda: bench.lost)
    assert bench.lost == ["the backend closed the connection"]
    assert backend.frontend_end.fileno() < 0, "what belongs to the connection is closed at once"
    with pytest.raises(BackendLost, match="closed the connection"):
        frontend.activate(1 << 32, bench.queues())
    frontend.reset()
    frontend.write_config(0, b"x")
    assert len(bench.lost) == 1


def test_close_wakes_a_waiting_thread(bench: Bench) -> None:
    frontend = bench.watched(bench.backend(script={("GET_CONFIG", 1): fake.silence}), deadline=60.0)
    got: list[bytes] = []
    waiter = threading.Thread(target=lambda: got.append(frontend.read_config(0, 2)))
    waiter.start()
    sleep(0.1)
    bench.around.stop()
    frontend.close()
    waiter.join(5)
    assert got == [b"\0\1"]


def test_closing_twice(bench: Bench) -> None:
    frontend = bench.frontend(bench.backend())
    frontend.close()
    frontend.close()
    with pytest.raises(BackendLost, match="device was closed"):
        frontend.activate(0, [])


# -- hostility ---------------------------------------------------------------------

HOSTILE: dict[str, tuple[fake.Action, str]] = {
    "silence": (fake.silence, "did not answer in time"),
    "end": (fake.hang_up, "the connection was closed"),
    "half a header": (fake.cut(5), "did not answer in time"),
    "header only": (fake.cut(12), "did not answer in time"),
    "half a payload": (fake.cut(15), "did not answer in time"),
    "end in the header": (fake.cut_and_hang_up(7), "in the middle of a message"),
    "end in the payload": (fake.cut_and_hang_up(13), "in the middle of a message"),
    "reply to another request": (fake.request_id(15), "reply to GET_PROTOCOL_FEATURES where"),
    "unknown request": (fake.request_id(4711), "reply to unknown request 4711"),
    "request 0": (fake.request_id(0), "reply to unknown request 0"),
    "no reply flag": (fake.flags(1), "flags 0x1"),
    "need_reply in a reply": (fake.flags(0xD), "flags 0xd"),
    "other version": (fake.flags(6), "flags 0x6"),
    "reserved flag": (fake.flags(0x15), "flags 0x15"),
    "short": (fake.size(4), "with 4 bytes of payload"),
    "long": (fake.size(1000), "with 1000 bytes of payload"),
    "huge": (fake.size(0xFFFFFFFF), "with 4294967295 bytes of payload"),
    "one descriptor": (fake.with_fds(1), "1 descriptors where 0 belong"),
    "32 descriptors": (fake.with_fds(32), "32 descriptors where 0 belong"),
    "33 descriptors": (fake.with_fds(33), "descriptors came with one message"),
    "noise": (fake.noise, "with flags 0x312e312f"),
}


def deadline(message: str) -> float:
    """Short only where a backend is silent: a busy machine answers late, too."""
    return SHORT if message.endswith("in time") else 10.0


FATAL_ACKS = {"status 1": (fake.status(1), "refused"), "status -1": (fake.status((1 << 64) - 1), "refused")}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("name", ["GET_FEATURES", "GET_QUEUE_NUM", "SET_BACKEND_REQ_FD"])
def test_hostile_at_start(bench: Bench, case: str, name: str) -> None:
    action, message = HOSTILE[case]
    backend = bench.backend(script={name: action})
    with pytest.raises(ConfigError, match=message) as caught:
        bench.frontend(backend, deadline=deadline(message))
    assert str(caught.value).startswith("dev: no vhost-user dialogue with backend: ")


@pytest.mark.parametrize("case", [*HOSTILE, *FATAL_ACKS])
@pytest.mark.parametrize("name", ["SET_FEATURES", "SET_MEM_TABLE", "SET_VRING_KICK", "SET_VRING_ENABLE"])
def test_hostile_at_activation(bench: Bench, case: str, name: str) -> None:
    action, message = (HOSTILE | FATAL_ACKS)[case]
    backend = bench.backend(script={name: action})
    frontend = bench.watched(backend, deadline=deadline(message))
    with pytest.raises(RemoteProtocolError, match=message):
        frontend.activate(1 << 32, bench.queues())
    until(lambda: bench.lost)
    assert len(bench.lost) == 1
    assert frontend.read_config(0, 2) == b"\0\1", "the last known bytes"


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("name", ["GET_VRING_BASE", "GET_CONFIG"])
def test_hostile_later(bench: Bench, case: str, name: str) -> None:
    action, message = HOSTILE[case]
    if case == "short" and name == "GET_VRING_BASE":
        action = fake.size(9)
    backend = bench.backend(script={("GET_CONFIG", 1): action, "GET_VRING_BASE": action})
    frontend = bench.watched(backend, deadline=deadline(message))
    frontend.activate(1 << 32, bench.queues())
    if name == "GET_CONFIG":
        assert frontend.read_config(0, 2) == b"\0\1"
    else:
        frontend.reset()
    until(lambda: bench.lost)


EVERY_MESSAGE = [
    ("SET_OWNER", False),
    ("GET_FEATURES", False),
    ("GET_PROTOCOL_FEATURES", False),
    ("SET_PROTOCOL_FEATURES", False),
    ("SET_BACKEND_REQ_FD", False),
    ("GET_QUEUE_NUM", False),
    ("GET_CONFIG", False),
    ("SET_FEATURES", True),
    ("SET_MEM_TABLE", True),
    ("SET_VRING_NUM", True),
    ("GET_INFLIGHT_FD", True),
    ("SET_INFLIGHT_FD", True),
    ("SET_VRING_BASE", True),
    ("SET_VRING_ADDR", True),
    ("SET_VRING_CALL", True),
    ("SET_VRING_KICK", True),
    ("SET_VRING_ENABLE", True),
]


@pytest.mark.parametrize(("name", "started"), EVERY_MESSAGE)
def test_death_at_each_message(bench: Bench, name: str, started: bool) -> None:
    backend = bench.backend(script={name: fake.hang_up})
    if not started:
        with pytest.raises(ConfigError, match="no vhost-user dialogue"):
            bench.frontend(backend)
        return
    frontend = bench.watched(backend)
    with pytest.raises(BackendLost):
        frontend.activate(1 << 32, bench.queues())
    until(lambda: bench.lost)
    assert backend.names[-1] == name


def test_wrong_ring_in_the_reply_to_get_vring_base(bench: Bench) -> None:
    frontend = bench.watched(bench.backend(script={"GET_VRING_BASE": fake.reply(VringState(5, 0))}))
    frontend.activate(1 << 32, bench.queues())
    frontend.reset()
    until(lambda: bench.lost)
    assert "ring 0 was answered for ring 5" in bench.lost[0]


@pytest.mark.parametrize(
    "config", [Config(4, 0, bytes(16)), Config(0, 0, bytes(8)), Config(0, 0, bytes(300))]
)
def test_wrong_range_in_the_reply_to_get_config(bench: Bench, config: Config) -> None:
    frontend = bench.watched(bench.backend(script={("GET_CONFIG", 1): fake.reply(config)}))
    assert frontend.read_config(0, 2) == b"\0\1"
    until(lambda: bench.lost)
    assert "GET_CONFIG of 16 bytes was answered with" in bench.lost[0]


def test_slow_but_right(bench: Bench) -> None:
    backend = bench.backend(script={name: fake.drip for name, _ in EVERY_MESSAGE if name != "SET_OWNER"})
    frontend = bench.frontend(backend)
    frontend.activate(1 << 32, bench.queues())
    assert frontend.read_config(1, 1) == b"\1"


def test_answering_twice_is_noticed_at_the_next_request(bench: Bench) -> None:
    frontend = bench.watched(bench.backend(script={"SET_FEATURES": fake.twice}))
    with pytest.raises(RemoteProtocolError, match="reply to SET_FEATURES where the reply to SET_MEM_TABLE"):
        frontend.activate(1 << 32, bench.queues())


def test_protocol_features_that_do_not_exist_are_not_acked(bench: Bench) -> None:
    backend = bench.backend(protocol=(1 << 64) - 1)
    bench.frontend(backend)
    acked = ACKED | P.SHMEM | P.BACKEND_SEND_FD | P.RESET_DEVICE | P.CONFIGURE_MEM_SLOTS | P.STATUS
    assert ("SET_PROTOCOL_FEATURES", U64(acked), 0) in backend.seen


@pytest.mark.parametrize("count", [0, 1])
def test_backend_with_too_few_queues(bench: Bench, count: int) -> None:
    with pytest.raises(ConfigError, match=f"2 queues, but the backend has {count}"):
        bench.frontend(bench.backend(queues=count))


HEADERS = st.builds(
    HEADER.pack,
    st.integers(0, 45) | st.integers(0, 0xFFFFFFFF),
    st.sampled_from([5, 1, 9]) | st.integers(0, 0xFFFFFFFF),
    st.sampled_from([0, 8, 12, 28, 40]) | st.integers(0, 0xFFFFFFFF),
)


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from([name for name, _ in EVERY_MESSAGE] + ["GET_VRING_BASE", "SET_CONFIG"]),
    answer=st.binary(max_size=64) | st.builds(bytes.__add__, HEADERS, st.binary(max_size=64)),
)
def test_any_answer_costs_the_device_at_most(name: str, answer: bytes) -> None:
    """Whatever comes back: errors of the documented classes, answers to the guest, nothing left open."""

    def say(backend: FakeBackend, message: Message) -> bytes:
        backend.responder.answering = None
        return answer

    with no_new_fds():
        bench = Bench()
        try:
            frontend = bench.frontend(bench.backend(script={name: say}), deadline=0.05)
            frontend.activate(1 << 32, bench.queues())
            assert len(frontend.read_config(0, 4)) == 4
            frontend.write_config(0, b"x")
            frontend.reset()
        except (ConfigError, RemoteProtocolError):
            pass
        finally:
            bench.close()
