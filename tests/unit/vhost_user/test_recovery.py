"""A frontend that loses its backend and finds another one, with scripted backends for both.

In one file because every case plays losses on the same rig.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from fakes import backend as fake
from fakes.backend import FakeBackend, FakeKind, Surroundings, no_new_fds

from pyvmm import log
from pyvmm.errors import BackendLost, ConfigError, RemoteProtocolError
from pyvmm.loop import EventLoop
from pyvmm.vhost_user.codec import Message
from pyvmm.vhost_user.endpoint import Endpoint, FdEndpoint, ListeningEndpoint
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.vhost_user.messages import ProtocolFeature as P
from pyvmm.vhost_user.payloads import U64, Config, Inflight, Mmap, VringState
from pyvmm.vhost_user.recovery import FAIL, RECONNECT, STOP
from pyvmm.vhost_user.trace import Trace
from pyvmm.virtio.queue import QueueSetup

SIZE = 64
FEATURES = 1 << 32 | 1
IN_ORDER = 1 << 35
USED, AVAIL = (0x3000, 0x7000), (0x2000, 0x6000)  # of the two queues
SHORT = 0.3  # seconds: the deadline where a backend is silent


class Process:
    """The process of a backend, which lives until it is killed."""

    def __init__(self, stubborn: bool = False) -> None:
        self.killed = False
        self._stubborn = stubborn

    def ended(self) -> bool:
        return self.killed and not self._stubborn

    def destroy(self, seconds: float) -> bool:
        self.killed = True
        return self.ended()


class Host(Endpoint):
    """Where one backend after the other answers, as a test puts them there."""

    process: Any = None  # whoever holds the latest connection
    explaining: list[Callable[[str], None]] | None = None  # who waits for the reason, where it takes time

    def __init__(self, *backends: FakeBackend) -> None:
        super().__init__("backend")
        self.waiting = list(backends)
        self.looks: list[float] = []

    def connect(self, timeout: float) -> socket.socket:
        return self.waiting.pop(0).frontend_end

    def holder(self) -> Any:
        return self.process

    def explain_later(self, loop: EventLoop, then: Callable[[str], None]) -> None:
        if self.explaining is None:
            super().explain_later(loop, then)
        else:
            self.explaining.append(then)

    def reconnect(self) -> socket.socket | None:
        self.looks.append(monotonic())
        return self.waiting.pop(0).frontend_end if self.waiting else None


class Rig:
    """A frontend at a `Host`, in a loop that runs, and what it tells."""

    def __init__(self) -> None:
        self.around = Surroundings()
        self.backends: list[FakeBackend] = []
        self.host = Host()
        self.told: list[str] = []
        self.changes: list[None] = []
        self.eventfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(6)]
        self.frontend: Frontend | None = None

    def backend(self, **options: Any) -> FakeBackend:
        self.backends.append(FakeBackend(**options))
        return self.backends[-1]

    def put(self, **options: Any) -> FakeBackend:
        """The next backend to be found."""
        backend = self.backend(**options)
        self.host.waiting.append(backend)
        return backend

    def start(self, endpoint: Endpoint | None = None, **options: Any) -> Frontend:
        options = {"deadline": 5.0, "name": "dev", "on_loss": RECONNECT, **options}
        self.frontend = frontend = Frontend(
            endpoint or self.host, FakeKind(), (SIZE, 128), None, self.around.ram, self.around.loop, **options
        )
        frontend.on_away = lambda: self.told.append("away")
        frontend.on_back = lambda: self.told.append("back")
        frontend.on_lost = self.told.append
        frontend.on_config_change = lambda: self.changes.append(None)
        frontend.start_watching()
        self.around.run()
        return frontend

    def running(self, **options: Any) -> tuple[Frontend, FakeBackend]:
        """A frontend whose two queues run, and its backend."""
        first = self.put(**options)
        frontend = self.start()
        frontend.activate(FEATURES, self.queues())
        return frontend, first

    def queues(self) -> list[QueueSetup]:
        fds = zip(self.eventfds[:2], self.eventfds[2:4], strict=True)
        return [
            QueueSetup(i, SIZE, 0x1000 + i * 0x4000, AVAIL[i], USED[i], kick, call)
            for i, (kick, call) in enumerate(fds)
        ]

    def rings(self, index: int, made: list[int], used: list[int]) -> None:
        """Put these heads into a queue's rings, from index 0 on."""
        ram = self.around.ram.fd
        for slot, head in enumerate(made):
            os.pwrite(ram, struct.pack("<H", head), AVAIL[index] + 4 + slot % SIZE * 2)
        for slot, head in enumerate(used):
            os.pwrite(ram, struct.pack("<II", head, 0), USED[index] + 4 + slot % SIZE * 8)
        os.pwrite(ram, struct.pack("<H", len(made) & 0xFFFF), AVAIL[index] + 2)
        os.pwrite(ram, struct.pack("<H", len(used) & 0xFFFF), USED[index] + 2)

    def lose(self, backend: FakeBackend, times: int = 1) -> None:
        """The backend dies, and that is noticed."""
        wanted = self.told.count("away") + 1
        backend.channel.shutdown()
        until(lambda: self.told.count("away") == wanted)

    def until_back(self, times: int = 1) -> None:
        until(lambda: self.told.count("back") == times)

    def until_reconnected(self) -> None:
        """A new backend is the device's, whether it does anything or not, and that has been told."""
        frontend, told = self.frontend, threading.Event()
        assert frontend is not None
        until(lambda: frontend._link is not None and frontend._recovery._thread is None)
        self.around.loop.call_soon_threadsafe(told.set)
        assert told.wait(10)

    def close(self) -> None:
        self.around.stop()
        if self.frontend is not None:
            self.frontend.close()
        for backend in self.backends:
            backend.close()
        for fd in self.eventfds:
            os.close(fd)
        self.around.close()


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, "it did not happen in time"
        sleep(0.002)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.fixture
