"""Shared memory regions: what a backend may have, what it may map, and what becomes of mappings.

In one file because the rules, the requests and the losses are about the same book of mappings.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import pytest
from fakes import backend as fake
from fakes.backend import FakeBackend, Surroundings, no_new_fds
from hypothesis import given
from hypothesis import strategies as st

from pyvmm import layout
from pyvmm.errors import ConfigError, RemoteProtocolError
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.vhost_user.messages import ProtocolFeature as P
from pyvmm.vhost_user.payloads import SHMEM_REGIONS, U64, Mmap, ShmemConfig
from pyvmm.vhost_user.shared_memory import (
    FILE_END,
    MAX_MAPPINGS,
    WRITABLE,
    File,
    Refused,
    SharedMemory,
    examine,
    regions,
)
from pyvmm.virtio.queue import QueueSetup

PAGE = 0x1000
OFFER = P.MQ | P.REPLY_ACK | P.BACKEND_REQ | P.SHMEM | P.BACKEND_SEND_FD
SIZES = {0: 16 * PAGE, 5: 4 * PAGE}


class Map:
    """A mapper that notes what is there; `error` is raised by the next call, `broken` has no memory."""

    def __init__(self) -> None:
        self.there: dict[tuple[int, int], tuple[int, int, bool]] = {}
        self.error: Exception | None = None
        self.broken: set[tuple[int, int]] = set()

    def map(self, shmid: int, offset: int, fd: int, fd_offset: int, length: int, writable: bool) -> None:
        if self.error is not None:
            raise self.error
        os.fstat(fd)
        assert (shmid, offset) not in self.there
        self.there[shmid, offset] = (fd_offset, length, writable)

    def unmap(self, shmid: int, offset: int) -> None:
        del self.there[shmid, offset]

    def intact(self, shmid: int, offset: int) -> bool:
        assert (shmid, offset) in self.there
        return (shmid, offset) not in self.broken


def config(sizes: dict[int, int], count: int | None = None) -> ShmemConfig:
    every = tuple(sizes.get(shmid, 0) for shmid in range(SHMEM_REGIONS))
    return ShmemConfig(len(sizes) if count is None else count, every)


# -- regions ---------------------------------------------------------------------------


def test_regions_are_those_that_have_a_size() -> None:
    assert regions(config({255: PAGE, 3: 2 * PAGE}), "dev") == ((3, 2 * PAGE), (255, PAGE))
    assert regions(config({}), "dev") == ()


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({1: PAGE + 1}, "region 1 has 0x1001 bytes, which are no whole pages"),
        ({0: 512}, "no whole pages"),
        ({0: layout.MMIO64_SIZE + PAGE}, "guests have room for 0x1000000000; configure it for less"),
        ({0: layout.MMIO64_SIZE, 9: PAGE}, "guests have room"),
        ({0: (1 << 64) - PAGE}, "guests have room"),
        (dict.fromkeys(range(256), 1 << 62), "guests have room"),
    ],
)
def test_absurd_sizes_are_refused_in_words(sizes: dict[int, int], text: str) -> None:
    with pytest.raises(ConfigError, match=f"dev: .*{text}"):
        regions(config(sizes), "dev")


@pytest.mark.parametrize(("sizes", "count"), [({0: PAGE}, 2), ({0: PAGE}, 0), ({}, 1), ({}, 0xFFFF_FFFF)])
def test_the_count_and_the_sizes_must_agree(sizes: dict[int, int], count: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"announces {count} regions, and {len(sizes)} have"):
        regions(config(sizes, count), "dev")


# -- rules -----------------------------------------------------------------------------


@pytest.fixture
def memory() -> SharedMemory:
    """Region 0 with pages 4 to 7 mapped; region 5 empty."""
    memory = SharedMemory("dev", tuple(SIZES.items()), lambda: None)
    memory.attach(Map())
    memory._mapped[0][4 * PAGE] = 4 * PAGE
    return memory


def wish(**changes: int) -> Mmap:
    usual = {"shmid": 0, "fd_offset": 0, "shm_offset": 0, "length": PAGE, "flags": WRITABLE}
    return Mmap(**{**usual, **changes})


FILE = File(64 * PAGE)
REFUSALS = [
    ("a region that is not there", wish(shmid=1), FILE, errno.EINVAL),
    ("the last region number", wish(shmid=255), FILE, errno.EINVAL),
    ("no length", wish(length=0), FILE, errno.EINVAL),
    ("half a page", wish(length=PAGE // 2), FILE, errno.EINVAL),
    ("a page and a byte", wish(length=PAGE + 1), FILE, errno.EINVAL),
    ("within a page of the region", wish(shm_offset=1), FILE, errno.EINVAL),
    ("within a page of the file", wish(fd_offset=512), FILE, errno.EINVAL),
    ("past the region", wish(shm_offset=16 * PAGE), FILE, errno.EINVAL),
    ("over the region's end", wish(shm_offset=15 * PAGE, length=2 * PAGE), FILE, errno.EINVAL),
    ("longer than the region", wish(shmid=5, length=5 * PAGE), FILE, errno.EINVAL),
    ("a range that wraps", wish(shm_offset=(1 << 64) - PAGE, length=2 * PAGE), FILE, errno.EINVAL),
    ("a length of everything", wish(length=(1 << 64) - PAGE), FILE, errno.EINVAL),
    ("onto a mapping", wish(shm_offset=4 * PAGE, length=4 * PAGE), FILE, errno.EEXIST),
    ("into a mapping", wish(shm_offset=5 * PAGE), FILE, errno.EEXIST),
    ("over a mapping's beginning", wish(shm_offset=3 * PAGE, length=2 * PAGE), FILE, errno.EEXIST),
    ("over a mapping's end", wish(shm_offset=7 * PAGE, length=2 * PAGE), FILE, errno.EEXIST),
    ("around a mapping", wish(length=16 * PAGE), FILE, errno.EEXIST),
    ("a flag that nobody knows", wish(flags=2), FILE, errno.EINVAL),
    ("all flags", wish(flags=(1 << 64) - 1), FILE, errno.EINVAL),
    ("an empty file", wish(), File(0), errno.EINVAL),
    ("past the file", wish(fd_offset=64 * PAGE), FILE, errno.EINVAL),
    ("over the file's end", wish(fd_offset=63 * PAGE, length=2 * PAGE), FILE, errno.EINVAL),
    ("over the end of a last page", wish(), File(PAGE - 1), errno.EINVAL),
    ("past every file", wish(fd_offset=FILE_END), File(None), errno.EINVAL),
    ("writing a file that is only read", wish(), File(PAGE, writable=False), errno.EACCES),
    ("reading a file that is only written", wish(flags=0), File(PAGE, readable=False), errno.EACCES),
]


@pytest.mark.parametrize(
    ("request_", "file", "status"), [row[1:] for row in REFUSALS], ids=[r[0] for r in REFUSALS]
)
def test_refusals(memory: SharedMemory, request_: Mmap, file: File, status: int) -> None:
    with pytest.raises(Refused) as refusal:
        memory.check(request_, file)
    assert refusal.value.status == status
    assert str(refusal.value)


@pytest.mark.parametrize(
    ("request_", "file"),
    [
        (wish(), FILE),
        (wish(length=4 * PAGE), FILE),
        (wish(shm_offset=8 * PAGE, length=8 * PAGE, fd_offset=56 * PAGE), FILE),
        (wish(shmid=5, length=4 * PAGE), FILE),
        (wish(flags=0), File(PAGE, writable=False)),
        (wish(fd_offset=FILE_END - PAGE), File(None)),
    ],
)
def test_what_touches_nothing_else_is_allowed(memory: SharedMemory, request_: Mmap, file: File) -> None:
    memory.check(request_, file)


def test_mappings_are_counted(memory: SharedMemory) -> None:
    memory._mapped[5] = {number * PAGE: 0 for number in range(MAX_MAPPINGS - 1)}
    with pytest.raises(Refused) as refusal:
        memory.check(wish(), FILE)
    assert refusal.value.status == errno.ENOSPC


def test_no_machine_no_mapping(memory: SharedMemory) -> None:
    memory._mapped[0].clear()
    memory.attach(None)
    with pytest.raises(Refused) as refusal:
        memory.check(wish(), FILE)
    assert refusal.value.status == errno.ENODEV


def test_nothing_is_mapped_while_the_machine_goes(memory: SharedMemory) -> None:
    """A thread that reconnects may serve a request at any time."""
    memory._mapped[0].clear()
    lock, refusals = memory._lock, []

    class Eager:
        """Whenever the lock is let go, there is a request."""

        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()
            with lock, open(os.devnull) as file, pytest.raises(Refused) as refusal:
                memory._map(wish(flags=0), [file.fileno()])
            refusals.append(refusal.value.status)

    memory._lock = Eager()  # type: ignore[assignment]
    memory.attach(None)
    assert refusals == [errno.ENODEV]


def test_descriptors_are_looked_at(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "file")
    reader, writer = os.pipe()
    seen = {}
    for name, flags in (("rw", os.O_RDWR), ("r", os.O_RDONLY), ("w", os.O_WRONLY), ("path", os.O_PATH)):
        fd = os.open(path, flags | (0 if flags & os.O_PATH else os.O_CREAT))
        if name == "rw":
            os.truncate(path, 5)
        seen[name] = examine(fd)
        os.close(fd)
    seen["pipe"] = examine(reader)
    os.close(reader)
    os.close(writer)
    assert seen == {
        "rw": File(5),
        "r": File(5, writable=False),
        "w": File(5, readable=False, writable=False),
        "path": File(5, readable=False, writable=False),
        "pipe": File(None, writable=False),
    }


WISHES = st.tuples(
    st.booleans(),
    st.sampled_from([0, 5, 6]),
    st.integers(-1, 17),
    st.integers(-1, 18),
    st.sampled_from([0, 0, 0, 1, 512]),
)


@given(st.lists(WISHES, max_size=60))
def test_pages_have_one_owner_whatever_is_asked_for(wishes: list[tuple[bool, int, int, int, int]]) -> None:
    """Against a model of single pages: what is allowed is what fits and touches nothing."""
    memory, mapper = SharedMemory("model", tuple(SIZES.items()), lambda: None), Map()
    memory.attach(mapper)
    fd = os.memfd_create("shared")
    os.ftruncate(fd, 64 * PAGE)
    owner: dict[tuple[int, int], int] = {}  # region and page to the first page of the mapping
    for mapping, shmid, page, count, stray in wishes:
        start, length = (page * PAGE + stray) % (1 << 64), count * PAGE % (1 << 64)
        span = [(shmid, at) for at in range(page, page + count)]
        request = wish(shmid=shmid, shm_offset=start, length=length)
        if mapping:
            fits = not stray and count > 0 and 0 <= page <= page + count <= SIZES.get(shmid, 0) // PAGE
            allowed = fits and not any(place in owner for place in span)
            owner.update(dict.fromkeys(span, page) if allowed else {})
        else:
            whole = [place for place, first in owner.items() if (place[0], first) == (shmid, page)]
            allowed = bool(whole) and sorted(whole) == span and not stray
            owner = {place: first for place, first in owner.items() if not allowed or place not in span}
        action = memory._map if mapping else memory._unmap
        if allowed:
            action(request, [fd])
        else:
            with pytest.raises(Refused):
                action(request, [fd])
    os.close(fd)
    pages = {
        (shmid, at): offset // PAGE
        for (shmid, offset), (_, length, _) in mapper.there.items()
        for at in range(offset // PAGE, (offset + length) // PAGE)
    }
    assert pages == owner


# -- a device with a backend -------------------------------------------------------------


class Device:
    """A frontend, a scripted backend behind it, and a mapper in front."""

    def __init__(self, protocol: int = OFFER, sizes: dict[int, int] | None = None, **options: object) -> None:
        self.around = Surroundings()
        self.backend = FakeBackend(
            protocol=protocol, shared_memory=SIZES if sizes is None else sizes, **options
        )
        self.lost: list[str] = []
        self.fd = os.memfd_create("shared")
        os.ftruncate(self.fd, 64 * PAGE)
        self.map = Map()
        self.eventfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.frontend: Frontend | None = None

    def open(self, deadline: float = 5.0) -> Frontend:
        around = self.around
        self.frontend = Frontend(
            self.backend.connect, fake.FakeKind(), (64,), None, around.ram, around.loop, deadline, "dev"
        )
        self.frontend.on_lost = self.lost.append
        self.frontend.mappings.attach(self.map)
        self.frontend.start_watching()
        self.around.run()
        return self.frontend

    def start(self) -> None:
        assert self.frontend is not None
        self.frontend.activate(1 << 32, [QueueSetup(0, 64, 0x1000, 0x2000, 0x3000, *self.eventfds)])

    def ask(self, name: str = "SHMEM_MAP", **changes: int) -> int:
        """The status that a request is acked with."""
        fds = [self.fd] if name == "SHMEM_MAP" else []
        return self.backend.status_of(name, wish(**changes), fds)

    def close(self) -> None:
        self.around.stop()
        if self.frontend is not None:
            self.frontend.close()
        self.backend.close()
        self.around.close()
        for fd in (self.fd, *self.eventfds):
            os.close(fd)


@pytest.fixture
def make() -> Iterator[type[Device]]:
    devices: list[Device] = []

    class Made(Device):
        def __init__(self, *args: int, **options: object) -> None:
            super().__init__(*args, **options)  # type: ignore[arg-type]
            devices.append(self)

    with no_new_fds():
        yield Made
        for device in devices:
            device.close()


def test_regions_are_asked_for(make: type[Device]) -> None:
    device = make()
    assert device.open().shared_memory == ((0, 16 * PAGE), (5, 4 * PAGE))
    assert ("SET_PROTOCOL_FEATURES", U64(OFFER), 0) in device.backend.seen
    assert device.backend.names[-1] == "GET_SHMEM_CONFIG"


@pytest.mark.parametrize("bit", [P.GET_VRING_BASE_INFLIGHT, P.GPA_ADDRESSES])
def test_bits_that_shmem_once_had_are_not_accepted(make: type[Device], bit: int) -> None:
    device = make(OFFER & ~P.SHMEM | bit)
    assert device.open().shared_memory == ()
    acked = next(
        p.value for n, p, _ in device.backend.seen if n == "SET_PROTOCOL_FEATURES" and isinstance(p, U64)
    )
    assert not acked & (bit | P.SHMEM | P.BACKEND_REQ | P.BACKEND_SEND_FD)


def test_no_shared_memory_without_a_way_to_ask_for_mappings(make: type[Device]) -> None:
    device = make(OFFER & ~P.BACKEND_REQ)
    assert device.open().shared_memory == ()
    assert "GET_SHMEM_CONFIG" not in device.backend.names


@pytest.mark.parametrize("sizes", [{0: 123}, {0: 1 << 60}])
def test_what_no_guest_can_see_ends_the_start(make: type[Device], sizes: dict[int, int]) -> None:
    with pytest.raises(ConfigError, match="shared memory"):
        make(sizes=sizes).open()


def test_map_and_unmap(make: type[Device]) -> None:
    device = make()
    device.open()
    assert device.ask(shmid=5, shm_offset=PAGE, fd_offset=2 * PAGE, flags=0) == 0
    assert device.ask(length=16 * PAGE) == 0
    assert device.map.there == {(5, PAGE): (2 * PAGE, PAGE, False), (0, 0): (0, 16 * PAGE, True)}
    assert device.ask(length=PAGE) == errno.EEXIST
    for wrong in ({"length": PAGE}, {"shm_offset": PAGE, "length": 15 * PAGE}, {"shmid": 9}, {"shmid": 5}):
        assert device.ask("SHMEM_UNMAP", **wrong) == errno.EINVAL
    assert device.ask("SHMEM_UNMAP", length=16 * PAGE) == 0
    assert list(device.map.there) == [(5, PAGE)]
    assert device.ask("SHMEM_UNMAP", length=16 * PAGE) == errno.EINVAL
    assert not device.lost


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(errno.ENODEV, "no such device"), errno.ENODEV),
        (OSError("the machine ends"), errno.EINVAL),
        (ValueError("out of bounds"), errno.EINVAL),
    ],
)
def test_the_hosts_refusal_is_the_acks_status(make: type[Device], error: Exception, status: int) -> None:
    device = make()
    device.open()
    device.map.error = error
    assert device.ask() == status
    device.map.error = None
    assert device.ask() == 0


def test_a_reset_unmaps(make: type[Device]) -> None:
    device = make()
    frontend = device.open()
    device.start()
    assert device.ask() == 0
    frontend.reset()
    assert not device.map.there
    assert device.ask() == 0


@contextmanager
def busy(device: Device) -> Iterator[None]:
    """The loop is at something else meanwhile."""
    begun, go_on = threading.Event(), threading.Event()
    device.around.loop.call_soon_threadsafe(lambda: (begun.set(), go_on.wait(10)))
    begun.wait(10)
    try:
        yield
    finally:
        go_on.set()


def test_a_reset_unmaps_what_was_asked_for_before_it(make: type[Device]) -> None:
    device = make()
    frontend = device.open()
    device.start()
    with busy(device):
        device.backend.ask("SHMEM_MAP", wish(), [device.fd])
        frontend.reset()
        assert not device.map.there
    assert device.backend.status_told() == 0, "it was done, and undone"
    assert device.ask() == 0, "there is room in the next life"


def test_a_reset_that_fails_leaves_nothing_to_be_mapped_later(make: type[Device]) -> None:
    device = make(script={"GET_VRING_BASE": fake.silence})
    frontend = device.open(deadline=0.2)
    device.start()
    with busy(device):
        device.backend.ask("SHMEM_MAP", wish(), [device.fd])
        frontend.reset()
    wait_for(device.lost)
    assert not device.map.there and not frontend.mappings.torn


def test_nothing_is_mapped_for_a_connection_that_ended(make: type[Device]) -> None:
    device = make()
    frontend = device.open()
    with busy(device):
        device.backend.ask("SHMEM_MAP", wish(), [device.fd])
        link = frontend._link
        assert link is not None and link.notices is not None
        link.shutdown()
        link.notices.serve()
        assert not device.map.there


def test_nonsense_that_a_reset_finds_costs_the_backend(make: type[Device]) -> None:
    device = make()
    frontend = device.open()
    device.start()
    with busy(device):
        assert device.backend.requests is not None
        device.backend.requests.send(b"no message at all", deadline=monotonic() + 5)
        frontend.reset()
    wait_for(device.lost)


def test_a_change_that_a_reset_finds_is_told(make: type[Device]) -> None:
    device = make(protocol=OFFER | P.CONFIG)
    frontend = device.open()
    told = threading.Event()
    frontend.on_config_change = told.set
    device.start()
    with busy(device):
        device.backend.ask("CONFIG_CHANGE_MSG")
        frontend.reset()
    assert told.wait(10)


def test_a_lost_backend_takes_its_mappings_along(make: type[Device]) -> None:
    device = make()
    frontend = device.open()
    device.start()
    assert device.ask() == 0
    device.backend.channel.shutdown()
    wait_for(device.lost)
    assert not device.map.there
    assert frontend.mappings.torn


def test_mappings_are_acked_while_a_cpu_waits_for_the_backend(make: type[Device]) -> None:
    """The backend maps before it answers GET_VRING_BASE, and waits for the ack."""
    statuses = []

    def map_first(backend: FakeBackend, message: object) -> bytes:
        statuses.append(device.ask())
        return backend.answer(message)  # type: ignore[arg-type]

    device = make(script={"GET_VRING_BASE": map_first})
    frontend = device.open()
    device.start()
    frontend.reset()
    assert statuses == [0]
    assert not device.map.there
    assert not device.lost


def test_memory_that_went_away_costs_the_backend(make: type[Device]) -> None:
    device = make()
    frontend = device.open()
    assert device.ask() == device.ask(shm_offset=PAGE) == 0
    assert frontend.mappings.drop_broken() == 0
    device.map.broken.add((0, PAGE))
    assert frontend.mappings.drop_broken() == 1
    assert frontend.mappings.torn
    wait_for(device.lost)
    assert "was a file cut short?" in device.lost[0]
    assert not device.map.there


def test_no_machine_is_told_before_and_after_one(make: type[Device]) -> None:
    device = make()
    frontend = device.open()
    assert device.ask() == 0
    frontend.mappings.attach(None)
    assert not device.map.there
    assert device.ask() == errno.ENODEV
    frontend.mappings.attach(device.map)
    assert device.ask() == 0


def test_cycles_keep_nothing(make: type[Device]) -> None:
    device = make()
    frontend = device.open()
    for _ in range(100):
        assert device.ask(length=16 * PAGE) == 0
        assert device.ask("SHMEM_UNMAP", length=16 * PAGE) == 0
    assert len(frontend.mappings) == 0


def wait_for(what: list[str], seconds: float = 10.0) -> None:
    end = monotonic() + seconds
    while not what:
        assert monotonic() < end
        os.sched_yield()
