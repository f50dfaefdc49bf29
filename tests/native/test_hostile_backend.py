"""A table of everything that a backend can do to us, each to a running machine with another device.

After each case the machine answers at every register of the victim, a driver resets the victim and
reads 0, the other device fetches real data, and when the machine is closed nothing of it is left.
A case is a script for the backend, or what it does while the guest runs, and the words by which the
loss is told; no words mean that the device goes on working.

In one file because it is one table, and the deeds in it are short.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes import backend as fake
from fakes.backend import FakeBackend, Script
from fakes.census import leaves_nothing
from fakes.driver import ConfigAccess, VirtioDriver
from fakes.entropy import Entropy, loop_answers, scenario
from fakes.program import LIMIT, SPIN, pvh_elf

from pyvmm import config as cfg
from pyvmm.errors import BackendLost, ConfigError
from pyvmm.loop import EventLoop
from pyvmm.pci import config as pci
from pyvmm.vhost_user.codec import encode_ack, encode_request
from pyvmm.vhost_user.messages import BACKEND_REQUESTS, HEADER, Request
from pyvmm.vhost_user.messages import ProtocolFeature as P
from pyvmm.vhost_user.payloads import U64, Config, Empty, Inflight, Mmap, VringState
from pyvmm.vhost_user.shared_memory import MAX_MAPPINGS
from pyvmm.virtio import spec
from pyvmm.vm import Vm

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("need_kvm")]

SILENCE = 1.0  # seconds: the deadline where a backend is silent
BASE, RINGS, OTHER_RINGS = 0x40_0000, 0x10_0000, 0x20_0000
VICTIM, OTHER = 1, 2  # slots
FULL = (1 << 64) - 2  # of an eventfd's counter
FLOOD = 3000
F_SEAL_WRITE, F_SEAL_FUTURE_WRITE = 8, 16


class Stage:
    """A machine with the victim, whose backend is hostile, and another device."""

    def __init__(self, built: Vm, backend: FakeBackend, case: Case) -> None:
        self.backend, self.loop = backend, built.loop
        self.driver = VirtioDriver(built.board.mmio, ConfigAccess(built.board.mmio, VICTIM))
        self.other = Entropy(built, OTHER, OTHER_RINGS)
        if case.silent:  # of the victim's alone: the other backend is a process that has to be scheduled
            link = built._frontends[0]._link
            assert link is not None
            link.client.deadline = SILENCE

    def start(self) -> None:
        """The driver takes the victim into service, with MSI-X."""
        driver = self.driver
        driver.probe()
        assert driver.negotiate()
        driver.enable_msix()
        driver.set(16, 2, 0)
        base = RINGS
        for index in range(driver.get(18, 2)):
            base = driver.queue(index, base, vector=index + 1)
        driver.add_status(spec.DRIVER_OK)

    def await_wish(self) -> None:
        """Wait until the victim asks for a reset."""
        due = time.monotonic() + LIMIT
        while not self.driver.status & spec.NEEDS_RESET:
            assert time.monotonic() < due, "the loss was not noticed"
            time.sleep(0.002)

    def machine_answers(self) -> None:
        """The event loop does, every structure of the victim can be read, and a reset reads back as 0."""
        assert loop_answers(self.loop)
        driver = self.driver
        assert driver.config.read(pci.VENDOR_ID, 2) == spec.PCI_VENDOR_ID
        for kind, (_, _, length) in driver.structures.items():
            for offset in range(0, min(length, 64), 4):
                driver.mmio.read(driver.address(kind, offset), 4)
        driver.reset()

    def other_device_works(self) -> None:
        """A driver starts it, and data comes."""
        assert self.other.ask()
        assert not self.other.driver.status & spec.NEEDS_RESET


Deed = Callable[[Stage], object]


class Case(NamedTuple):
    """`script` is the backend's; `deed` is done in service; `told` is a pattern of what is said; a
    device that `heals` works again after the reset that it asks for."""

    told: str
    script: Script = {}  # noqa: RUF012
    deed: Deed | None = None
    options: dict[str, Any] = {}  # noqa: RUF012
    silent: bool = False
    heals: bool = False


# -- deeds -------------------------------------------------------------------------------


def trickle(backend: FakeBackend, message: fake.Message) -> bytes:
    """A good answer, so slowly that no single wait for a byte is long."""
    for byte in backend.answer(message):
        try:
            backend.channel.send(bytes([byte]), deadline=time.monotonic() + 5)
        except BackendLost:
            return b""
        time.sleep(SILENCE / 5)
    return b""


def unasked(backend: FakeBackend, message: fake.Message) -> bytes:
    """An ack that nobody asked for."""
    backend.responder.answering = None
    return encode_ack(message.request)


def reads(stage: Stage) -> None:
    stage.driver.device_config(0, 4)


def writes(stage: Stage) -> None:
    stage.driver.mmio.write(stage.driver.address(spec.CAP_DEVICE), 4, 1)


def resets(stage: Stage) -> None:
    """And starts again, which shows whether the backend is still there."""
    stage.driver.reset()
    stage.start()


def moves_a_vector(stage: Stage) -> None:
    stage.driver.set(22, 2, 0)
    stage.driver.set(26, 2, 2)


def dies(stage: Stage) -> None:
    stage.backend.channel.shutdown()


def talks(stage: Stage) -> None:
    """Megabytes on the main connection, where nobody asked anything."""
    try:
        while True:
            stage.backend.channel.send(b"\x5a" * 65536, deadline=time.monotonic())
    except BackendLost:
        reads(stage)


def notice(data: bytes, fds: int = 0, *, then_end: bool = False) -> Deed:
    """Bytes on the channel of the backend's own requests."""

    def deed(stage: Stage) -> None:
        channel = stage.backend.requests
        assert channel is not None
        files = [os.memfd_create("extra") for _ in range(fds)]
        stage.backend.fds += files
        channel.send(data, files, time.monotonic() + 5)
        if then_end:
            channel.shutdown()

    return deed


