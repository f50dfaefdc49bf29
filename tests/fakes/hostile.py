"""A machine with two devices, one of whose backends is hostile, and what such a backend does.

A deed is a function of the `Stage`, done while the guest runs.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import backend as fake
from fakes.backend import FakeBackend
from fakes.driver import ConfigAccess, VirtioDriver
from fakes.entropy import Entropy, eventually, loop_answers
from fakes.program import SPIN, pvh_elf

from pyvmm import config as cfg
from pyvmm.errors import BackendLost
from pyvmm.pci import config as pci
from pyvmm.vhost_user.codec import encode_ack
from pyvmm.vhost_user.link import Link
from pyvmm.vhost_user.messages import BACKEND_REQUESTS, HEADER
from pyvmm.vhost_user.payloads import Inflight, Mmap
from pyvmm.vhost_user.shared_memory import MAX_MAPPINGS
from pyvmm.virtio import spec
from pyvmm.vm import Vm

SILENCE = 1.0  # seconds: the deadline where a backend is silent
BASE, RINGS, OTHER_RINGS = 0x40_0000, 0x10_0000, 0x20_0000
VICTIM, OTHER = 1, 2  # slots
FULL = (1 << 64) - 2  # of an eventfd's counter
FLOOD = 3000
F_SEAL_WRITE, F_SEAL_FUTURE_WRITE = 8, 16


class Stage:
    """A machine with the victim, whose backend is hostile, and another device."""

    def __init__(self, built: Vm, backend: FakeBackend, silent: bool = False) -> None:
        self.backend, self.loop = backend, built.loop
        self.driver = VirtioDriver(built.board.mmio, ConfigAccess(built.board.mmio, VICTIM))
        self.other = Entropy(built, OTHER, OTHER_RINGS)
        self.frontend = built._frontends[0]
        if silent:  # of the victim's alone: the other backend is a process that has to be scheduled
            self.frontend._deadline = SILENCE
            self.link.client.deadline = SILENCE

    @property
    def link(self) -> Link:
        """The victim's connection, which it has."""
        link = self.frontend._link
        assert link is not None
        return link

    @property
    def connected(self) -> bool:
        """Whether the victim has a backend that works."""
        return self.frontend._link is not None

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

    def await_wish(self, wish: bool = True) -> None:
        """Wait until the victim asks for a reset, or no longer does."""
        eventually(lambda: bool(self.driver.status & spec.NEEDS_RESET) == wish)

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


class Place:
    """Where one scripted backend after the other answers: `options` of each, the last for all that follow.

    Give it to `with`.
    """

    def __init__(self, folder: Path, *options: dict[str, Any]) -> None:
        self.path = str(folder / "backend.sock")
        self.backends: list[FakeBackend] = []
        self._options = options
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def __getitem__(self, index: int) -> FakeBackend:
        """The backend with this number, which has been connected to or is about to be."""
        eventually(lambda: len(self.backends) > index)
        return self.backends[index]

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        os.unlink(self.path)
        for backend in self.backends:
            backend.close()

    def _accept(self) -> None:
        while True:
            try:
                sock = self._listener.accept()[0]
            except OSError:
                return
            options = self._options[min(len(self.backends), len(self._options) - 1)]
            self.backends.append(FakeBackend(sock=sock, **options))


def two_devices(folder: Path, victim: cfg.GenericDevice, **more: Any) -> cfg.VmConfig:
    """A machine with the victim and an entropy device, around a guest that spins."""
    kernel = folder / "vmlinux"
    kernel.write_bytes(pvh_elf(SPIN, base=BASE))
    return cfg.VmConfig(
        cfg.PayloadConfig(str(kernel)),
        memory=cfg.MemoryConfig(64 << 20),
        devices=(victim, cfg.RngDevice("/dev/zero")),
        **more,
    )


Deed = Callable[[Stage], object]


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
