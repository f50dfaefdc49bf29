"""The network device's rules: what a driver may get, and offloads."""

from __future__ import annotations

import pytest
from fakes.net_driver import F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, frame

from pyvmm.backend.net import Net
from pyvmm.backend.wire import OFFLOADS, TapWire, Wire


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


def test_offloads_are_those_of_the_driver(monkeypatch):
    """TUNSETOFFLOAD takes segments only together with checksums."""
    seen = []
    monkeypatch.setattr("pyvmm.backend.wire.set_offload", lambda fd, flags: seen.append(flags))
    wire = TapWire.__new__(TapWire)
    wire._fd = -1
    for features in (0, F_GUEST_CSUM, F_GUEST_CSUM | F_GUEST_TSO6, F_GUEST_TSO4, TapWire.features):
        wire.accept(features)
    assert seen == [0, 1, 5, 0, sum(flag for _, flag in OFFLOADS)]