def request(name: str, *, need_reply: bool = False) -> bytes:
    row = BACKEND_REQUESTS.by_name[name]
    body = bytes(row.payload._wire.size)
    return HEADER.pack(row.id, 9 if need_reply else 1, len(body)) + body


def floods(need_reply: bool) -> Deed:
    """Notices without end; the frontend must not be kept from anything else."""

    def deed(stage: Stage) -> None:
        channel = stage.backend.requests
        assert channel is not None
        try:
            for _ in range(FLOOD):
                channel.send(request("CONFIG_CHANGE_MSG", need_reply=need_reply), (), time.monotonic() + 5)
        except BackendLost:
            assert need_reply

    return deed


def buffer(size: int, offset: int = 0, files: Callable[[], list[int]] = lambda: []) -> fake.Action:
    """An answer to GET_INFLIGHT_FD."""

    def action(backend: FakeBackend, message: fake.Message) -> bytes:
        backend.responder.answering = None
        found = files()
        backend.fds += found
        data = HEADER.pack(message.request.id, 5, 24) + Inflight(size, offset, 3, 8).encode()
        backend.channel.send(data, found, time.monotonic() + 5)
        return b""

    return action


def some_file(size: int = 0x1000) -> list[int]:
    fd = os.memfd_create("file")
    os.ftruncate(fd, size)
    return [fd]


def pipe() -> list[int]:
    return list(os.pipe())


def maps(
    status: int, fields: Mmap, files: Callable[[], list[int]] = some_file, name: str = "SHMEM_MAP"
) -> Deed:
    """A request about shared memory, and how it is answered."""

    def deed(stage: Stage) -> None:
        stage.backend.fds += (found := files())
        assert stage.backend.status_of(name, fields, found[:1]) == status

    return deed


def maps_and_cuts(stage: Stage) -> None:
    """What was mapped is gone; nobody of ours touches it."""
    maps(0, Mmap(0, 0, 0, 0x1000, 1))(stage)
    os.ftruncate(stage.backend.fds[-1], 0)


