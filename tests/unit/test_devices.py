"""From device options to prepared devices: kinds, checks before anything starts."""

from __future__ import annotations

import os

import pytest
from fakes.backend import no_new_fds

from pyvmm import devices, irq
from pyvmm.config import DiskDevice, FsDevice, GenericDevice, RngDevice
from pyvmm.errors import ConfigError
from pyvmm.record import Record
from pyvmm.virtio import kinds


@pytest.mark.parametrize(
    ("text", "number"),
    [("fs", 26), ("FS", 26), ("26", 26), ("026", 26), ("filesystem", 26), ("63", 63), ("1", 1)],
)
def test_find_kind(text: str, number: int) -> None:
    assert devices.find_kind("--x", text).device_id == number


def test_a_kind_that_nobody_described_has_a_configuration() -> None:
    """Else the frontend would not negotiate CONFIG, and the driver would read zeros."""
    assert devices.find_kind("--x", "60") == kinds.of(60)
    assert devices.find_kind("--x", "60").config_size == 256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blcok", "--x: unknown device type 'blcok'; did you mean 'block'"),
        ("?", "--x: unknown device type '\\?'; pyvmm devices lists them$"),
        ("entrpy", "unknown device type 'entrpy'; did you mean 'entropy'[?]; pyvmm devices lists them$"),
        ("0", "--x: device type 0: 1 to 63 are possible"),
        ("64", "--x: device type 64: 1 to 63"),
        ("9" * 5000, "--x: device type 9+: 1 to 63"),
        ("\N{SUPERSCRIPT TWO}", "unknown device type"),
        ("", "unknown device type ''"),
    ],
)
def test_no_such_kind(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        devices.find_kind("--x", text)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (GenericDevice("iommu", "s"), "iommu is impossible: "),
        (GenericDevice("fs", "s", (64,)), "fs needs at least 2 queues, 1 given; .*--force"),
        (GenericDevice("console", "s", (64,) * 3), "even number of queues"),
        (GenericDevice("scsi", "s", (128, 128, 256)), "at most 128 entries a queue, 256 given; .*force=on"),
        (GenericDevice("vsock", "s", (2048,) * 3), "vsock backends take at most 1024 entries"),
        (GenericDevice("sound", "s", (64,) * 5), "sound has at most 4 queues, 5 given"),
        (GenericDevice("vsock", "s", config="00" * 9), "config= is 9 bytes, vsock has 8; .*force=on"),
        (RngDevice("/nowhere"), "--rng: src=/nowhere: No such file.*; name a readable file or device"),
        (RngDevice("/"), "--rng: src=/: is a directory"),
        (FsDevice("t", "/nowhere"), "--fs: dir=/nowhere: no such directory"),
    ],
)
def test_what_is_refused_before_anything_starts(device: Record, message: str) -> None:
    with no_new_fds(), pytest.raises(ConfigError, match=message):
        devices.prepare(device)


def test_usual_queues_and_force() -> None:
    assert devices.prepare(GenericDevice("net", "s")).queue_sizes == (256,) * 2
    assert devices.prepare(GenericDevice("scsi", "s")).queue_sizes == (128,) * 3
    assert devices.prepare(GenericDevice("fs", "s", (64,), force=True)).queue_sizes == (64,)
    assert devices.prepare(GenericDevice("scsi", "s", (256,) * 3, force=True)).queue_sizes == (256,) * 3
    devices.prepare(GenericDevice("vsock", "s", config="00" * 9, force=True))
    devices.prepare(GenericDevice("rng", "s", config="00" * 9))  # nothing is known of an rng's
    assert devices.prepare(FsDevice("t", socket="s", num_queues=2)).queue_sizes == (1024,) * 3
    assert devices.prepare(GenericDevice("fs", "s", id="mine")).name == "mine"


def test_a_tag_of_any_bytes() -> None:
    devices.prepare(FsDevice(os.fsdecode(b"\xff\xfe"), socket="s"))


@pytest.mark.parametrize(
    ("first", "second", "claim"),
    [
        (GenericDevice("fs", "s"), FsDevice("t", socket="s"), "socket s"),
        (GenericDevice("fs", fd=5), GenericDevice("rng", fd=5), "fd 5"),
        (FsDevice("t", "/"), FsDevice("t", "/tmp"), "--fs: tag=t"),
        (DiskDevice("d"), DiskDevice("d"), "--disk: path=d"),
        (RngDevice(id="a"), DiskDevice("d", id="a"), "id=a"),
    ],
)
def test_two_devices_cannot_share(first: Record, second: Record, claim: str) -> None:
    with pytest.raises(ConfigError, match=f"^{claim}: two devices cannot share it"):
        devices.check_together((first, second))
    devices.check_together((first,))


def test_queues_of_all_devices_fit_the_vectors() -> None:
    many = [devices.prepare(GenericDevice("block", f"s{i}", (2,) * 256)) for i in range(16)]
    devices.check_vectors(many[:15])
    with pytest.raises(ConfigError, match="^4112 interrupt vectors .* KVM has 4056; .*, block has 256"):
        devices.check_vectors(many)


def test_the_vectors_are_what_the_router_has() -> None:
    assert irq.MAX_VECTORS + len(irq.default_routes()) == irq.MAX_ROUTES


def test_what_two_devices_can_share() -> None:
    devices.check_together((RngDevice(), RngDevice(), FsDevice("a", "/"), FsDevice("b", "/")))
    devices.check_together((DiskDevice("d", readonly=True), DiskDevice("d", readonly=True)))
