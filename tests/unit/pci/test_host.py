"""The host bridge: slots, configuration mechanisms, BARs that a guest puts anywhere."""

from __future__ import annotations

import pytest
from fakes.devices import FakeVm
from fakes.driver import ConfigAccess
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm import layout
from pyvmm.bus import Bus
from pyvmm.errors import ConfigError
from pyvmm.irq import InterruptRouter
from pyvmm.pci import config as cfg
from pyvmm.pci.config import ConfigSpace, Identity
from pyvmm.pci.function import Bar, PciFunction
from pyvmm.pci.host import PciHost, intx_gsi

MMIO64 = 8 << 30
IDENTITY = Identity(
    0x1234, 0x5678, 0x010203, revision=4, subsystem_vendor=0x11, subsystem=0x22, interrupt_pin=1
)


class Tag:
    """A BAR's device that answers with a number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def read(self, offset: int, width: int) -> int:
        return self.number

    def write(self, offset: int, width: int, value: int) -> None:
        pass


class Function(PciFunction):
    """A function with given BARs that keeps what it was told of them."""

    def __init__(self, number: int, *bars: Bar) -> None:
        super().__init__(f"function {number}", IDENTITY)
        self.where: dict[int, int | None] = {}
        self.closed = False
        for bar in bars:
            self.add_bar(bar)

    def bar_mapped(self, index: int, address: int | None) -> None:
        self.where[index] = address

    def close(self) -> None:
        self.closed = True


def one(number: int, size: int = 0x1000, wide: bool = True) -> Function:
    return Function(number, Bar(0, size, Tag(number), wide=wide))


@pytest.fixture
def mmio():
    return Bus("mmio")


@pytest.fixture
def host(mmio):
    return PciHost(mmio, InterruptRouter(FakeVm()), MMIO64)


def enable(access: ConfigAccess) -> None:
    access.write(cfg.COMMAND, 2, cfg.COMMAND_MEMORY)


def test_header(mmio, host):
    slot, number = host.add(one(1))
    assert (slot, number) == (1, 0)
    access = ConfigAccess(mmio, slot)
    assert access.read(0, 4) == 0x5678_1234
    assert access.read(8, 4) == 0x01_0203_04
    assert access.read(cfg.SUBSYSTEM_VENDOR_ID, 4) == 0x0022_0011
    assert access.read(cfg.HEADER_TYPE, 1) == 0
    assert access.read(cfg.INTERRUPT_LINE, 2) == 0x100 | intx_gsi(1, 1)
    assert access.read(0x100, 4) == access.read(0xFFC, 4) == 0  # no extended capabilities
    access.write(0, 4, 0)
    access.write(8, 4, 0)
    assert access.read(0, 4) == 0x5678_1234
    assert access.read(8, 4) == 0x01_0203_04


def test_absent_functions(mmio, host):
    host.add(one(1))
    for slot, number in ((1, 1), (2, 0), (31, 7)):
        access = ConfigAccess(mmio, slot, number)
        assert [access.read(0, width) for width in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFF_FFFF]
        access.write(0, 4, 0)


def test_host_bridge_is_first(mmio, host):
    access = ConfigAccess(mmio, 0)
    assert access.read(0, 4) == 0x0D57_8086
    assert access.read(cfg.CLASS_CODE, 3) == 0x060000


def test_ports(mmio, host):
    host.add(one(1))
    ports = Bus("io")
    ports.insert(layout.PORT_PCI_ADDRESS, 8, host.ports, "PCI")
    access = ConfigAccess(mmio, 1, ports=ports)
    assert access.read(0, 4) == 0x5678_1234
    assert access.read(2, 2) == 0x5678
    assert access.read(3, 1) == 0x56
    access.write(cfg.COMMAND, 2, cfg.COMMAND_MEMORY)
    assert access.read(cfg.COMMAND, 2) == cfg.COMMAND_MEMORY
    # what Linux checks before it believes in the mechanism
    ports.write(layout.PORT_PCI_ADDRESS + 3, 1, 1)
    ports.write(layout.PORT_PCI_ADDRESS, 4, 0x8000_0000)
    assert ports.read(layout.PORT_PCI_ADDRESS, 4) == 0x8000_0000
    assert ports.read(layout.PORT_PCI_ADDRESS, 1) == 0xFF
    for address in (0x0000_0800, 0x8001_0800):  # disabled; bus 1
        ports.write(layout.PORT_PCI_ADDRESS, 4, address)
        assert ports.read(layout.PORT_PCI_DATA, 4) == 0xFFFF_FFFF
        ports.write(layout.PORT_PCI_DATA, 4, 0)


def test_functions_of_one_slot(mmio, host):
    host.add(one(1), 5)
    assert ConfigAccess(mmio, 5).read(cfg.HEADER_TYPE, 1) == 0
    assert host.add(one(2), 5, 3) == (5, 3)
    assert ConfigAccess(mmio, 5).read(cfg.HEADER_TYPE, 1) == cfg.MULTIFUNCTION
    host.add(one(3), 6, 1)
    host.add(one(4), 6)
    assert ConfigAccess(mmio, 6).read(cfg.HEADER_TYPE, 1) == cfg.MULTIFUNCTION
    assert [place[:2] for place in host.functions()] == [(0, 0), (5, 0), (5, 3), (6, 0), (6, 1)]
    text = "\n".join(host.describe())
    assert "00:05.3 0102: 1234:5678 function 2" in text
    assert "BAR 0: 0x200000000 size 0x1000 [disabled]" in text


@pytest.mark.parametrize(
    ("slot", "number", "text"),
    [(0, 0, "taken by host bridge"), (32, 0, "0 to 31"), (-1, 0, "0 to 31"), (3, 8, "0 to 7")],
)
def test_bad_places(host, slot, number, text):
    with pytest.raises(ConfigError, match=text):
        host.add(one(1), slot, number)


def test_slots_run_out(host):
    for number in range(31):
        host.add(one(number))
    with pytest.raises(ConfigError, match="all 31 PCI slots"):
        host.add(one(99))


def test_windows_run_out(host):
    host.add(one(1, 1 << 35))
    with pytest.raises(ConfigError, match="no room"):
        host.add(one(2, 1 << 36))


def test_assigned_bars_do_not_touch(mmio, host):
    sizes = (0x1000, 0x8000, 0x10, 0x8000, 1 << 33, 0x1000)
    for number, size in enumerate(sizes):
        host.add(one(number, size, wide=number != 2))
    for slot, size in enumerate(sizes, 1):
        access = ConfigAccess(mmio, slot)
        assert access.bar_size(0) == size
        assert access.bar(0) % size == 0
        enable(access)
        assert mmio.read(access.bar(0) + size - 1, 1) == slot - 1
    assert ConfigAccess(mmio, 3).bar(0) >= layout.MMIO32_BASE
    assert ConfigAccess(mmio, 3).bar(0) < layout.ECAM_BASE


def test_bars_move_with_decoding_on_and_off(mmio, host):
    function = one(7)
    host.add(function)
    access = ConfigAccess(mmio, 1)
    old = access.bar(0)
    assert mmio.read(old, 1) == 0xFF
    enable(access)
    assert mmio.read(old, 1) == 7
    access.write(cfg.BAR0, 4, 0x1234_5000)
    new = old & ~0xFFFF_FFFF | 0x1234_5000
    assert function.where == {0: new}
    assert (mmio.read(old, 1), mmio.read(new, 1)) == (0xFF, 7)
    access.write(cfg.COMMAND, 2, 0)
    assert function.where == {0: None}
    access.write(cfg.BAR0, 4, old & 0xFFFF_FFFF)
    assert mmio.read(old, 1) == 0xFF
    enable(access)
    assert mmio.read(old, 1) == 7


@pytest.mark.parametrize(
    "address",
    [
        0,
        0x10_0000,
        layout.ECAM_BASE,
        layout.LAPIC_BASE,
        layout.IOAPIC_BASE,
        MMIO64 - 0x1000,
        MMIO64 + (64 << 30),
    ],
)
def test_addresses_outside_the_windows_are_not_forwarded(mmio, host, address):
    function = one(7)
    host.add(function)
    access = ConfigAccess(mmio, 1)
    enable(access)
    access.write(cfg.BAR0 + 4, 4, address >> 32)
    access.write(cfg.BAR0, 4, address & 0xFFFF_FFFF)
    assert access.bar(0) == address
    assert function.where[0] is None
    assert mmio.read(layout.ECAM_BASE, 4) == 0x0D57_8086


def test_bars_on_top_of_each_other(mmio, host, capfd):
    host.add(one(1))
    host.add(one(2, 0x4000))
    first, second = ConfigAccess(mmio, 1), ConfigAccess(mmio, 2)
    enable(first)
    enable(second)
    home, there = second.bar(0), first.bar(0) & ~0x3FFF
    second.write(cfg.BAR0, 4, there & 0xFFFF_FFFF)
    assert mmio.read(first.bar(0), 1) == 1
    assert mmio.read(home, 1) == 0xFF
    assert "overlap" in capfd.readouterr().err
    first.write(cfg.COMMAND, 2, 0)
    assert mmio.read(there, 1) == 2  # what stood in the way has left
    enable(first)
    assert mmio.read(first.bar(0), 1) == 2
    second.write(cfg.BAR0, 4, home & 0xFFFF_FFFF)
    assert (mmio.read(there, 1), mmio.read(home, 1)) == (1, 2)


def test_close(host):
    function = one(1)
    host.add(function)
    host.close()
    assert function.closed


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.one_of(
                st.integers(0, 0x45), st.sampled_from([4, 0x10, 0x14, 0x18, 0x1C]), st.integers(0, 4095)
            ),
            st.sampled_from([1, 2, 4, 8]),
            st.one_of(
                st.integers(0, 2**64 - 1),
                st.sampled_from([2, 2**32 - 1, 0xC000_0000, 0xC000_8000, MMIO64, 2]),
            ),
        ),
        max_size=40,
    )
)
def test_no_write_raises_and_the_map_stays_sound(accesses):
    mmio = Bus("mmio")
    host = PciHost(mmio, InterruptRouter(FakeVm()), MMIO64)
    functions = [
        Function(slot, Bar(0, 0x8000, Tag(slot)), Bar(2, 0x1000, Tag(slot + 10), wide=False))
        for slot in range(3)
    ]
    for function in functions:
        host.add(function)
    for slot, offset, width, value in accesses:
        access = ConfigAccess(mmio, slot)
        access.write(offset, width, value & (1 << 8 * width) - 1)
        assert 0 <= access.read(offset, width) < 1 << 8 * width
    decoded = {
        (function.name, index): address
        for function in functions
        for index, address in function.where.items()
        if address is not None
    }
    ranges = [(base, name) for base, _, name in mmio.ranges() if "ECAM" not in name]
    assert sorted(ranges) == sorted((base, f"{name} BAR {index}") for (name, index), base in decoded.items())


class TestConfigSpace:
    def test_capabilities_are_linked(self):
        space = ConfigSpace(IDENTITY)
        assert not space.get(cfg.STATUS, 2) & cfg.STATUS_CAPABILITIES
        first = space.add_capability(9, b"\1\2\3")
        second = space.add_capability(0x11, b"\4")
        assert space.get(cfg.CAPABILITIES, 1) == first == 0x40
        assert space.get(first, 5) == int.from_bytes(bytes((9, second, 1, 2, 3)), "little")
        assert second % 4 == 0 and second >= first + 5
        assert space.get(second + 1, 1) == 0
        assert space.get(cfg.STATUS, 2) & cfg.STATUS_CAPABILITIES

    def test_capabilities_that_do_not_fit(self):
        space = ConfigSpace(IDENTITY)
        with pytest.raises(ValueError, match="do not fit"):
            space.add_capability(9, bytes(191))
        space.add_capability(9, bytes(190))

    @pytest.mark.parametrize("size", [0, 8, 24, 0x1001])
    def test_bars_need_a_power_of_two(self, size):
        with pytest.raises(ValueError, match="power of two"):
            ConfigSpace(IDENTITY).add_bar(0, size, wide=True, prefetchable=False)

    def test_hooks_see_every_dword_that_is_touched(self):
        space = ConfigSpace(IDENTITY)
        seen: list[str] = []
        space.allow(0x40, 8, (1 << 64) - 1)
        space.after_write(0x41, lambda: seen.append("low"))
        space.after_write(0x44, lambda: seen.append("high"))
        space.before_read(0x44, lambda: seen.append("read"))
        space.write(0x40, 8, 5)
        space.write(0x43, 2, 5)
        space.write(0x43, 1, 5)
        space.read(0x40, 4)
        space.read(0x40, 8)
        assert seen == ["low", "high", "low", "high", "low", "read"]
        seen.clear()
        space.write(0x3D, 8, 5)  # three of them, where nothing is aligned
        assert seen == ["low", "high"]
        assert not space.is_plain(0x3D, 8) and not space.is_plain(0x41, 8) and space.is_plain(0x3C, 8)

    def test_nothing_grows_past_the_end(self):
        space = ConfigSpace(IDENTITY)
        space.allow(0xFC, 4, 0xFFFF_FFFF)
        space.write(0xFE, 4, 0xFFFF_FFFF)
        assert len(space.data) == cfg.SIZE
        assert space.read(0xFC, 8) == 0

    def test_only_writable_bits_change(self):
        space = ConfigSpace(IDENTITY)
        space.write(cfg.COMMAND, 2, 0xFFFF)
        assert space.command == cfg.COMMAND_WRITABLE
        space.write(cfg.STATUS, 2, 0xFFFF)
        assert space.get(cfg.STATUS, 2) == 0