def maps_until_it_is_too_much(stage: Stage) -> None:
    for page in range(MAX_MAPPINGS):
        maps(0, Mmap(0, 0, 0x2000 * page, 0x1000, 0))(stage)
        os.close(stage.backend.fds.pop())
    maps(errno.ENOSPC, Mmap(0, 0, 0x2000 * MAX_MAPPINGS, 0x1000, 0))(stage)


def memory(stage: Stage) -> int:
    """The descriptor of guest memory that the backend got."""
    return next(fd for fd in stage.backend.fds if "memfd" in os.readlink(f"/proc/self/fd/{fd}"))


def refused(call: Callable[[int], object]) -> Deed:
    """Something that the kernel must not let anybody do to guest memory."""

    def deed(stage: Stage) -> None:
        with pytest.raises(PermissionError):
            call(memory(stage))

    return deed


def eventfds(stage: Stage) -> list[int]:
    return [fd for fd in stage.backend.fds if "eventfd" in os.readlink(f"/proc/self/fd/{fd}")]


def on_eventfds(*calls: Callable[[int], object]) -> Deed:
    """The same to every doorbell and interrupt; then everything that reads or writes them is done."""

    def deed(stage: Stage) -> None:
        for fd in eventfds(stage):
            for call in calls:
                call(fd)
        driver = stage.driver
        for queue in range(3):
            driver.notify(queue)
            driver.mask(queue + 1)
            driver.pending(queue + 1)
            driver.mask(queue + 1, False)
        resets(stage)

    return deed


def closes_what_it_got(stage: Stage) -> None:
    while stage.backend.fds:
        os.close(stage.backend.fds.pop())
    resets(stage)


def storm_of_interrupts(stage: Stage) -> None:
    """From another thread, while vectors are masked, moved and reset."""
    over = threading.Event()
    fds = [os.dup(fd) for fd in eventfds(stage)]

    def run() -> None:
        while not over.is_set():
            for fd in fds:
                os.eventfd_write(fd, 1)

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(20):
        for vector in range(4):
            stage.driver.mask(vector)
            stage.driver.mask(vector, False)
    resets(stage)
    over.set()
    thread.join()
    for fd in fds:
        os.close(fd)


def seal(fd: int, seals: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)


def fill(fd: int) -> None:
    """Not one event more fits.  KVM empties what an interrupt is bound to at once."""
    try:
        os.set_blocking(fd, False)
        os.eventfd_write(fd, FULL)
    except BlockingIOError:
        return


# -- the table ---------------------------------------------------------------------------

SLOW = {"silent": True}
LATE, ENDED, LOST = "did not answer in time", "connection (was closed|broke)", "is lost|did not start"
ANSWERS: dict[str, tuple[fake.Action, str, dict[str, Any]]] = {
    "silence": (fake.silence, LATE, SLOW),
    "half a header": (fake.cut(5), LATE, SLOW),
    "a header only": (fake.cut(12), LATE, SLOW),
    "half a payload": (fake.cut(15), LATE, SLOW),
    "an answer that trickles": (trickle, LATE, SLOW),
    "the end": (fake.hang_up, ENDED, {}),
    "the end in a header": (fake.cut_and_hang_up(7), "in the middle of a message", {}),
    "the end in a payload": (fake.cut_and_hang_up(13), "in the middle of a message", {}),
    "a reply to another request": (fake.request_id(15), "reply to GET_PROTOCOL_FEATURES", {}),
    "a reply to an unknown request": (fake.request_id(4711), "reply to unknown request 4711", {}),
    "a reply to request 0": (fake.request_id(0), "reply to unknown request 0", {}),
    "no reply flag": (fake.flags(1), "flags 0x1", {}),
    "a reply that wants a reply": (fake.flags(0xD), "flags 0xd", {}),
    "another version": (fake.flags(6), "flags 0x6", {}),
    "reserved flags": (fake.flags(0x15), "flags 0x15", {}),
    "too short a payload": (fake.size(4), "with 4 bytes of payload", {}),
    "too long a payload": (fake.size(1000), "with 1000 bytes of payload", {}),
    "4 GiB of payload": (fake.size(0xFFFF_FFFF), "with 4294967295 bytes of payload", {}),
    "a descriptor": (fake.with_fds(1), "1 descriptors where 0 belong", {}),
    "32 descriptors": (fake.with_fds(32), "32 descriptors where 0 belong", {}),
    "33 descriptors": (fake.with_fds(33), "descriptors came with one message", {}),
    "noise": (fake.noise, "flags 0x312e312f", {}),
}

