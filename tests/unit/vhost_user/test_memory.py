"""Guest RAM as the region table, and the user addresses that go with it."""

from __future__ import annotations

import pytest

from pyvmm.errors import LocalProtocolError
from pyvmm.layout import GIB, HIGH_RAM, ram_ranges
from pyvmm.vhost_user.memory import USER_BASE, GuestRam, MemoryTable


def test_regions_name_guest_user_and_file_places() -> None:
    table = MemoryTable(GuestRam(5, ram_ranges(5 * GIB)))
    low, high = table.payload.regions
    assert (low.guest_address, low.size, low.mmap_offset) == (0, 3 * GIB, 0)
    assert (high.guest_address, high.size, high.mmap_offset) == (HIGH_RAM, 2 * GIB, 3 * GIB)
    assert table.fds == (5, 5)
    for region in (low, high):
        assert region.user_address == table.user_address(region.guest_address)


@pytest.mark.parametrize(
    ("address", "known"),
    [
        (0, True),
        (3 * GIB - 1, True),
        (3 * GIB, False),
        (HIGH_RAM, True),
        (HIGH_RAM + 2 * GIB, False),
        (-1, False),
    ],
)
def test_user_addresses_exist_for_ram_only(address: int, known: bool) -> None:
    table = MemoryTable(GuestRam(5, ram_ranges(5 * GIB)))
    if known:
        assert table.user_address(address) == USER_BASE + address
    else:
        with pytest.raises(LocalProtocolError, match="is not in RAM"):
            table.user_address(address)
