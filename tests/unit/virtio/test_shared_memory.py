"""The BAR of shared memory over slots and host addresses that only take notes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyvmm.errors import ConfigError, KvmError
from pyvmm.virtio.shared_memory import SharedMemoryBar

PAGE = 0x1000
HOST, GUEST = 0x7000_0000, 0x1_0000_0000


class Space:
    """Host addresses."""

    address = HOST

    def __init__(self, size: int) -> None:
        self.size = size
        self.mapped: dict[int, tuple[int, int, int, bool]] = {}
        self.closed = False

    def map(self, offset: int, fd: int, fd_offset: int, length: int, writable: bool) -> None:
        assert offset >= 0 and offset + length <= self.size
        self.mapped[offset] = (fd, fd_offset, length, writable)

    def unmap(self, offset: int, length: int) -> None:
        assert self.mapped.pop(offset)[2] == length

    def intact(self, offset: int, length: int) -> bool:
        return offset != 0

    def close(self) -> None:
        self.closed = True


class Slots:
    """Memory slots; `refuse` makes KVM refuse the next one."""

    def __init__(self) -> None:
        self.there: dict[int, tuple[int, int, int, bool]] = {}
        self.refuse = False

    def add(self, guest_address: int, size: int, host_address: int, *, readonly: bool) -> int:
        if self.refuse:
            raise KvmError(28, "no room")
        number = max(self.there, default=7) + 1
        self.there[number] = (guest_address, size, host_address, readonly)
        return number

    def remove(self, slot: int) -> None:
        del self.there[slot]


class Bench:
    def __init__(self) -> None:
        self.bar = SharedMemoryBar("dev", ((1, 2 * PAGE), (0, 8 * PAGE)))
        self.slots, self.spaces = Slots(), list[Space]()
        self.bar.open(self.reserve, self.slots)

    def reserve(self, size: int) -> Space:
        self.spaces.append(Space(size))
        return self.spaces[-1]

    @property
    def shown(self) -> set[tuple[int, int, int, bool]]:
        return set(self.slots.there.values())


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.bar.close()
    assert not bench.slots.there and bench.spaces[0].closed


def test_the_bar_holds_all_regions(bench: Bench) -> None:
    assert (bench.bar.size, bench.bar.regions) == (16 * PAGE, {0: (0, 8 * PAGE), 1: (8 * PAGE, 2 * PAGE)})
    assert bench.spaces[0].size == 16 * PAGE
    assert bench.bar.read(0, 8) == 0
    bench.bar.write(0, 8, 1)


@pytest.mark.parametrize("writable", [True, False])
def test_a_mapping_is_a_slot_of_its_own(bench: Bench, writable: bool) -> None:
    bench.bar.moved(GUEST)
    bench.bar.map(1, PAGE, 9, 3 * PAGE, PAGE, writable)
    assert bench.spaces[0].mapped == {9 * PAGE: (9, 3 * PAGE, PAGE, writable)}
    assert bench.shown == {(GUEST + 9 * PAGE, PAGE, HOST + 9 * PAGE, not writable)}
    bench.bar.unmap(1, PAGE)
    assert not bench.shown and not bench.spaces[0].mapped


def test_a_bar_that_is_not_decoded_shows_nothing(bench: Bench) -> None:
    bench.bar.map(0, 0, 9, 0, PAGE, True)
    assert not bench.shown and bench.spaces[0].mapped
    for place in (GUEST, None, 2 * GUEST, 3 * GUEST):
        bench.bar.moved(place)
        assert bench.shown == ({(place, PAGE, HOST, False)} if place else set())


def test_what_kvm_refuses_is_not_mapped(bench: Bench) -> None:
    bench.bar.moved(GUEST)
    bench.slots.refuse = True
    with pytest.raises(KvmError):
        bench.bar.map(0, 0, 9, 0, PAGE, True)
    assert not bench.spaces[0].mapped
    bench.slots.refuse = False
    bench.bar.map(0, 0, 9, 0, PAGE, True)


def test_a_move_that_kvm_refuses_costs_what_is_seen_only(
    bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.bar.moved(GUEST)
    bench.bar.map(0, 0, 9, 0, PAGE, True)
    bench.slots.refuse = True
    bench.bar.moved(2 * GUEST)
    assert not bench.shown
    assert "dev: shared memory reads zeros: " in capfd.readouterr().err
    bench.slots.refuse = False
    bench.bar.moved(GUEST)
    assert len(bench.shown) == 1


def test_what_is_intact_is_asked_of_the_host(bench: Bench) -> None:
    bench.bar.map(0, 0, 9, 0, PAGE, True)
    bench.bar.map(0, PAGE, 9, 0, PAGE, True)
    assert [bench.bar.intact(0, at * PAGE) for at in range(3)] == [False, True, True]


def test_after_the_end(bench: Bench) -> None:
    bench.bar.close()
    assert not bench.bar.is_open
    with pytest.raises(OSError, match="the machine ends"):
        bench.bar.map(0, 0, 9, 0, PAGE, True)
    bench.bar.unmap(0, 0)
    assert bench.bar.intact(0, 0)


def test_too_little_address_space_is_an_error_in_words() -> None:
    def refuse(size: int) -> Space:
        raise OSError(12, f"mmap of {size:#x} bytes")

    with pytest.raises(
        ConfigError, match=r"dev: no room for 0x1000 bytes of shared memory: .*raise ulimit -v"
    ):
        SharedMemoryBar("dev", ((0, PAGE),)).open(refuse, Slots())