QUIET, SLOTS = fake.PROTOCOL & ~P.REPLY_ACK, fake.PROTOCOL | P.CONFIGURE_MEM_SLOTS | P.STATUS
SHARING = {"protocol": fake.PROTOCOL | P.SHMEM, "shared_memory": {0: 1 << 24, 3: 0x1000}}
OPENING = {
    **{f"GET_FEATURES: {what}": Case(told, {"GET_FEATURES": act}, None, {}, **more)
       for what, (act, told, more) in ANSWERS.items()},
    **{f"death at {name}": Case("no vhost-user dialogue", {name: fake.hang_up}) for name in (
        "SET_OWNER", "GET_FEATURES", "GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES",
        "SET_BACKEND_REQ_FD", "GET_QUEUE_NUM", "GET_CONFIG")},
    "an answer to SET_OWNER": Case("reply to SET_OWNER where", {"SET_OWNER": unasked}),
    "SET_BACKEND_REQ_FD is refused": Case("refused SET_BACKEND_REQ_FD",
                                          {"SET_BACKEND_REQ_FD": fake.status(1)}),
    "no memory slots": Case("guest RAM has 1 pieces, and the backend takes 0",
                            options={"protocol": SLOTS, "slots": 0}),
    **{f"shared memory {what}": Case(told, options={**SHARING, "shared_memory": sizes})
       for what, told, sizes in (
        ("of 2**63 bytes", "bytes of shared memory", {0: 1 << 63}),
        ("of 256 regions of 2**63 bytes", "bytes of shared memory", dict.fromkeys(range(256), 1 << 63)),
        ("of 5 regions", "5 shared memory regions", dict.fromkeys(range(5), 0x1000)),
        ("of half a page", "no whole pages", {0: 0x800}))},
    "no queues": Case("3 queues, but the backend has 0", options={"queues": 0}),
    "too few queues": Case("3 queues, but the backend has 2", options={"queues": 2}),
    "configuration of another length": Case("GET_CONFIG of 8 bytes was answered with 300",
                                            {"GET_CONFIG": fake.reply(Config(0, 0, bytes(300)))}),
    "configuration of another place": Case("GET_CONFIG of 8 bytes was answered with 8 at 4096",
                                           {"GET_CONFIG": fake.reply(Config(4096, 0, bytes(8)))}),
}  # fmt: skip

