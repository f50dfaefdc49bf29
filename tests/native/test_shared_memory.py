"""A guest in whose BAR a backend maps files: real bytes in both directions, and what is left of them.

In one file because every case plays the same guest.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.backend import FakeBackend, no_new_fds
from fakes.driver import ConfigAccess, VirtioDriver
from fakes.entropy import restart
from fakes.program import LIMIT, pvh_elf

from pyvmm import config as cfg
from pyvmm import layout
from pyvmm._native.memory import AddressSpace
from pyvmm.backend import Device, DeviceThread, SharedMemory
from pyvmm.errors import KvmError
from pyvmm.loop import EventLoop
from pyvmm.pci import config as pci
from pyvmm.slots import RAM_SLOTS, MemorySlots
from pyvmm.vhost_user.messages import ProtocolFeature as P
from pyvmm.vhost_user.payloads import Mmap
from pyvmm.vhost_user.shared_memory import WRITABLE
from pyvmm.virtio.shared_memory import SharedMemoryBar
from pyvmm.vm import STOPPED, Vm

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("need_kvm")]

PAGE = 0x1000
BASE = 0x40_0000  # of the guest's code
SEEN, SAY, ROUNDS = 0x10_0000, 0x10_0004, 0x10_0008  # what it reads, what it writes, how often it did
REGION = 4 * PAGE
PLACE, ELSEWHERE = 0xD000_0000, 0xD100_0000  # of the BAR: a guest without paging sees no higher
OFFER = P.MQ | P.REPLY_ACK | P.BACKEND_REQ | P.SHMEM
DATA = 0xC0DE_0001


def program(bar):
    """For ever: read the dword at 4 of the BAR, write one at 8, count."""
    accesses = (("a1", bar + 4), ("a3", SEEN), ("a1", SAY), ("a3", bar + 8), ("ff05", ROUNDS))
    body = b"".join(bytes.fromhex(code) + struct.pack("<I", address) for code, address in accesses)
    return body + b"\xeb" + struct.pack("b", -len(body) - 2)


class Peek:
    """A running machine with one device, whose backend is `backend`, and what the guest has noted."""

    def __init__(self, built, backend):
        self.built, self.backend = built, backend
        self.driver = VirtioDriver(built.board.mmio, ConfigAccess(built.board.mmio, 1))
        self.fd = os.memfd_create("shared")
        os.ftruncate(self.fd, 2 * REGION)
        os.pwrite(self.fd, struct.pack("<I", DATA), PAGE + 4)

    def place(self, address):
        """Move the BAR, as a guest would."""
        for offset, value in ((0, address), (4, 0)):
            self.driver.config.write(pci.BAR0 + 4 * 2 + offset, 4, value)

    def word(self, address):
        with memoryview(self.built.ram) as ram:
            return struct.unpack_from("<I", ram, address)[0]

    def say(self, value):
        with memoryview(self.built.ram) as ram:
            struct.pack_into("<I", ram, SAY, value)

    def sees(self):
        """What the guest reads now: two rounds later than at the call."""
        end, target = time.monotonic() + LIMIT, self.word(ROUNDS) + 2
        while self.word(ROUNDS) < target:
            assert time.monotonic() < end, "the guest does not go on"
            time.sleep(0.001)
        return self.word(SEEN)

    def file(self, offset=PAGE + 8):
        return struct.unpack("<I", os.pread(self.fd, 4, offset))[0]

    def map(self, flags=WRITABLE, length=PAGE, fd=None, shm_offset=0):
        wish = Mmap(0, PAGE, shm_offset, length, flags)
        return self.backend.status_of("SHMEM_MAP", wish, [self.fd if fd is None else fd])

    def unmap(self, length=PAGE):
        return self.backend.status_of("SHMEM_UNMAP", Mmap(0, 0, 0, length, 0))

    def close(self):
        os.close(self.fd)


@pytest.fixture
def watch(tmp_path):
    """Runs steps beside a machine whose guest runs `program`; they get a `Peek`."""

    def run(steps, code=None):
        kernel = tmp_path / "vmlinux"
        kernel.write_bytes(pvh_elf(code or program(PLACE), base=BASE))
        backend = FakeBackend(protocol=OFFER, shared_memory={0: REGION})
        device = cfg.GenericDevice("63", fd=os.dup(backend.frontend_end.fileno()), queue_sizes=(8,))
        config = cfg.VmConfig(
            cfg.PayloadConfig(str(kernel)), memory=cfg.MemoryConfig(64 << 20), devices=(device,)
        )
        problems = []

        def in_thread():
            try:
                steps(peek)
            except BaseException as problem:
                problems.append(problem)
            built.stop()

        with EventLoop() as loop, Vm(config, loop) as built:
            peek = Peek(built, backend)
            peek.driver.probe()
            peek.place(PLACE)
            thread = threading.Thread(target=in_thread)
            thread.start()
            outcome = built.run()
            thread.join()
        backend.close()
        peek.close()
        if problems:
            raise problems[0]
        assert outcome.kind == STOPPED

    with no_new_fds():
        yield run


def test_the_guest_sees_what_is_mapped_and_zeros_elsewhere(watch):
    def steps(peek):
        assert peek.driver.shared_memory == {0: (0, REGION)}
        assert peek.sees() == 0
        peek.say(0x5EE0)
        assert peek.map() == 0
        assert peek.sees() == DATA
        assert peek.file() == 0x5EE0
        os.pwrite(peek.fd, struct.pack("<I", 7), PAGE + 4)
        assert peek.sees() == 7
        assert peek.unmap() == 0
        peek.say(1)
        assert peek.sees() == 0
        assert peek.file() == 0x5EE0

    watch(steps)


def test_what_is_read_only_is_not_written(watch):
    def steps(peek):
        peek.say(0xBAD)
        assert peek.map(flags=0) == 0
        assert peek.sees() == DATA
        assert peek.file() == 0

    watch(steps)


def test_the_mapping_follows_the_bar(watch):
    def steps(peek):
        assert peek.map() == 0
        assert peek.sees() == DATA
        peek.place(ELSEWHERE)
        assert peek.sees() == 0xFFFF_FFFF  # nothing is there any more
        peek.place(PLACE)
        assert peek.sees() == DATA
        command = peek.driver.config.read(pci.COMMAND, 2)
        peek.driver.config.write(pci.COMMAND, 2, command & ~pci.COMMAND_MEMORY)
        assert peek.sees() == 0xFFFF_FFFF
        assert peek.map(shm_offset=PAGE) == 0
        peek.driver.config.write(pci.COMMAND, 2, command)
        assert peek.sees() == DATA

    watch(steps)


BAD_PLACES = {
    "address 0": 0,
    "RAM": SEEN & ~0xFFFF,
    "its own code": BASE,
    "configuration space": layout.ECAM_BASE,
    "the IOAPIC": layout.IOAPIC_BASE,
    "the local APIC": layout.LAPIC_BASE,
    "the hole's last pages": layout.KVM_TSS,
    "half of the window": layout.MMIO32_BASE - PAGE,
    "the last addresses": (1 << 64) - REGION,
    "its registers": None,
}


@pytest.mark.parametrize("place", BAD_PLACES.values(), ids=BAD_PLACES)
def test_a_guest_that_puts_it_where_it_must_not(watch, place):
    """Nobody sees anything there, nothing that is there goes away, and the way back is open."""

    def steps(peek):
        address = peek.driver.config.bar(0) if place is None else place
        assert peek.map() == 0 and peek.sees() == DATA
        for offset, value in ((0, address & 0xFFFF_FFFF), (4, address >> 32)):
            peek.driver.config.write(pci.BAR0 + 4 * 2 + offset, 4, value)
        assert peek.sees() == 0xFFFF_FFFF
        peek.say(0xBAD)
        assert peek.sees() == 0xFFFF_FFFF and peek.driver.status == 0
        assert peek.file() != 0xBAD
        peek.place(PLACE)
        assert peek.sees() == DATA

    watch(steps)


def test_it_moves_from_two_sides_while_it_is_read_and_mapped(watch):
    def steps(peek):
        over, failures = threading.Event(), []
        command = peek.driver.config.read(pci.COMMAND, 2)

        def beside(*actions):
            try:
                while not over.is_set():
                    for action in actions:
                        action()
            except BaseException as problem:
                failures.append(problem)

        def decode(on):
            peek.driver.config.write(pci.COMMAND, 2, command if on else command & ~pci.COMMAND_MEMORY)

        sides = (
            (lambda: decode(False), lambda: decode(True)),
            (lambda: peek.place(ELSEWHERE), lambda: peek.place(PLACE)),
        )
        threads = [threading.Thread(target=beside, args=actions) for actions in sides]
        for thread in threads:
            thread.start()
        for _ in range(100):
            assert (peek.map(), peek.unmap()) == (0, 0)
        over.set()
        for thread in threads:
            thread.join()
        assert not failures
        decode(True)
        peek.place(PLACE)
        assert peek.map() == 0 and peek.sees() == DATA

    watch(steps)


def test_a_reset_takes_mappings_away(watch):
    def steps(peek):
        peek.driver.start()
        peek.place(PLACE)
        assert peek.map() == 0
        assert peek.sees() == DATA
        peek.driver.reset()
        assert peek.sees() == 0
        assert peek.map() == 0
        assert peek.sees() == DATA

    watch(steps)


def test_a_guest_that_restarts_finds_nothing_mapped(watch):
    """The device is in a new machine then, in which the backend can map again."""

    def steps(peek):
        peek.built.config = peek.built.config.replace(reboot=True)
        assert peek.map() == 0 and peek.sees() == DATA
        restart(peek.built)
        peek.driver = VirtioDriver(peek.built.board.mmio, ConfigAccess(peek.built.board.mmio, 1))
        peek.driver.probe()
        peek.place(PLACE)
        assert peek.sees() == 0
        assert peek.map() == 0 and peek.sees() == DATA

    watch(steps)


def test_the_end_of_the_backend_takes_mappings_away(watch):
    def steps(peek):
        assert peek.map() == 0
        assert peek.sees() == DATA
        peek.backend.channel.shutdown()
        end = time.monotonic() + LIMIT
        while peek.sees():
            assert time.monotonic() < end

    watch(steps)


def test_a_file_that_is_cut_short_does_not_end_the_machine(watch, capfd):
    """Hardware virtualisation faults, and the device is lost; a KVM that emulates ring 0 reads zeros."""

    def steps(peek):
        assert peek.map() == 0
        assert peek.sees() == DATA
        os.ftruncate(peek.fd, 0)
        assert peek.sees() == 0
        assert peek.sees() == 0

    watch(steps)
    assert "exception" not in capfd.readouterr().err


def test_a_file_that_cannot_be_mapped_like_this_is_refused(watch):
    def steps(peek):
        reader = os.open(f"/proc/self/fd/{peek.fd}", os.O_RDONLY)
        assert peek.map(fd=reader) == 13  # EACCES
        assert peek.map(fd=reader, flags=0) == 0
        os.close(reader)
        assert peek.unmap() == 0
        near, far = os.pipe()
        assert peek.map(fd=near, flags=0) == 19  # ENODEV
        os.close(near)
        os.close(far)
        assert peek.map(length=2 * REGION) == 22  # EINVAL
        assert peek.sees() == 0

    watch(steps)


def test_a_hundred_cycles_leave_nothing(watch):
    def census():
        return len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())

    def steps(peek):
        before = census()
        for cycle in range(100):
            assert peek.map(length=REGION if cycle % 2 else PAGE) == 0
            assert peek.unmap(length=REGION if cycle % 2 else PAGE) == 0
        after = census()
        assert after[0] == before[0]
        assert after[1] <= before[1] + 2  # the allocator's
        assert peek.map() == 0
        assert peek.sees() == DATA

    watch(steps)


def test_a_device_in_python_fills_the_bar(tmp_path):
    class Window(Device):
        device_id = 63
        queue_sizes = (8,)
        shared_memory = {0: REGION}  # noqa: RUF012

    fd = os.memfd_create("window")
    os.pwrite(fd, struct.pack("<I", DATA), PAGE + 4)
    os.ftruncate(fd, 2 * PAGE)
    window = Window()
    memory = SharedMemory(window)
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(pvh_elf(program(PLACE), base=BASE))
    with no_new_fds(), DeviceThread(window) as thread, EventLoop() as loop:
        device = cfg.GenericDevice("63", fd=os.dup(thread.take_socket().fileno()), queue_sizes=(8,))
        config = cfg.VmConfig(
            cfg.PayloadConfig(str(kernel)), memory=cfg.MemoryConfig(64 << 20), devices=(device,)
        )
        with Vm(config, loop) as built:
            driver = VirtioDriver(built.board.mmio, ConfigAccess(built.board.mmio, 1))
            driver.probe()
            for offset, value in ((0, PLACE), (4, 0)):
                driver.config.write(pci.BAR0 + 4 * 2 + offset, 4, value)
            thread.call(lambda: memory.map(0, 0, fd, PAGE, fd_offset=PAGE))
            seen = []

            def look():
                with memoryview(built.ram) as ram:
                    seen.append(struct.unpack_from("<I", ram, SEEN)[0])
                if seen[-1] == DATA or len(seen) > 1000:
                    built.stop()
                else:
                    loop.call_later(0.01, look)

            look()
            assert built.run().kind == STOPPED
            assert seen[-1] == DATA
    os.close(fd)


# -- pieces ----------------------------------------------------------------------------------


def test_slots_are_used_again_and_run_out(guest):
    slots = MemorySlots(guest.vm, RAM_SLOTS + 2)
    space = AddressSpace(4 * PAGE)
    first = slots.add(PLACE, PAGE, space.address, readonly=False)
    second = slots.add(PLACE + PAGE, PAGE, space.address + PAGE, readonly=True)
    assert (first, second) == (RAM_SLOTS, RAM_SLOTS + 1)
    with pytest.raises(KvmError, match="all are in use"):
        slots.add(PLACE + 2 * PAGE, PAGE, space.address, readonly=False)
    slots.remove(first)
    with pytest.raises(KvmError, match="overlaps another memory slot"):
        slots.add(PLACE + PAGE, PAGE, space.address, readonly=False)
    assert slots.add(PLACE, PAGE, space.address, readonly=False) == first
    slots.remove(first)
    slots.remove(second)
    space.close()


def test_the_end_of_a_mapping_tells_whether_it_is_intact():
    fd = os.memfd_create("shared")
    os.ftruncate(fd, 4 * PAGE)
    space = AddressSpace(8 * PAGE)
    space.map(PAGE, fd, PAGE, 3 * PAGE, False)
    assert space.intact(PAGE, 3 * PAGE)
    os.ftruncate(fd, 3 * PAGE)
    assert not space.intact(PAGE, 3 * PAGE)
    os.ftruncate(fd, 4 * PAGE)
    assert space.intact(PAGE, 3 * PAGE)
    with pytest.raises(ValueError, match="within"):
        space.intact(PAGE, 8 * PAGE)
    space.close()
    os.close(fd)


def test_what_kvm_has_no_room_for_is_not_mapped(guest):
    fd = os.memfd_create("shared")
    os.ftruncate(fd, 4 * PAGE)
    bar = SharedMemoryBar("dev", ((0, REGION),))
    bar.open(AddressSpace, MemorySlots(guest.vm, RAM_SLOTS + 1))
    bar.moved(PLACE)
    bar.map(0, 0, fd, 0, PAGE, True)
    with pytest.raises(KvmError):
        bar.map(0, PAGE, fd, 0, PAGE, True)
    bar.unmap(0, PAGE)  # never was: harmless
    bar.unmap(0, 0)
    bar.map(0, PAGE, fd, 0, PAGE, True)
    bar.close()
    bar.close()
    os.close(fd)
