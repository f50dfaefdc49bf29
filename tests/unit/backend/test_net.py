"""The network device's rules: what a driver may get, offloads, and the words of its command line."""

from __future__ import annotations

import pytest
from fakes.net_driver import F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, MAC, frame

from pyvmm.backend.net import Net, parse_mac, parse_mtu
from pyvmm.backend.wire import OFFLOADS, TapWire, Wire
from pyvmm.errors import ConfigError


class Loose(Wire):
    """A wire with nothing at its end."""


@pytest.mark.parametrize(
    ("flags", "gso", "features", "shown"),
    [
        (0, 0, 0, 0),
        (2, 0, 0, 0),  # DATA_VALID, which the driver did not ask for
        (2, 0, F_GUEST_CSUM, 2),
        (1, 0, F_GUEST_CSUM, 1),
        (1, 0, 0, None),
        (1, 1, F_GUEST_CSUM | F_GUEST_TSO4, 1),
        (1, 1, F_GUEST_CSUM | F_GUEST_TSO6, None),
        (1, 4, F_GUEST_CSUM | F_GUEST_TSO6, 1),
        (1, 4, F_GUEST_CSUM | F_GUEST_TSO4, None),
        (1, 3, F_GUEST_CSUM | F_GUEST_TSO4, None),
    ],
)
def test_what_a_driver_may_get(flags, gso, features, shown):
    device = Net(Loose)
    device.driver_features = features
    data = memoryview(bytearray(bytes([flags, gso]) + bytes(10) + frame()))
    assert device._admits(data) == (shown is not None)
    assert device.dropped == (shown is None)
    if shown is not None:
        assert data[:12] == bytes([shown, gso]) + bytes(8) + b"\1\0"


@pytest.mark.parametrize(
    "text", ["", "1", "52:54:00:12:34", "53:54:00:12:34:56", "0:0:0:0:0:0", "1ff:0:0:0:0:0"]
)
def test_addresses_that_are_none(text):
    with pytest.raises(ConfigError, match="--mac"):
        parse_mac(text)


@pytest.mark.parametrize("text", ["67", "65536", "-1", "x"])
def test_mtu_out_of_range(text):
    with pytest.raises(ConfigError, match="from 68 to 65535"):
        parse_mtu(text)


def test_addresses_and_mtu():
    assert parse_mac("52:54:0:12:34:56") == MAC
    assert parse_mtu("68") == 68


def test_offloads_are_those_of_the_driver(monkeypatch):
    """TUNSETOFFLOAD takes segments only together with checksums."""
    seen = []
    monkeypatch.setattr("pyvmm.backend.wire.set_offload", lambda fd, flags: seen.append(flags))
    wire = TapWire.__new__(TapWire)
    wire._fd = -1
    for features in (0, F_GUEST_CSUM, F_GUEST_CSUM | F_GUEST_TSO6, F_GUEST_TSO4, TapWire.features):
        wire.accept(features)
    assert seen == [0, 1, 5, 0, sum(flag for _, flag in OFFLOADS)]