SETTING_UP = ("SET_FEATURES", "SET_MEM_TABLE", "SET_VRING_NUM", "SET_VRING_BASE", "SET_VRING_ADDR")
SETTING_UP += ("SET_VRING_CALL", "SET_VRING_KICK", "SET_VRING_ENABLE")
STARTING = {
    **{f"death at {name}": Case(ENDED, {name: fake.hang_up}) for name in SETTING_UP},
    **{f"{name} is refused": Case(f"refused {name}", {name: fake.status(1)}) for name in SETTING_UP},
    **{f"silence at {name}": Case(LATE, {name: fake.silence}, None, {}, **SLOW) for name in SETTING_UP[::3]},
    "status -1": Case("refused SET_FEATURES", {"SET_FEATURES": fake.status((1 << 64) - 1)}),
    "an ack too many": Case("reply to SET_FEATURES where", {"SET_FEATURES": fake.twice}),
    "acks that nobody asked for": Case("reply to SET_FEATURES where", {"SET_FEATURES": unasked}, None,
                                       {"protocol": QUIET}),
    "features are not accepted": Case("refuses the driver's features", {"GET_STATUS": fake.reply(U64(3))},
                                      None, {"protocol": SLOTS}),
    "a status is refused": Case("refused SET_STATUS", {("SET_STATUS", 1): fake.status(1)}, None,
                                {"protocol": SLOTS}),
    **{f"death at {name}": Case(ENDED, {name: fake.hang_up}, None, {"protocol": SLOTS})
       for name in ("GET_STATUS", "GET_INFLIGHT_FD", "SET_INFLIGHT_FD", "ADD_MEM_REG")},
    "ADD_MEM_REG is refused": Case("refused ADD_MEM_REG", {"ADD_MEM_REG": fake.status(1)}, None,
                                   {"protocol": SLOTS}),
    **{f"an in-flight buffer {what}": Case(told, {"GET_INFLIGHT_FD": act}) for what, told, act in (
        ("of 2**64 - 1 bytes", "has 18446744073709551615 bytes", buffer((1 << 64) - 1, 0, some_file)),
        ("of 1 TiB", "has 1099511627776 bytes", buffer(1 << 40, 0, some_file)),
        ("of no bytes", "has 0 bytes", buffer(0, 0, some_file)),
        ("beyond its file", "beyond its file of 4096 bytes", buffer(0x1001, 0, some_file)),
        ("that wraps around", "beyond its file", buffer(0x1000, (1 << 64) - 0x800, some_file)),
        ("without a file", "has no descriptor", buffer(0x1000)),
        ("in a device", "is no file", buffer(0x1000, 0, lambda: [os.open("/dev/zero", os.O_RDWR)])),
        ("in a folder", "is no file", buffer(0x1000, 0, lambda: [os.open("/", os.O_RDONLY)])),
        ("in a socket", "is no file", buffer(0x1000, 0, lambda: [os.eventfd(0)])),
        ("in two files", "2 descriptors where 0 to 1 belong", buffer(0x1000, 0, pipe)))},
    "descriptors with an ack": Case("2 descriptors where 0 belong", {"SET_VRING_KICK": fake.with_fds(2)}),
}  # fmt: skip

