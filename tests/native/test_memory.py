"""Guest RAM, foreign files and address reservations; no KVM needed."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import mmap
import os
import signal
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from pyvmm._native import memory
from pyvmm.errors import ConfigError

PAGE = mmap.PAGESIZE


def at(address, length):
    return ctypes.string_at(address, length)


def maps(address):
    """The permissions that /proc/self/maps has for an address, or None."""
    with open("/proc/self/maps") as lines:
        for line in lines:
            span, permissions = line.split()[:2]
            first, last = (int(end, 16) for end in span.split("-"))
            if first <= address < last:
                return permissions
    return None


@pytest.fixture
def region():
    region = memory.GuestRegion(4 * PAGE)
    yield region
    gc.collect()
    region.close()


@pytest.fixture
def file(tmp_path):
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"".join(bytes([i]) * PAGE for i in range(1, 5)))
    yield fd
    os.close(fd)


def test_buffer_address_and_file_are_the_same_memory(region):
    with memoryview(region) as view:
        assert (view.nbytes, view.readonly, len(region)) == (4 * PAGE, False, 4 * PAGE)
        view[PAGE : PAGE + 5] = b"guest"
    assert at(region.address + PAGE, 5) == b"guest"
    assert os.pread(region.fd, 5, PAGE) == b"guest"


@pytest.mark.parametrize("size", [PAGE, 8 * PAGE])
def test_size_is_sealed(region, size):
    with pytest.raises(PermissionError):
        os.ftruncate(region.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(region.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    assert fcntl.fcntl(region.fd, fcntl.F_GET_SEALS) == wanted


def test_descriptor_is_named_and_closed_on_exec():
    region = memory.GuestRegion(PAGE, "my-ram")
    assert os.readlink(f"/proc/self/fd/{region.fd}") == "/memfd:my-ram (deleted)"
    assert not os.get_inheritable(region.fd)
    region.close()


def test_close_releases_descriptor_and_mapping():
    region = memory.GuestRegion(4 * PAGE)
    fd, address = region.fd, region.address
    region.close()
    region.close()
    assert (region.fd, region.address) == (-1, 0)
    assert maps(address) is None
    with pytest.raises(OSError):
        os.fstat(fd)
    with pytest.raises(ValueError, match="closed"):
        memoryview(region)


def test_close_refuses_while_a_view_lives(region):
    view = memoryview(region)
    with pytest.raises(BufferError, match="1 memoryviews"):
        region.close()
    view[0] = 1
    view.release()


def test_close_while_another_thread_asks_for_a_view():
    """Either the view is there and close refuses, or the region is closed and the view is refused."""
    for _ in range(20):
        region = memory.GuestRegion(16 << 20, prefault=True)  # takes a while to unmap
        seen = []

        def look(region=region, seen=seen):
            try:
                while True:
                    with memoryview(region) as view:
                        seen.append(view[-1])
            except ValueError:
                seen.append("closed")

        thread = threading.Thread(target=look)
        thread.start()
        while not seen:
            time.sleep(0)
        while region.address:
            try:
                region.close()
            except BufferError:
                continue
        thread.join(30)
        assert seen[-1] == "closed"


def test_collected_region_releases_everything():
    region = memory.GuestRegion(PAGE)
    fd = region.fd
    del region
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(fd)


@pytest.mark.parametrize("size", [0, -PAGE, PAGE + 1])
def test_size_must_be_whole_pages(size):
    with pytest.raises(ConfigError, match="not a multiple of the page size 0x1000"):
        memory.GuestRegion(size)


def test_size_beyond_the_address_space_is_an_error_in_words():
    with pytest.raises(ConfigError, match="memory of .* MiB: .*; choose a smaller size"):
        memory.GuestRegion(1 << 56)


def test_memory_is_allocated_on_demand_or_at_once():
    lazy = memory.GuestRegion(64 * PAGE)
    eager = memory.GuestRegion(64 * PAGE, prefault=True)
    assert os.fstat(lazy.fd).st_blocks == 0
    assert os.fstat(eager.fd).st_blocks * 512 == 64 * PAGE
    lazy.close()
    eager.close()


def test_a_signal_ends_the_allocation_of_everything():
    """The handler raises as soon as a part is there; until then it comes again, ever later.

    Its coming interrupts fallocate, which begins anew.
    """
    size, before, found, delay = 512 << 20, shared_memory(), [], 0.001

    def handle(*_):
        nonlocal delay
        found.append(shared_memory() - before)
        if found[-1]:
            raise KeyboardInterrupt
        delay *= 2
        signal.setitimer(signal.ITIMER_REAL, delay)

    previous = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, delay)
    try:
        with pytest.raises(KeyboardInterrupt):
            memory.GuestRegion(size, prefault=True)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert found[-1] <= size * 3 // 4
    assert shared_memory() - before < 1 << 20, "what was allocated is given back"


def shared_memory():
    """Bytes of files in memory that this process has mapped, memfds among them (proc_pid_statm(5))."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * PAGE


