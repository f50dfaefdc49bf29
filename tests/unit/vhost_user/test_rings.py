"""Messages at start and stop for backends that offer more: memory slots, status, device reset."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product

import pytest
from fakes import backend as fake
from fakes.backend import FakeBackend, FakeKind, Surroundings, no_new_fds

from pyvmm.errors import ConfigError, RemoteProtocolError
from pyvmm.layout import RamRange
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.vhost_user.memory import USER_BASE, GuestRam, MemoryTable
from pyvmm.vhost_user.messages import ProtocolFeature as P
from pyvmm.vhost_user.payloads import U64, SingleRegion, VringAddr, VringState
from pyvmm.vhost_user.rings import _share_memory
from pyvmm.virtio.queue import QueueSetup

V1 = 1 << 32
AGREED, RUNNING = 0xB, 0xF
REGIONS = (
    SingleRegion(0, 1 << 20, USER_BASE, 0),
    SingleRegion(1 << 32, 1 << 20, USER_BASE + (1 << 32), 1 << 20),
)


class Pair:
    """A frontend and its scripted backend."""

    def __init__(self) -> None:
        self.around = Surroundings()
        self.eventfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.backend: FakeBackend | None = None
        self.frontend: Frontend | None = None

    def open(self, protocol: int, *, ram: GuestRam | None = None, **options: object) -> FakeBackend:
        self.backend = FakeBackend(protocol=protocol, **options)  # type: ignore[arg-type]
        around = self.around
        self.frontend = Frontend(
            self.backend.connect, FakeKind(), (64,), None, ram or around.ram, around.loop, 5.0, "dev"
        )
        self.sent()
        return self.backend

    def start(self) -> list[str]:
        """The names of what was sent."""
        assert self.frontend is not None
        self.frontend.activate(V1, [QueueSetup(0, 64, 0x1000, 0x2000, 0x3000, *self.eventfds)])
        return self.sent()

    def reset(self) -> list[str]:
        assert self.frontend is not None
        self.frontend.reset()
        return self.sent()

    def sent(self) -> list[str]:
        assert self.backend is not None and self.frontend is not None and self.frontend._link is not None
        self.frontend._link.client.call("GET_FEATURES")  # what came before it has been seen then
        names = self.backend.names[:-1]
        del self.backend.seen[:]
        return names

    def close(self) -> None:
        if self.frontend is not None:
            self.frontend.close()
        if self.backend is not None:
            self.backend.close()
        self.around.close()
        for fd in self.eventfds:
            os.close(fd)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with no_new_fds():
        pair = Pair()
        yield pair
        pair.close()


# -- order -----------------------------------------------------------------------------

RING = ["SET_VRING_NUM", "SET_VRING_BASE", "SET_VRING_ADDR", "SET_VRING_CALL", "SET_VRING_KICK"]


@pytest.mark.parametrize(("acks", "status", "slots", "reset"), list(product((False, True), repeat=4)))
def test_order_of_start_and_stop(pair: Pair, acks: bool, status: bool, slots: bool, reset: bool) -> None:
    offered = (
        (P.REPLY_ACK, acks),
        (P.STATUS, status),
        (P.CONFIGURE_MEM_SLOTS, slots),
        (P.RESET_DEVICE, reset),
    )
    backend = pair.open(sum(feature for feature, is_offered in offered if is_offered))
    stop = ["SET_VRING_ENABLE", "GET_VRING_BASE", *["RESET_DEVICE"] * reset, *["SET_STATUS"] * status]
    agree = ["SET_FEATURES", *["SET_STATUS", "GET_STATUS"] * status]
    memory = ["ADD_MEM_REG"] * 2 if slots else ["SET_MEM_TABLE"]
    rest = [*RING, "SET_VRING_ENABLE", *["GET_FEATURES"] * (not acks), *["SET_STATUS"] * status]
    assert pair.start() == [*agree, *memory, *rest]
    assert pair.reset() == stop
    again = [] if slots else ["SET_MEM_TABLE"]
    assert pair.start() == [*agree, *again, *rest], "memory slots stay filled"
    assert backend.error is None


def test_nothing_is_stopped_twice(pair: Pair) -> None:
    pair.open(P.REPLY_ACK | P.STATUS | P.RESET_DEVICE)
    assert pair.reset() == []
    pair.start()
    assert pair.reset() != []
    assert pair.reset() == []


def test_a_device_without_queues_is_reset_too(pair: Pair) -> None:
    backend = pair.open(P.REPLY_ACK | P.STATUS | P.RESET_DEVICE)
    assert pair.frontend is not None
    pair.frontend.activate(V1, [])
    assert backend.status == RUNNING
    pair.sent()
    assert pair.reset() == ["RESET_DEVICE", "SET_STATUS"]


# -- status ----------------------------------------------------------------------------


def test_the_drivers_status_is_told(pair: Pair) -> None:
    backend = pair.open(P.REPLY_ACK | P.STATUS)
    told: list[int] = []
    backend.script["SET_STATUS"] = lambda backend, message: (
        told.append(message.payload.value),  # type: ignore[attr-defined]
        backend.answer(message),
    )[1]
    pair.start()
    pair.reset()
    assert told == [AGREED, RUNNING, 0]


def test_a_backend_that_refuses_the_features_is_lost(pair: Pair) -> None:
    pair.open(P.REPLY_ACK | P.STATUS, script={"GET_STATUS": fake.reply(U64(3))})
    with pytest.raises(RemoteProtocolError, match=r"refuses the driver's features \(status 0x3\)"):
        pair.start()


@pytest.mark.parametrize("name", ["SET_STATUS", "RESET_DEVICE", "ADD_MEM_REG"])
def test_a_refusal_costs_the_backend(pair: Pair, name: str) -> None:
    pair.open(P.REPLY_ACK | P.STATUS | P.RESET_DEVICE | P.CONFIGURE_MEM_SLOTS, script={name: fake.status(1)})
    assert pair.frontend is not None
    if name == "RESET_DEVICE":
        pair.start()
        pair.frontend.reset()
    else:
        with pytest.raises(RemoteProtocolError, match=f"refused {name}"):
            pair.start()
    with pytest.raises(RemoteProtocolError, match=f"refused {name}"):
        pair.start()


# -- memory slots ----------------------------------------------------------------------


def test_each_piece_of_memory_has_a_slot(pair: Pair) -> None:
    backend = pair.open(P.REPLY_ACK | P.CONFIGURE_MEM_SLOTS, slots=2)
    assert pair.frontend is not None
    pair.frontend.activate(V1, [])
    assert [row for row in backend.seen if row[0] == "ADD_MEM_REG"] == [
        ("ADD_MEM_REG", region, 1) for region in REGIONS
    ]
    assert all(os.fstat(fd).st_ino == os.fstat(pair.around.ram.fd).st_ino for fd in backend.fds)


def pieces(count: int) -> GuestRam:
    return GuestRam(0, tuple(RamRange(i << 30, 1 << 20, i << 20) for i in range(count)))


@pytest.mark.parametrize(("slots", "count"), [(0, 1), (1, 2), (8, 9), (508, 509)])
def test_fewer_slots_than_pieces(pair: Pair, slots: int, count: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"dev: guest RAM has {count} pieces, and the backend takes {slots} "
    ):
        pair.open(P.REPLY_ACK | P.CONFIGURE_MEM_SLOTS, slots=slots, ram=pieces(count))


@pytest.mark.parametrize(("protocol", "count"), [(P.REPLY_ACK, 9), (0, 9)])
def test_without_slots_backends_take_eight(pair: Pair, protocol: int, count: int) -> None:
    with pytest.raises(ConfigError, match="takes 8 "):
        pair.open(protocol, ram=pieces(count))


@pytest.mark.parametrize(("protocol", "count"), [(P.REPLY_ACK, 8), (P.CONFIGURE_MEM_SLOTS, 9)])
def test_as_many_pieces_as_there_is_room_for(pair: Pair, protocol: int, count: int) -> None:
    pair.open(protocol, ram=pieces(count), slots=count)


def test_only_what_changed_is_told(pair: Pair) -> None:
    backend = pair.open(P.REPLY_ACK | P.CONFIGURE_MEM_SLOTS)
    assert pair.frontend is not None and pair.frontend._link is not None
    client, fd = pair.frontend._link.client, pair.around.ram.fd
    a, b, c = (RamRange(i << 30, 1 << 20, i << 20) for i in range(3))
    for ranges in ((a, b), (a, b), (b, c), (), (a.replace(size=4096),)):
        _share_memory(client, MemoryTable(GuestRam(fd, ranges)))
    told = [(name, payload.guest_address >> 30) for name, payload, _ in backend.seen]  # type: ignore[attr-defined]
    add, remove = "ADD_MEM_REG", "REM_MEM_REG"
    assert told == [(add, 0), (add, 1), (remove, 0), (add, 2), (remove, 1), (remove, 2), (add, 0)]
    assert backend.error is None


# -- packed rings ------------------------------------------------------------------------


def test_packed_rings_begin_with_both_wrap_counters_set(pair: Pair) -> None:
    packed = 1 << 34
    backend = pair.open(P.REPLY_ACK | P.INFLIGHT_SHMFD, virtio=fake.VIRTIO | packed)
    assert pair.frontend is not None
    queue = QueueSetup(0, 64, 0x1000, 0x2000, 0x3000, *pair.eventfds)
    for features, base in ((V1 | packed, 0x8000_8000), (V1, 0), (V1 | packed, 0x8000_8000)):
        pair.frontend.activate(features, [queue])
        sent = {name: payload for name, payload, _ in backend.seen}
        assert sent["SET_VRING_BASE"] == VringState(0, base)
        desc, driver, device = (USER_BASE + at for at in (queue.desc, queue.avail, queue.used))
        assert sent["SET_VRING_ADDR"] == VringAddr(0, 0, desc, device, driver, 0)
        assert ("SET_INFLIGHT_FD" in sent) == (base == 0)
        pair.reset()