RUNNING = {
    # while the guest runs
    "death": Case("closed the connection", deed=dies),
    "megabytes that nobody asked for": Case("GET_CONFIG: .*flags", deed=talks),
    **{f"GET_CONFIG: {what}": Case(told, {("GET_CONFIG", 1): act}, reads, {}, **more)
       for what, (act, told, more) in ANSWERS.items() if what != "too long a payload"},
    "configuration cannot be read": Case("refused GET_CONFIG",
                                         {("GET_CONFIG", 1): fake.reply(Empty())}, reads, heals=True),
    "configuration of another length": Case("8 bytes was answered with 4",
                                            {("GET_CONFIG", 1): fake.reply(Config(0, 0, bytes(4)))}, reads),
    "configuration cannot be written": Case("refused SET_CONFIG", {"SET_CONFIG": fake.status(1)}, writes,
                                            heals=True),
    "death at SET_CONFIG": Case(LOST, {"SET_CONFIG": fake.hang_up}, writes),
    "a vector is refused": Case("did not take an interrupt", {("SET_VRING_CALL", 3): fake.status(1)},
                                moves_a_vector),
    # when it stops
    "death at GET_VRING_BASE": Case(LOST, {"GET_VRING_BASE": fake.hang_up}, resets),
    "another ring's base": Case(LOST, {"GET_VRING_BASE": fake.reply(VringState(7, 0))},
                                resets),
    "a ring is not disabled": Case(LOST, {("SET_VRING_ENABLE", 4): fake.status(1)}, resets),
    "a stop without an answer": Case(LOST, {"GET_VRING_BASE": fake.silence}, resets,
                                     {}, **SLOW),
    # its own requests
    "a flood of changes": Case("", deed=floods(False)),
    "a flood of changes, acks unread": Case("did not take a message", deed=floods(True)),
    "half a request": Case("", deed=notice(request("CONFIG_CHANGE_MSG")[:7])),
    "half a request, then the end": Case("", deed=notice(request("CONFIG_CHANGE_MSG")[:7], then_end=True)),
    "the end of its requests": Case("", deed=notice(b"\2", then_end=True)),
    "an unknown request": Case("", deed=notice(encode_request(Request(1006, "DANCE"), Empty()))),
    "a request that is a reply": Case("CONFIG_CHANGE_MSG with flags 0x5", deed=notice(HEADER.pack(2, 5, 0))),
    "a request of 4 GiB": Case("with 4294967295 bytes", deed=notice(HEADER.pack(2, 1, 0xFFFF_FFFF))),
    "a request with a descriptor": Case("1 descriptors where 0",
                                        deed=notice(request("CONFIG_CHANGE_MSG"), 1)),
    "a request with 34 descriptors": Case("more than 32 descriptors",
                                          deed=notice(request("CONFIG_CHANGE_MSG"), 34)),
    "noise as requests": Case("with flags", deed=notice(b"GET / HTTP/1.1\r\n\r\n")),
    **{f"{name} though not agreed on": Case(f"{name} without", deed=notice(request(name), fds))
       for name, fds in (("SHMEM_MAP", 1), ("SHMEM_UNMAP", 0), ("VRING_CALL", 0), ("SHARED_OBJECT_ADD", 0),
                         ("VRING_HOST_NOTIFIER_MSG", 1))},
    "an address translation": Case("IOTLB_MSG before", deed=notice(request("IOTLB_MSG"))),
    # shared memory regions
    **{f"a mapping {what}": Case("", {}, maps(status, *more), SHARING) for what, status, *more in (
        ("in a region that is not there", errno.EINVAL, Mmap(1, 0, 0, 0x1000, 0)),
        ("in region 255", errno.EINVAL, Mmap(255, 0, 0, 0x1000, 0)),
        ("beyond its region", errno.EINVAL, Mmap(3, 0, 0x1000, 0x1000, 0)),
        ("across the end of its region", errno.EINVAL, Mmap(3, 0, 0, 0x2000, 0), lambda: some_file(0x2000)),
        ("at the end of addresses", errno.EINVAL, Mmap(0, 0, (1 << 64) - 0x1000, 0x1000, 0)),
        ("that wraps around", errno.EINVAL, Mmap(0, 0, 0x1000, (1 << 64) - 0x1000, 0)),
        ("of nothing", errno.EINVAL, Mmap(0, 0, 0, 0, 0)),
        ("of half a page", errno.EINVAL, Mmap(0, 0, 0, 0x800, 0)),
        ("at half a page", errno.EINVAL, Mmap(0, 0, 0x800, 0x1000, 0)),
        ("beyond its file", errno.EINVAL, Mmap(0, 0x1000, 0, 0x1000, 0)),
        ("from the end of numbers", errno.EINVAL, Mmap(0, (1 << 64) - 0x1000, 0, 0x1000, 0)),
        ("with strange flags", errno.EINVAL, Mmap(0, 0, 0, 0x1000, 0xFFFE)),
        ("of a pipe", errno.ENODEV, Mmap(0, 0, 0, 0x1000, 0), pipe),
        ("that cannot be written", errno.EACCES, Mmap(0, 0, 0, 0x1000, 1),
         lambda: [os.open(__file__, os.O_RDONLY)]))},
    "something is unmapped that is not": Case("", {}, maps(errno.EINVAL, Mmap(0, 0, 0, 0x1000, 0),
                                                          list, "SHMEM_UNMAP"), SHARING),
    "a mapping without a file": Case("0 descriptors where 1", {}, notice(request("SHMEM_MAP")), SHARING),
    "a mapping loses its memory": Case("", {}, maps_and_cuts, SHARING),
    "more mappings than there can be": Case("", {}, maps_until_it_is_too_much, SHARING),
    # what it was given
    "it closes all it got": Case("", deed=closes_what_it_got),
    "memory is truncated": Case("", deed=refused(lambda fd: os.ftruncate(fd, 0))),
    "memory is extended": Case("", deed=refused(lambda fd: os.ftruncate(fd, 1 << 40))),
    "memory is sealed against writing": Case("", deed=refused(lambda fd: seal(fd, F_SEAL_WRITE))),
    "memory is sealed for all others": Case("", deed=refused(lambda fd: seal(fd, F_SEAL_FUTURE_WRITE))),
    "doorbells that block": Case("", deed=on_eventfds(lambda fd: os.set_blocking(fd, True))),
    "doorbells that are full": Case("", deed=on_eventfds(fill)),
    "doorbells that block and are full": Case("", deed=on_eventfds(
        fill, lambda fd: os.set_blocking(fd, True))),
    "a storm of interrupts": Case("", deed=storm_of_interrupts),
    # what it says about itself
    "it offers every virtio feature": Case("", options={"virtio": (1 << 64) - 1}),
    "it has 2**64 - 1 queues": Case("", options={"queues": (1 << 64) - 1}),
    "it answers byte by byte": Case("", {"GET_FEATURES": fake.drip, "SET_FEATURES": fake.drip,
                                         "GET_CONFIG": fake.drip}, reads),
}  # fmt: skip
TABLE = {"opening": OPENING, "starting": STARTING, "running": RUNNING}