def test_hugepages_or_what_to_do_about_them():
    page = memory.huge_page_size()
    try:
        region = memory.GuestRegion(page, hugepages=True)
    except ConfigError as error:
        message = f"hugepages: 1 pages of {page >> 20} MiB are needed and 0 are free"
        assert str(error).startswith(message)
        assert "/proc/sys/vm/nr_hugepages" in str(error)
    else:
        assert os.fstat(region.fd).st_blksize == page
        region.close()


def test_hugepages_want_whole_huge_pages():
    with pytest.raises(ConfigError, match="not a multiple of the page size 0x"):
        memory.GuestRegion(memory.huge_page_size() + PAGE, hugepages=True)


def test_too_many_hugepages_leave_no_descriptor():
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match="are needed and"):
        memory.GuestRegion(1 << 40, hugepages=True)
    assert os.listdir("/proc/self/fd") == before


def test_region_is_initialised_once(region):
    with pytest.raises(RuntimeError):
        region.__init__(PAGE)


@pytest.mark.parametrize("offset", [0, PAGE, PAGE + 100])
def test_file_region_shows_its_part_of_the_file(file, offset):
    region = memory.FileRegion(file, offset, 2 * PAGE, True)
    expected = os.pread(file, 2 * PAGE, offset)
    with memoryview(region) as view:
        assert view == expected
        view[1] = 0xEE
    assert at(region.address, 2) == expected[:1] + b"\xee"
    assert os.pread(file, 1, offset + 1) == b"\xee"
    region.close()


def test_file_region_has_its_own_descriptor(file):
    other = os.dup(file)
    region = memory.FileRegion(other, 0, PAGE, False)
    os.close(other)
    assert os.pread(region.fd, 1, 0) == b"\x01"
    assert not os.get_inheritable(region.fd)
    with memoryview(region) as view:
        assert view.readonly
    region.close()
    with pytest.raises(TypeError):
        region[0] = 1


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 4 * PAGE + 1), (4 * PAGE, 1), (-PAGE, PAGE), (0, 0), (0, -1)]
)
def test_file_region_must_lie_within_the_file(file, offset, size):
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ValueError, match="range|within"):
        memory.FileRegion(file, offset, size, True)
    assert os.listdir("/proc/self/fd") == before


def test_file_that_cannot_be_mapped_is_an_os_error():
    reader, writer = os.pipe()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="mmap"):
        memory.FileRegion(reader, 0, PAGE, False)
    assert os.listdir("/proc/self/fd") == before
    os.close(reader)
    os.close(writer)


def test_address_space_maps_and_unmaps_pieces(file):
    space = memory.AddressSpace(8 * PAGE)
    assert maps(space.address) == "---p"
    space.map(2 * PAGE, file, PAGE, 2 * PAGE, True)
    assert at(space.address + 2 * PAGE, 1) + at(space.address + 3 * PAGE, 1) == b"\x02\x03"
    assert maps(space.address + 2 * PAGE) == "rw-s"
    assert (maps(space.address + PAGE), maps(space.address + 4 * PAGE)) == ("---p", "---p")
    space.map(2 * PAGE, file, 0, PAGE, False)
    assert maps(space.address + 2 * PAGE) == "r--s"
    assert at(space.address + 2 * PAGE, 1) == b"\x01"
    space.unmap(0, 8 * PAGE)
    assert maps(space.address + 2 * PAGE) == "---p"
    space.close()


def test_closed_address_space_gives_the_addresses_back():
    space = memory.AddressSpace(8 * PAGE)
    address = space.address
    space.close()
    space.close()
    assert (maps(address), space.address) == (None, 0)
    with pytest.raises(ValueError, match="closed"):
        space.unmap(0, PAGE)


@pytest.mark.parametrize(
    ("offset", "fd_offset", "length"),
    [(8, 0, 1), (7, 0, 2), (-1, 0, 1), (0, 0, 0), (0, 4, 1), (0.5, 0, 1), (0, 0.5, 1), (0, 0, 0.5)],
)
def test_address_space_refuses_what_is_out_of_bounds(file, offset, fd_offset, length):
    space = memory.AddressSpace(8 * PAGE)
    pages = (int(value * PAGE) for value in (offset, fd_offset, length))
    offset, fd_offset, length = pages
    with pytest.raises(ValueError, match="within|boundar|range"):
        space.map(offset, file, fd_offset, length, True)
    assert maps(space.address) == "---p"
    space.close()


@pytest.mark.parametrize("prefault", [False, True])
def test_clear_empties_every_mapping(prefault):
    """Pages go back to the host unless they were promised; a peer's mapping shows zeros."""
    region = memory.GuestRegion(64 * PAGE, prefault=prefault)
    with mmap.mmap(region.fd, 64 * PAGE) as peer:
        peer[:] = b"x" * (64 * PAGE)
        region.clear()
        blocks = os.fstat(region.fd).st_blocks * 512
        assert blocks == (64 * PAGE if prefault else 0)
        assert not any(peer[:])
        peer[5:6] = b"y"
        assert at(region.address + 5, 1) == b"y"
    region.close()
    with pytest.raises(ValueError, match="closed"):
        region.clear()