def rig() -> Iterator[Rig]:
    before = threads()
    with no_new_fds():
        rig = Rig()
        yield rig
        rig.close()
    until(lambda: threads() <= before)


def payloads(backend: FakeBackend, name: str) -> list[Any]:
    return [payload for seen, payload, _ in backend.seen if seen == name]


def signalled(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


# -- the way back ------------------------------------------------------------------


def test_it_goes_on_where_it_stopped(rig: Rig) -> None:
    frontend, first = rig.running()
    rig.rings(0, made=list(range(12)), used=list(range(9)))
    rig.rings(1, made=[], used=[])
    second = rig.put()
    rig.lose(first)
    rig.until_back()
    start = first.names.index("SET_FEATURES")
    again = [name for name in second.names[second.names.index("SET_FEATURES") :] if name != "GET_INFLIGHT_FD"]
    assert again == [name for name in first.names[start:] if name != "GET_INFLIGHT_FD"]
    assert second.names[: second.names.index("SET_FEATURES")] == first.names[:start]
    assert payloads(second, "SET_VRING_BASE") == [VringState(0, 9), VringState(1, 0)]
    assert payloads(second, "SET_FEATURES") == payloads(first, "SET_FEATURES")
    assert all(signalled(fd) for fd in rig.eventfds[:4]), "kicks and calls may have been missed"
    assert rig.told == ["away", "back"]
    assert frontend.read_config(1, 2) == b"\1\2"
    frontend.reset()
    assert second.names[-2:] == ["GET_VRING_BASE"] * 2


def test_the_inflight_buffer_is_kept(rig: Rig) -> None:
    frontend, first = rig.running()
    second = rig.put()
    rig.lose(first)
    rig.until_back()
    assert "GET_INFLIGHT_FD" not in second.names
    assert payloads(second, "SET_INFLIGHT_FD") == payloads(first, "SET_INFLIGHT_FD")
    (made,) = [fd for fd in first.fds if "inflight" in os.readlink(f"/proc/self/fd/{fd}")][:1]
    kept = [fd for fd in second.fds if "inflight" in os.readlink(f"/proc/self/fd/{fd}")]
    assert [os.fstat(fd).st_ino for fd in kept] == [os.fstat(made).st_ino]
    frontend.reset()
    frontend.activate(FEATURES, rig.queues())
    assert "GET_INFLIGHT_FD" in second.names, "a reset forgets what was in flight"


def test_a_new_backend_may_track_what_the_lost_one_did_not(rig: Rig) -> None:
    _, first = rig.running(protocol=fake.PROTOCOL & ~P.INFLIGHT_SHMFD)
    assert "GET_INFLIGHT_FD" not in first.names
    second = rig.put()
    rig.lose(first)
    rig.until_back()
    assert {"GET_INFLIGHT_FD", "SET_INFLIGHT_FD"} <= set(second.names)


MESSAGES = (
    *("SET_OWNER", "GET_FEATURES", "GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES", "SET_BACKEND_REQ_FD"),
    *("GET_QUEUE_NUM", "GET_CONFIG", "SET_FEATURES", "SET_MEM_TABLE", "SET_VRING_NUM", "SET_INFLIGHT_FD"),
    *("SET_VRING_BASE", "SET_VRING_ADDR", "SET_VRING_CALL", "SET_VRING_KICK", "SET_VRING_ENABLE"),
)
UNANSWERED = ("SET_OWNER", "SET_PROTOCOL_FEATURES")
FAILURES = [(name, "death", fake.hang_up) for name in MESSAGES]
FAILURES += [(name, "noise", fake.noise) for name in MESSAGES if name not in UNANSWERED]


@pytest.mark.parametrize(("name", "how", "action"), FAILURES)
def test_a_new_backend_that_fails_at_a_message_is_followed_by_another(
    rig: Rig, capfd: pytest.CaptureFixture[str], name: str, how: str, action: fake.Action
) -> None:
    _, first = rig.running()
    second = rig.put(script={name: action})
    third = rig.put()
    rig.lose(first)
    rig.until_back()
    assert second.names[-1] == name or how == "noise"
    assert payloads(third, "SET_VRING_ENABLE") == [VringState(0, 1), VringState(1, 1)]
    assert "a backend came and cannot be used" in capfd.readouterr().err


def asks_first(status: int = 0) -> fake.Action:
    """A backend that wants an answer to a request of its own before it answers ours."""

    def action(backend: FakeBackend, message: Message) -> bytes:
        assert backend.status_of("CONFIG_CHANGE_MSG") == status
        return backend.answer(message)

    return action


ASKING = [name for name in MESSAGES if MESSAGES.index(name) >= MESSAGES.index("SET_BACKEND_REQ_FD")]


@pytest.mark.parametrize("name", ASKING)
def test_a_new_backend_may_want_an_answer_before_it_gives_one(rig: Rig, name: str) -> None:
    _, first = rig.running()
    second = rig.put(script={name: asks_first()})
    rig.lose(first)
    rig.until_back()
    until(lambda: rig.changes)
    assert second.error is None and len(rig.host.looks) == 1


def test_what_a_new_backend_asks_does_not_give_it_more_time(rig: Rig) -> None:
    def babble(backend: FakeBackend, message: Message) -> bytes:
        while True:
            backend.status_of("CONFIG_CHANGE_MSG")

    first = rig.put()
    rig.start(deadline=SHORT)
    second = rig.put(script={"GET_QUEUE_NUM": babble})
    rig.lose(first)
    begin = monotonic()
    rig.put()
    rig.until_back()
    assert monotonic() - begin < SHORT * 5 and second.error


def test_nonsense_from_a_new_backend_in_the_other_direction(
    rig: Rig, capfd: pytest.CaptureFixture[str]
) -> None:
    def shout(backend: FakeBackend, message: Message) -> bytes:
        assert backend.requests is not None
        backend.requests.send(b"no message at all", deadline=monotonic() + 5)
        return fake.silence(backend, message)

    _, first = rig.running()
    rig.put(script={"SET_FEATURES": shout})
    rig.put()
    rig.lose(first)
    rig.until_back()
    assert "cannot be used: SET_FEATURES: the backend's own request: " in capfd.readouterr().err


def test_a_new_backend_may_end_its_requests_early(rig: Rig) -> None:
    def end(backend: FakeBackend, message: Message) -> bytes:
        assert backend.requests is not None
        backend.requests.shutdown()
        sleep(0.05)
        return backend.answer(message)

    _, first = rig.running()
    rig.put(script={"GET_QUEUE_NUM": end})
    rig.lose(first)
    rig.until_back()
    assert len(rig.host.looks) == 1


def test_what_a_new_backend_mapped_goes_with_it(rig: Rig) -> None:
    """It maps before the device is its own, and then it is not fit to have it."""
    shared: dict[str, Any] = {
        "protocol": fake.PROTOCOL | P.SHMEM | P.BACKEND_SEND_FD,
        "shared_memory": {0: 4096},
    }
    statuses, there = [], Places()

    def map_first(backend: FakeBackend, message: Message) -> None:
        backend.fds.append(fd := os.memfd_create("shared"))
        os.ftruncate(fd, 4096)
        statuses.append(backend.status_of("SHMEM_MAP", Mmap(0, 0, 0, 4096, 1), [fd]))
        assert there

    frontend, first = rig.running(**shared)
    frontend.mappings.attach(there)
    rig.put(script={"GET_CONFIG": map_first}, **shared)
    rig.lose(first)
    until(lambda: statuses and not there)
    assert statuses == [0] and len(frontend.mappings) == 0


class Places(set[tuple[int, int]]):
    """A mapper that notes where something is."""

    def map(self, shmid: int, offset: int, fd: int, fd_offset: int, length: int, writable: bool) -> None:
        self.add((shmid, offset))

    def unmap(self, shmid: int, offset: int) -> None:
        self.remove((shmid, offset))

    def intact(self, shmid: int, offset: int) -> bool:
        return True


UNFIT = {
    "features": ({"virtio": fake.VIRTIO & ~1}, "does not offer the feature bits 0x1, which the driver uses"),
    "queues": ({"queues": 1}, "2 queues, but the backend has 1"),
    "config": ({"config": bytes(8)}, "configuration space has 8 bytes, that of the one before 16"),
    "no config": ({"protocol": fake.PROTOCOL & ~P.CONFIG}, "configuration space has no bytes"),
    "no in-flight": ({"protocol": fake.PROTOCOL & ~P.INFLIGHT_SHMFD}, "it has no INFLIGHT_SHMFD"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_backend_that_does_not_fit_is_refused(
    rig: Rig, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    options, message = UNFIT[case]
    _, first = rig.running()
    second = rig.put(**options)
    rig.lose(first)
    until(lambda: not second._thread.is_alive())
    assert "SET_VRING_KICK" not in second.names and rig.told == ["away"]
    rig.put()
    rig.until_back()
    errors = capfd.readouterr().err
    assert errors.count(message) == 1 and "reconnected after" in errors


def test_features_that_the_driver_settled_on_must_be_there_before_it_starts_the_device(rig: Rig) -> None:
    first = rig.put()
    frontend = rig.start()
    assert not frontend.agree(FEATURES | 1 << 27)
    assert frontend.agree(FEATURES)
    second = rig.put(virtio=fake.VIRTIO & ~1)
    rig.lose(first)
    until(lambda: not second._thread.is_alive())
    frontend.activate(FEATURES, rig.queues())
    third = rig.put()
    rig.until_back()
    assert payloads(third, "SET_FEATURES") == [U64(FEATURES | 1 << 30)] and rig.told == ["away", "back"]


@pytest.mark.parametrize("forget", [Frontend.reset, lambda frontend: frontend.agree(0)])
def test_features_that_no_driver_insists_on_any_more(rig: Rig, forget: Callable[[Frontend], object]) -> None:
    first = rig.put()
    frontend = rig.start()
    assert frontend.agree(FEATURES)
    forget(frontend)
    rig.put(virtio=fake.VIRTIO & ~1)
    rig.lose(first)
    rig.until_back()
    assert not frontend.agree(FEATURES), "a driver that settles on what it read before"
    assert frontend.agree(FEATURES & ~1)


@pytest.mark.parametrize("case", UNFIT)
def test_what_would_be_the_same_again_is_not_looked_for(rig: Rig, case: str) -> None:
    options, message = UNFIT[case]
    rig.host.same_again = True
    frontend, first = rig.running()
    rig.put(**options)
    rig.lose(first)
    until(lambda: len(rig.told) == 2)
    assert message in rig.told[1]
    with pytest.raises(BackendLost):
        frontend.activate(FEATURES, rig.queues())


# -- what the driver does meanwhile ------------------------------------------------


def test_a_driver_that_resets_meanwhile(rig: Rig) -> None:
    frontend, first = rig.running()
    rig.lose(first)
    frontend.reset()
    second = rig.put()
    rig.until_back()
    assert "SET_FEATURES" not in second.names
    frontend.activate(FEATURES, rig.queues())
    assert payloads(second, "SET_VRING_BASE") == [VringState(0, 0), VringState(1, 0)]


def test_a_driver_that_starts_the_device_meanwhile(rig: Rig) -> None:
    first = rig.put()
    frontend = rig.start()
    rig.lose(first)
    frontend.activate(FEATURES, rig.queues()[:1])
    second = rig.put()
    rig.until_back()
    assert payloads(second, "SET_VRING_ENABLE") == [VringState(0, 1)]


def test_a_driver_that_starts_it_otherwise_meanwhile(rig: Rig) -> None:
    frontend, first = rig.running()
    rig.rings(0, made=[1, 2, 3], used=[3])  # the old rings' business
    rig.lose(first)
    frontend.reset()
    rig.rings(0, made=[], used=[])
    frontend.activate(1 << 32, [rig.queues()[0].replace(size=32)])
    second = rig.put()
    rig.until_back()
    assert payloads(second, "SET_VRING_NUM") == [VringState(0, 32)]
    assert payloads(second, "SET_VRING_BASE") == [VringState(0, 0)]
    assert "GET_INFLIGHT_FD" in second.names, "the buffer of before the reset is gone"


def test_an_interrupt_that_is_moved_meanwhile(rig: Rig) -> None:
    frontend, first = rig.running()
    rig.lose(first)
    frontend.set_call(0, rig.eventfds[4])
    frontend.set_call(1, None)
    second = rig.put()
    rig.until_back()
    calls = [(payload.index, count) for name, payload, count in second.seen if name == "SET_VRING_CALL"]
    assert calls == [(0, 1), (1, 0)]
    assert signalled(rig.eventfds[4])


def test_configuration_meanwhile(rig: Rig) -> None:
    frontend, first = rig.running()
    frontend.write_config(2, b"w")
    rig.lose(first)
    begin = monotonic()
    assert frontend.read_config(1, 3) == b"\1w\3"
    frontend.write_config(5, b"xy")
    assert frontend.read_config(4, 4) == b"\4xy\7"
    assert monotonic() - begin < 1.0
    second = rig.put()
    rig.until_back()
    assert payloads(second, "SET_CONFIG") == [Config(2, 0, b"w"), Config(5, 0, b"xy")]
    assert frontend.read_config(4, 4) == b"\4xy\7"
    assert not rig.changes


def test_a_reset_forgets_what_was_written(rig: Rig) -> None:
    frontend, first = rig.running()
    frontend.write_config(2, b"w")
    frontend.reset()
    second = rig.put()
    rig.lose(first)
    rig.until_back()
    assert "SET_CONFIG" not in second.names


def test_another_configuration_is_announced(rig: Rig) -> None:
    frontend, first = rig.running()
    rig.put(config=bytes(range(100, 116)))
    rig.lose(first)
    until(lambda: rig.changes)
    assert frontend.read_config(0, 2) == bytes([100, 101])


def test_a_backend_that_dies_while_it_is_started(rig: Rig) -> None:
    """The driver is not told of a failure: what it wants is started as soon as it can be."""
    rig.put(script={"SET_VRING_KICK": fake.hang_up})
    frontend = rig.start()
    second = rig.put()
    frontend.activate(FEATURES, rig.queues())
    rig.until_back()
    assert payloads(second, "SET_VRING_ENABLE") == [VringState(0, 1), VringState(1, 1)]


class Gate:
    """An action that waits until it is opened, or for long."""

    def __init__(self) -> None:
        self._reached, self._open = threading.Event(), threading.Event()

    def __call__(self, backend: FakeBackend, message: Message) -> bytes:
        self._reached.set()
        self._open.wait(30)
        return backend.answer(message)

    @contextmanager
    def reached(self) -> Iterator[None]:
        """While the backend waits there."""
        assert self._reached.wait(10)
        yield
        self._open.set()


LONG = 60.0  # seconds: a deadline for which nobody waits


def test_a_new_backend_has_the_deadline_for_each_answer(rig: Rig) -> None:
    def slow(backend: FakeBackend, message: Message) -> bytes:
        sleep(SHORT * 0.3)
        return backend.answer(message)

    first = rig.put()
    frontend = rig.start(deadline=SHORT)
    frontend.activate(FEATURES, rig.queues())
    rig.put(script=dict.fromkeys(MESSAGES, slow))
    rig.lose(first)
    rig.until_back()
    assert len(rig.host.looks) == 1


def test_nobody_waits_for_a_silent_new_backend(rig: Rig) -> None:
    first = rig.put()
    frontend = rig.start(deadline=LONG)
    frontend.activate(FEATURES, rig.queues())
    second = rig.put(script={"SET_VRING_ADDR": fake.silence})
    rig.lose(first)
    until(lambda: "SET_VRING_ADDR" in second.names)
    begin = monotonic()
    assert frontend.read_config(0, 1) == b"\0"
    frontend.write_config(0, b"x")
    frontend.set_call(0, rig.eventfds[4])
    frontend.reset()
    frontend.activate(FEATURES, rig.queues())
    third = rig.put()
    rig.until_back()
    assert monotonic() - begin < LONG / 4
    assert not second._thread.is_alive(), "the reset has ended that dialogue"
    assert "GET_INFLIGHT_FD" in third.names, "the buffer is the previous life's"
    assert payloads(third, "SET_VRING_BASE") == [VringState(0, 0), VringState(1, 0)]


def test_a_start_anew_is_not_told_as_a_fault_of_the_backend(
    rig: Rig, capfd: pytest.CaptureFixture[str]
) -> None:
    rig.host.same_again = True
    frontend, first = rig.running()
    gate = Gate()
    rig.put(script={"SET_VRING_ENABLE": gate})
    rig.lose(first)
    with gate.reached():
        frontend.reset()
        rig.put()
        rig.until_back()
    assert "cannot be used" not in capfd.readouterr().err


def test_what_the_driver_does_while_a_new_backend_is_told_is_told_next(rig: Rig) -> None:
    frontend, first = rig.running()
    frontend.write_config(2, b"w")
    gate = Gate()
    second = rig.put(script={("SET_VRING_KICK", 1): gate})
    rig.lose(first)
    with gate.reached():
        frontend.set_call(0, rig.eventfds[4])
        frontend.write_config(5, b"xy")
        assert frontend.read_config(4, 4) == b"\4xy\7" and not signalled(rig.eventfds[4])
    rig.until_back()
    assert [name for name in second.names if name == "SET_VRING_CALL"] == ["SET_VRING_CALL"] * 3
    assert second.config[2:7] == b"w\3\4xy"
    assert signalled(rig.eventfds[4])
    assert frontend.read_config(4, 4) == b"\4xy\7" and not rig.changes


def test_a_device_that_is_started_while_a_new_backend_is_told_what_was_written(rig: Rig) -> None:
    first = rig.put()
    frontend = rig.start()
    frontend.write_config(2, b"w")
    gate = Gate()
    second = rig.put(script={"SET_CONFIG": gate})
    rig.lose(first)
    with gate.reached():
        frontend.activate(FEATURES, rig.queues()[:1])
        assert not signalled(rig.eventfds[0])
    rig.until_back()
    assert payloads(second, "SET_VRING_ENABLE") == [VringState(0, 1)] and len(rig.host.looks) == 1


def test_a_reset_lets_a_new_backend_go_on_that_knows_no_rings(rig: Rig) -> None:
    frontend, first = rig.running()
    gate = Gate()
    second = rig.put(script={"GET_QUEUE_NUM": gate})
    rig.lose(first)
    with gate.reached():
        frontend.reset()
    rig.until_back()
    assert "SET_FEATURES" not in second.names and len(rig.host.looks) == 1


def test_a_reset_forgets_what_was_written_while_a_new_backend_is_told_of_it(rig: Rig) -> None:
    first = rig.put()
    frontend = rig.start()
    frontend.write_config(2, b"w")
    gate = Gate()
    second = rig.put(script={"SET_CONFIG": gate})
    rig.lose(first)
    with gate.reached():
        frontend.reset()
    rig.until_back()
    third = rig.put()
    rig.lose(second)
    rig.until_back(2)
    assert "SET_CONFIG" not in third.names


def test_features_that_the_driver_settles_on_while_a_new_backend_comes(rig: Rig) -> None:
    first = rig.put()
    frontend = rig.start()
    frontend.write_config(2, b"w")
    gate = Gate()
    rig.put(virtio=fake.VIRTIO & ~1, script={"SET_CONFIG": gate})
    rig.lose(first)
    with gate.reached():
        assert frontend.agree(FEATURES)
    third = rig.put()
    rig.until_back()
    assert "SET_CONFIG" in third.names


# -- who has guest memory ----------------------------------------------------------


@pytest.mark.parametrize("policy", [FAIL, RECONNECT])
@pytest.mark.parametrize("silent", ["SET_VRING_ENABLE", "GET_VRING_BASE"])
def test_a_process_that_does_not_stop_is_killed(
    rig: Rig, capfd: pytest.CaptureFixture[str], policy: str, silent: str
) -> None:
    process = rig.host.process = Process()
    rig.put(script={(silent, 2 if silent == "SET_VRING_ENABLE" else 0): fake.silence})
    frontend = rig.start(deadline=SHORT, on_loss=policy)
    frontend.activate(FEATURES, rig.queues())
    frontend.reset()
    assert process.killed
    assert "dev: the lost backend is killed, lest it write to guest memory" in capfd.readouterr().err


@pytest.mark.parametrize("policy", [FAIL, RECONNECT])
def test_a_process_that_was_lost_before_is_killed_at_the_reset(rig: Rig, policy: str) -> None:
    process = rig.host.process = Process()
    first = rig.put()
    frontend = rig.start(on_loss=policy)
    frontend.activate(FEATURES, rig.queues())
    first.channel.shutdown()
    until(lambda: rig.told)
    assert not process.killed, "it may write what it has to a disk, and end in order"
    frontend.reset()
    assert process.killed


def test_a_process_that_stops_in_time_lives_on(rig: Rig) -> None:
    process = rig.host.process = Process()
    frontend, _ = rig.running()
    frontend.reset()
    assert not process.killed


def test_the_one_that_got_memory_last_is_killed(rig: Rig) -> None:
    first = rig.put()
    frontend = rig.start(deadline=SHORT)
    frontend.activate(FEATURES, rig.queues())
    process = rig.host.process = Process()
    second = rig.put(script={"SET_VRING_KICK": fake.silence})
    rig.lose(first)
    until(lambda: not second._thread.is_alive())
    rig.host.process = fresh = Process()
    gate = Gate()
    rig.put(script={"GET_QUEUE_NUM": gate})
    with gate.reached():
        frontend.reset()
        assert process.killed and not fresh.killed


def test_one_that_is_told_of_the_rings_is_killed_at_a_reset(rig: Rig) -> None:
    frontend, first = rig.running()
    process = rig.host.process = Process()
    gate = Gate()
    rig.put(script={"SET_VRING_KICK": gate})
    rig.lose(first)
    with gate.reached():
        frontend.reset()
        assert process.killed


def test_one_that_knows_no_rings_lives_on(rig: Rig) -> None:
    first = rig.put()
    frontend = rig.start()
    frontend.write_config(2, b"w")
    process = rig.host.process = Process()
    gate = Gate()
    rig.put(script={"SET_CONFIG": gate})
    rig.lose(first)
    with gate.reached():
        frontend.reset()
    rig.until_back()
    assert not process.killed


def test_one_that_comes_during_a_reset_lives_on(rig: Rig) -> None:
    class Slow(Process):
        def ended(self) -> bool:
            if not self.killed and len(rig.backends) == 2:
                go_on.set()
                rig.until_back()
            return super().ended()

    go_on = threading.Event()
    process = rig.host.process = Slow()
    frontend, first = rig.running()

    def wait(backend: FakeBackend, message: Message) -> bytes:
        go_on.wait(10)
        return backend.answer(message)

    second = rig.put(script={"GET_QUEUE_NUM": wait})
    rig.host.process = fresh = Process()
    rig.lose(first)
    until(lambda: "GET_QUEUE_NUM" in second.names)
    frontend.reset()
    assert process.killed and not fresh.killed


def test_a_process_that_cannot_be_killed_is_told(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    rig.host.process = Process(stubborn=True)
    frontend, first = rig.running()
    rig.lose(first)
    frontend.reset()
    assert "dev: it does not end within 5 s, and may write to memory later" in capfd.readouterr().err


def test_when_the_machine_ends_a_process_gets_its_time(rig: Rig) -> None:
    process = rig.host.process = Process()
    frontend, _ = rig.running(script={"GET_VRING_BASE": fake.silence})
    resetting = threading.Thread(target=frontend.reset)
    resetting.start()
    until(lambda: "GET_VRING_BASE" in rig.backends[0].names)
    frontend.interrupt()
    resetting.join()
    assert not process.killed


# -- which requests are left -------------------------------------------------------

NO_TRACKING = fake.PROTOCOL & ~P.INFLIGHT_SHMFD
WRAP = SIZE * 3
RINGS: dict[str, tuple[list[int], list[int], bool]] = {
    "nothing ever": ([], [], True),
    "nothing under way": ([1, 2, 3], [2, 3, 1], True),
    "in order": ([1, 2, 3, 4], [1, 2], True),
    "overtaken and caught up": ([1, 2, 3, 4], [2, 1], True),
    "overtaken": ([1, 2, 3, 4], [2], False),
    "overtaken once, a while ago": ([1, 2, 3, 4, 5, 6], [2, 3, 4, 5], False),
    "in order, around the ring": ([i % 40 for i in range(WRAP)], [i % 40 for i in range(WRAP - 5)], True),
    "overtaken, around the ring": (
        [i % 40 for i in range(WRAP)],
        [*(i % 40 for i in range(WRAP - 6)), (WRAP - 4) % 40],
        False,
    ),
    "all under way": (list(range(SIZE)), [], True),
}


@pytest.mark.parametrize("case", RINGS)
def test_the_device_is_started_only_if_it_is_known_what_is_left(
    rig: Rig, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    made, used, known = RINGS[case]
    frontend, first = rig.running(protocol=NO_TRACKING)
    rig.rings(1, made, used)
    second = rig.put(protocol=NO_TRACKING)
    rig.lose(first)
    rig.until_reconnected()
    assert ("the device waits until the guest resets it" in capfd.readouterr().err) != known
    if known:
        assert rig.told == ["away", "back"]
        assert VringState(1, len(used) & 0xFFFF) in payloads(second, "SET_VRING_BASE")
        return
    assert "SET_VRING_KICK" not in second.names and rig.told == ["away"]
    frontend.reset()
    rig.rings(1, [], [])
    frontend.activate(FEATURES, rig.queues())
    assert payloads(second, "SET_VRING_BASE") == [VringState(0, 0), VringState(1, 0)]


def test_a_device_that_waits_for_its_reset_does_so_over_further_losses(
    rig: Rig, capfd: pytest.CaptureFixture[str]
) -> None:
    frontend, backend = rig.running(protocol=NO_TRACKING)
    rig.rings(1, [1, 2, 3, 4], [2])
    for _ in range(2):
        rig.lose(backend)
        backend = rig.put(protocol=NO_TRACKING)
        rig.until_reconnected()
        assert "the device waits until the guest resets it" in capfd.readouterr().err
    assert "SET_FEATURES" not in backend.names and rig.told == ["away", "away"]
    frontend.reset()
    rig.rings(1, [], [])
    third = rig.put(protocol=NO_TRACKING)
    rig.lose(backend)
    rig.until_back()
    frontend.activate(FEATURES, rig.queues())
    assert payloads(third, "SET_VRING_BASE") == [VringState(0, 0), VringState(1, 0)]


@pytest.mark.parametrize("tracked", [False, True])
def test_order_does_not_matter_when_it_is_promised_or_tracked(rig: Rig, tracked: bool) -> None:
    protocol = fake.PROTOCOL if tracked else NO_TRACKING
    options: dict[str, Any] = {"protocol": protocol, "virtio": fake.VIRTIO | IN_ORDER}
    first = rig.put(**options)
    frontend = rig.start()
    frontend.activate(FEATURES | (0 if tracked else IN_ORDER), rig.queues())
    rig.rings(1, [1, 2, 3, 4], [2])
    second = rig.put(**options)
    rig.lose(first)
    rig.until_back()
    assert VringState(1, 1) in payloads(second, "SET_VRING_BASE")


def buffer(
    size: int, offset: int = 0, *, length: int = 4096, fds: int = 1, pipe: bool = False
) -> fake.Action:
    """An answer to GET_INFLIGHT_FD."""

    def action(backend: FakeBackend, message: Message) -> bytes:
        made = list(os.pipe()) if pipe else [os.memfd_create("inflight") for _ in range(fds)]
        backend.fds += made
        if not pipe:
            for fd in made:
                os.ftruncate(fd, length)
        data = backend.responder.reply(Inflight(size, offset, 2, 128), 1 if pipe else fds)
        backend.channel.send(data, made[: 1 if pipe else fds], monotonic() + 5)
        return b""

    return action


ABSURD: dict[str, tuple[fake.Action, str]] = {
    "empty": (buffer(0), "has 0 bytes"),
    "no descriptor": (buffer(4096, fds=0), "has no descriptor"),
    "huge": (buffer(1 << 40, length=1 << 41), "has 1099511627776 bytes"),
    "longer than its file": (buffer(4097), "ends at 4097, beyond its file of 4096 bytes"),
    "beyond its file": (buffer(4096, 1), "ends at 4097, beyond"),
    "offset of all bits": (buffer(4096, (1 << 64) - 1), "beyond its file"),
    "a pipe": (buffer(4096, pipe=True), "is no file"),
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_inflight_buffers_cost_the_device(rig: Rig, case: str) -> None:
    action, message = ABSURD[case]
    rig.put(script={"GET_INFLIGHT_FD": action})
    frontend = rig.start(on_loss=FAIL)
    with pytest.raises(RemoteProtocolError, match=message):
        frontend.activate(FEATURES, rig.queues())
    until(lambda: rig.told)


def test_a_backend_may_have_no_memory_for_a_buffer(rig: Rig) -> None:
    _, first = rig.running(script={"GET_INFLIGHT_FD": buffer(0, fds=0)})
    assert "SET_INFLIGHT_FD" not in first.names and "SET_VRING_ENABLE" in first.names


@pytest.mark.parametrize("detail", [False, True])
def test_a_fault_of_ours_is_told_and_another_backend_looked_for(
    rig: Rig, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, detail: bool
) -> None:
    monkeypatch.setattr(log, "level", log.DEBUG if detail else log.WARN)
    frontend, first = rig.running()
    opening, failures = frontend._opening.open, iter([KeyError("what"), KeyError("what")])

    def fail(*arguments: Any) -> Any:
        for error in failures:
            raise error
        return opening(*arguments)

    monkeypatch.setattr(frontend._opening, "open", fail)
    for _ in range(3):
        rig.put()
    rig.lose(first)
    rig.until_back()
    errors = capfd.readouterr().err
    assert errors.count("dev: a backend came and cannot be used: KeyError: 'what'") == 1
    assert ("in fail" in errors) == detail


# -- reasons that take a moment to be known ----------------------------------------


def test_the_driver_is_told_of_a_loss_before_the_reason_is_known(
    rig: Rig, capfd: pytest.CaptureFixture[str]
) -> None:
    explaining = rig.host.explaining = []
    _, first = rig.running()
    rig.put(script={"GET_FEATURES": fake.hang_up})
    rig.lose(first)
    until(lambda: explaining)
    assert rig.told == ["away"] and not rig.host.looks
    assert "is lost" not in capfd.readouterr().err
    rig.around.loop.call_soon_threadsafe(lambda: explaining.pop()(" (of hunger)"))
    until(lambda: rig.host.looks and explaining)
    rig.put()
    assert "dev: the backend is lost: the backend closed the connection (of hunger)" in capfd.readouterr().err
    rig.around.loop.call_soon_threadsafe(lambda: explaining.pop()(" (of thirst)"))
    rig.until_back()
    assert "cannot be used: GET_FEATURES: the connection was closed (of thirst)" in capfd.readouterr().err


@pytest.mark.parametrize("policy", [FAIL, STOP, RECONNECT])
def test_a_reason_that_comes_after_the_end(rig: Rig, policy: str) -> None:
    explaining = rig.host.explaining = []
    first = rig.put()
    frontend = rig.start(on_loss=policy)
    first.channel.shutdown()
    until(lambda: explaining)
    rig.around.stop()
    frontend.close()
    explaining.pop()(" (of age)")
    assert rig.told == ["away"] * (policy == RECONNECT) and not rig.host.looks


def test_a_reason_for_a_refusal_that_comes_after_the_end(rig: Rig) -> None:
    _, first = rig.running()
    rig.put(script={"SET_OWNER": fake.hang_up})
    explaining = rig.host.explaining = []
    rig.lose(first)
    until(lambda: explaining)
    rig.around.loop.call_soon_threadsafe(lambda: explaining.pop()(""))
    until(lambda: rig.host.looks and explaining)
    rig.around.stop()
    assert rig.frontend is not None
    rig.frontend.close()
    explaining.pop()(" (of age)")
    assert rig.told == ["away"] and len(rig.host.looks) == 1


# -- many losses, and the end ------------------------------------------------------


def test_losses_in_a_row_leave_nothing(rig: Rig) -> None:
    _, backend = rig.running()
    first: list[tuple[int, int]] = []  # what is held after the first loss

    def held() -> tuple[int, int]:
        return threads(), len(os.listdir("/proc/self/fd"))

    begin = monotonic()
    for count in range(20):
        rig.rings(0, made=[0] * (count + 2), used=[0] * (count + 1))  # it has worked
        lost, backend = backend, rig.put()
        rig.lose(lost)
        rig.until_back(count + 1)
        lost.close()
        rig.backends.remove(lost)
        if not first:
            first.append(held())
        until(lambda: held() == first[0])
    assert monotonic() - begin < 15.0, "a backend that has worked is looked for at once"
    assert payloads(backend, "SET_VRING_BASE")[0] == VringState(0, 20)


def test_a_backend_that_ends_at_once_is_not_looked_for_all_the_time(
    rig: Rig, capfd: pytest.CaptureFixture[str]
) -> None:
    _, backend = rig.running()
    for _ in range(8):
        rig.put(script={"SET_FEATURES": fake.hang_up})
    rig.lose(backend)
    until(lambda: len(rig.host.looks) == 5)
    gaps = [later - sooner for sooner, later in zip(rig.host.looks, rig.host.looks[1:], strict=False)]
    assert all(gap >= least for gap, least in zip(gaps, (0.05, 0.1, 0.2, 0.4), strict=True)), gaps
    assert capfd.readouterr().err.count("came and cannot be used") == 1


def test_pauses_go_on_growing_over_starts_that_lead_to_nothing(rig: Rig) -> None:
    _, backend = rig.running()
    for count in range(4):
        lost, backend = backend, rig.put()
        rig.lose(lost)
        rig.until_back(count + 1)
    last = rig.host.looks[-1] - rig.host.looks[-2]
    assert last >= 0.2, rig.host.looks


@pytest.mark.parametrize("silent", [False, True])
def test_closing_while_reconnecting_is_prompt(rig: Rig, silent: bool) -> None:
    first = rig.put()
    frontend = rig.start(deadline=60.0)
    frontend.activate(FEATURES, rig.queues())
    if silent:
        second = rig.put(script={"SET_VRING_NUM": fake.silence})
    rig.lose(first)
    if silent:
        until(lambda: "SET_VRING_NUM" in second.names)
    rig.around.stop()
    begin = monotonic()
    frontend.close()
    assert monotonic() - begin < 2.0
    assert rig.told == ["away"]


def test_giving_up(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    first = rig.put()
    frontend = rig.start(patience=SHORT)
    frontend.activate(FEATURES, rig.queues())
    begin = monotonic()
    rig.lose(first)
    until(lambda: len(rig.told) == 2)
    assert monotonic() - begin >= SHORT
    assert rig.told[1] == "the backend closed the connection; none came back within 0.3 s"
    assert "dev: none came back within 0.3 s; the device stays lost" in capfd.readouterr().err
    with pytest.raises(BackendLost):
        frontend.activate(FEATURES, rig.queues())


def test_an_inherited_connection_cannot_be_had_again(rig: Rig) -> None:
    backend = rig.backend()
    rig.start(FdEndpoint(os.dup(backend.frontend_end.fileno())))
    backend.frontend_end.close()
    backend.channel.shutdown()
    until(lambda: rig.told)
    assert rig.told == [
        "the backend closed the connection; it cannot be reconnected: "
        "an inherited connection serves only once"
    ]


def test_stop_ends_the_loop(rig: Rig) -> None:
    backend = rig.put()
    frontend = Frontend(
        rig.host, FakeKind(), (SIZE,), None, rig.around.ram, rig.around.loop, name="dev", on_loss=STOP
    )
    rig.frontend = frontend
    frontend.start_watching()
    backend.channel.shutdown()
    with pytest.raises(
        BackendLost, match=r"dev: the backend is lost: .*closed the connection .*stop"
    ) as caught:
        rig.around.loop.run()
    assert caught.value.exit_status == 70


# -- server mode -------------------------------------------------------------------


def connected(rig: Rig, path: Path) -> FakeBackend:
    """A backend that connects to us."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    rig.backends.append(FakeBackend(sock=sock))
    return rig.backends[-1]


def test_backends_that_connect_to_us(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    endpoint = ListeningEndpoint("--generic-vhost-user", str(path))
    try:
        first = connected(rig, path)
        frontend = rig.start(endpoint)
        frontend.activate(FEATURES, rig.queues())
        rig.lose(first)
        second = connected(rig, path)
        rig.until_back()
        assert payloads(second, "SET_VRING_ENABLE") == [VringState(0, 1), VringState(1, 1)]
    finally:
        endpoint.close()
    assert not path.exists()


def test_nobody_connects_to_us(tmp_path: Path) -> None:
    endpoint = ListeningEndpoint("--generic-vhost-user", str(tmp_path / "sock"))
    with pytest.raises(ConfigError, match=r"no backend connected \(waited 0.1 s\)"):
        endpoint.connect(0.1)
    endpoint.close()


def test_acked_features_are_what_the_driver_took(rig: Rig) -> None:
    _, first = rig.running()
    second = rig.put(virtio=fake.VIRTIO | 1 << 5)
    rig.lose(first)
    rig.until_back()
    assert payloads(second, "SET_FEATURES") == [U64(FEATURES | 1 << 30)]
    assert rig.frontend is not None and rig.frontend.features >> 5 & 1


def test_a_trace_goes_on_with_the_next_backend(rig: Rig) -> None:
    lines: list[str] = []
    first, _ = rig.put(), rig.put()
    rig.start(trace=Trace(lines.append).device("dev"))
    before = len(lines)
    rig.lose(first)
    rig.until_back()
    assert [line.split()[3] for line in lines[before:]][:2] == ["SET_OWNER", "GET_FEATURES"]