# -- the tests ---------------------------------------------------------------------------


def rows(stage: str) -> Any:
    return pytest.mark.parametrize("case", TABLE[stage].values(), ids=TABLE[stage])


@pytest.fixture
def machine(tmp_path: Any) -> Callable[..., cfg.VmConfig]:
    """Makes the configuration of a machine with both devices, around a guest that spins."""

    def make(backend: FakeBackend, deadline: float = 10.0) -> cfg.VmConfig:
        kernel = tmp_path / "vmlinux"
        kernel.write_bytes(pvh_elf(SPIN, base=BASE))
        victim = cfg.GenericDevice("vsock", fd=os.dup(backend.frontend_end.fileno()), queue_sizes=(8, 8, 8))
        backend.frontend_end.close()
        return cfg.VmConfig(
            cfg.PayloadConfig(str(kernel)),
            memory=cfg.MemoryConfig(64 << 20),
            devices=(victim, cfg.RngDevice("/dev/zero")),
            deadline=deadline,
        )

    return make


@pytest.fixture
def backend(case: Case) -> Any:
    with leaves_nothing():
        made = FakeBackend(script=case.script, **case.options)
        yield made
        made.close()


def test_the_table_is_long_enough() -> None:
    assert sum(len(cases) for cases in TABLE.values()) >= 40


@rows("opening")
def test_opening(case: Case, backend: FakeBackend, machine: Any) -> None:
    """The user is told in one line; nothing of the machine is left, the other backend included."""
    with EventLoop() as loop, pytest.raises(ConfigError, match=case.told) as caught:
        Vm(machine(backend, SILENCE if case.silent else 10.0), loop)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("vsock: ")


@rows("starting")
def test_starting(case: Case, backend: FakeBackend, machine: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """The device asks for a reset as soon as the driver has started it."""
    with EventLoop() as loop, Vm(machine(backend), loop) as built:
        stage = Stage(built, backend, case)

        def steps() -> None:
            stage.other.start()
            stage.start()
            assert stage.driver.status & spec.NEEDS_RESET
            stage.machine_answers()
            stage.other_device_works()

        scenario(built, loop, steps)
    assert re.search(case.told, capfd.readouterr().err)


@rows("running")
def test_running(case: Case, backend: FakeBackend, machine: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """The device asks for a reset, or works on as if nothing had been."""
    with EventLoop() as loop, Vm(machine(backend), loop) as built:
        stage = Stage(built, backend, case)

        def steps() -> None:
            stage.other.start()
            stage.start()
            assert not stage.driver.status & spec.NEEDS_RESET
            if case.deed is not None:
                case.deed(stage)
            if case.told:
                stage.await_wish()
            stage.machine_answers()
            stage.start()
            assert bool(stage.driver.status & spec.NEEDS_RESET) == bool(case.told and not case.heals)
            stage.other_device_works()

        scenario(built, loop, steps)
    assert re.search(case.told, capfd.readouterr().err)
