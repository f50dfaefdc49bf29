"""The configuration space of a device: names, widths, and accesses that miss it."""

from __future__ import annotations

import pytest

from pyvmm.backend.config import ConfigSpace


@pytest.fixture
def space():
    return ConfigSpace([("cols", 2), ("rows", 2), ("ports", 4)], b"\x50\0\x19\0")


def test_fields_have_names(space):
    assert (len(space), space["cols"], space["rows"], space["ports"]) == (8, 80, 25, 0)
    space["ports"] = 0x01020304
    assert space.read(4, 4) == b"\4\3\2\1"
    with pytest.raises(KeyError):
        space["colour"]
    with pytest.raises(OverflowError):
        space["cols"] = 1 << 16


def test_accesses_beyond_the_end(space):
    assert space.read(2, 10) == b"\x19\0" + bytes(8)
    assert space.read(100, 2) == bytes(2)
    space.write(6, b"\1\2\3\4")
    space.write(100, b"lost")
    assert len(space) == 8
    assert space["ports"] == 0x0201_0000


def test_covers(space):
    assert space.covers("rows", 2, 1)
    assert space.covers("rows", 0, 8)
    assert not space.covers("rows", 0, 2)
    assert not space.covers("rows", 4, 4)


def test_bytes_only():
    assert len(ConfigSpace()) == 0
    assert ConfigSpace().read(0, 2) == bytes(2)
