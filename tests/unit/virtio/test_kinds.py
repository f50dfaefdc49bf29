"""The table of kinds, held against the kernel's headers where they have the same facts."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from guest.devices.rows import ROWS

from pyvmm.virtio import kinds, served, spec

HEADERS = Path("/usr/include/linux")
# What cloud-hypervisor's --generic-vhost-user takes for device_type
FOREIGN_NAMES = """
    net:1 block:2 console:3 rng:4 balloon:5 iomem:6 rpmsg:7 scsi:8 9p:9 mac80211_wlan:10 rproc_serial:11
    caif:12 memory_balloon:13 gpu:16 clock:17 input:18 vsock:19 crypto:20 signal_dist:21 pstore:22 iommu:23
    mem:24 sound:25 fs:26 pmem:27 rpmb:28 mac80211_hwsim:29 video_encoder:30 video_decoder:31 scmi:32
    nitro_sec_mod:33 i2c:34 watchdog:35 can:36 dmabuf:37 param_serv:38 audio_policy:39 bt:40 gpio:41
    rdma:42 camera:43 ism:44 spi:45 tee:46 cpu_balloon:47 media:48 usb:49
"""


def test_names_and_ids_are_unique():
    names = [name for kind in kinds.KINDS for name in (kind.name, *kind.aliases)]
    assert len(names) == len(set(names))
    ids = [kind.device_id for kind in kinds.KINDS]
    assert len(ids) == len(set(ids))
    assert set(ids) == set(range(1, 50)) - {14, 15}
    assert max(ids) <= spec.MAX_DEVICE_ID


@pytest.mark.parametrize("pair", FOREIGN_NAMES.split())
def test_names_that_cloud_hypervisor_takes(pair):
    name, number = pair.split(":")
    kind = kinds.by_name(name)
    assert kind is not None and kind.device_id == int(number)
    assert kinds.by_id(int(number)) is kind is kinds.of(int(number))


def test_unknown_ids_work():
    assert kinds.by_id(55) is None and kinds.by_name("nothing") is None
    assert kinds.of(55).name == "virtio-55"
    assert kinds.of(55).queue_fault(1) is None


@pytest.mark.skipif(not HEADERS.exists(), reason="needs the kernel's user space headers")
def test_ids_are_the_kernels():
    text = (HEADERS / "virtio_ids.h").read_text()
    known = {int(number) for number in re.findall(r"VIRTIO_ID_\w+\s+(\d+)\s", text)}
    assert known and not known - {kind.device_id for kind in kinds.KINDS}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("net", 28), ("block", 96), ("console", 12), ("rng", 0), ("balloon", 16), ("scsi", 36), ("gpu", 20),
        ("input", 136), ("vsock", 8), ("crypto", 56), ("iommu", 40), ("mem", 56), ("sound", 16), ("fs", 44),
        ("pmem", 16), ("rpmb", 3), ("can", 2), ("bt", 5), ("gpio", 8), ("spi", 32), ("media", 40),
    ],
)  # fmt: skip
def test_config_sizes(name, size):
    kind = kinds.by_name(name)
    assert kind is not None and kind.config_size == size


def test_fields_have_their_natural_offsets():
    for kind in kinds.KINDS:
        if kind.name == "bt":  # packed by its header
            continue
        for name, offset, width in kind.fields():
            assert offset % min(width, 8 if width in (1, 2, 4, 8) else 1) == 0, (kind.name, name)
    offsets = {name: offset for name, offset, _ in kinds.of(2).fields()}
    assert (offsets["blk_size"], offsets["writeback"], offsets["num_queues"]) == (20, 32, 34)
    assert offsets["zone_sectors"] == 72


@pytest.mark.parametrize(
    ("name", "count", "text"),
    [
        ("fs", 1, "at least 2"), ("fs", 2, ""), ("fs", 9, ""), ("net", 1, "at least 2"), ("net", 3, ""),
        ("console", 3, "even"), ("console", 4, ""), ("console", 2, ""), ("vsock", 2, "at least 3"),
        ("vsock", 4, "at most 3"), ("rng", 0, "at least 1"), ("scsi", 2, "at least 3"), ("block", 16, ""),
    ],
)  # fmt: skip
def test_queue_rules(name, count, text):
    kind = kinds.by_name(name)
    assert kind is not None
    fault = kind.queue_fault(count)
    assert text in fault if text else fault is None
    assert kind.queue_fault(kind.usual_queues) is None


@pytest.mark.parametrize(
    ("name", "sizes", "text"),
    [
        ("scsi", (128, 128), ""), ("scsi", (), ""), ("scsi", (128, 256), "at most 128 entries a queue, 256"),
        ("sound", (128,) * 4, "at most 64"), ("vsock", (1024,) * 3, ""), ("net", (32768,) * 2, ""),
    ],
)  # fmt: skip
def test_size_rules(name, sizes, text):
    kind = kinds.by_name(name)
    assert kind is not None
    fault = kind.size_fault(sizes)
    assert text in fault if text else fault is None


def test_usual_sizes_fit_every_backend():
    for kind in (*kinds.KINDS, kinds.of(60)):
        assert kind.size_fault(kind.usual_sizes) is None
        assert len(kind.usual_sizes) == kind.usual_queues
        assert all(1 <= size <= 256 and size & (size - 1) == 0 for size in kind.usual_sizes)
    assert {kind.name: kind.usual_sizes[0] for kind in kinds.KINDS if kind.usual_sizes[0] != 256} == {
        "console": 128, "scsi": 128, "sound": 64, "can": 64,
    }  # fmt: skip


def test_network_backends_count_pairs():
    assert kinds.of(1).backend_limit(1) == 3
    assert kinds.of(2).backend_limit(4) == 4


def test_without_a_control_queue_nothing_that_needs_one() -> None:
    network, control = kinds.of(1), 1 << 17 | 1 << 22
    assert network.impossible_features(2) & control == control == network.impossible_features(4) & control
    assert network.impossible_features(3) == kinds.of(2).impossible_features(2) == 0


def test_served_names_kinds():
    for number, row in served.SERVED.items():
        assert number == 63 or kinds.by_id(number) is not None
        for backend in (*row.backends, *row.untested):
            assert backend.command.count("{socket}") == 1
        assert all(name.isupper() for name in row.drivers)
    assert {"rng", "console"} <= {
        kinds.of(number).name for number, row in served.SERVED.items() if row.option
    }


def test_some_programs_append_a_number_to_the_socket():
    rng = {backend.program: backend.listens_at("a.sock") for backend in served.SERVED[4].backends}
    assert rng == {"pyvmm.backend.rng": "a.sock", "vhost-device-rng": "a.sock0"}


def test_what_is_known_to_work_is_proven():
    """By a row of the matrix of real devices, or it is one of ours, which have tests of their own."""
    proven = {}
    for row in ROWS:
        kind = kinds.by_name(row.kind) or kinds.of(int(row.kind))
        program = "" if row.absent or not row.backend else os.path.basename(row.backend[0])
        proven.setdefault(kind.device_id, set()).add(program.replace("rust-virtiofsd", "virtiofsd"))
    for number, row in served.SERVED.items():
        others = {b.program for b in row.backends if not b.program.startswith("pyvmm.")}
        if row.option:  # what it starts has rows too, by that option
            others -= {"qemu-storage-daemon"} if "" in proven[number] else set()
        assert others <= proven.get(number, set()), kinds.of(number).name
        known = {backend.program for backend in row.untested}
        assert not known & proven.get(number, set()), kinds.of(number).name


def test_rows_say_how_their_backends_number_sockets():
    for row in ROWS:
        if row.backend and not row.absent:
            program = os.path.basename(row.backend[0])
            assert (program in served.NUMBERED) == (row.suffix == "0"), row.name


def test_every_row_is_whole():
    for kind in kinds.KINDS:
        assert kind.min_queues <= kind.usual_queues
        assert kind.queue_fault(kind.usual_queues) is None
        assert kind.title
        assert 0 < kind.pci_class <= 0xFFFF
        assert kind.write_policy in (kinds.FORWARD, kinds.WHOLE, kinds.ABSORB)
        assert kind.queue_rule in (kinds.ANY, kinds.PAIRS, kinds.PORTS, kinds.FIXED)
