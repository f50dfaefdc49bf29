"""The frontend against the real virtiofsd and qemu-storage-daemon; the test is the driver.

Needs no KVM: the backends see a ring in a memory file, as they would with a guest.
In one file because both programs are driven by the same rig.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from fakes.backend import no_new_fds
from fakes.ring import Memory, Ring

from pyvmm.config import DiskDevice, FsDevice
from pyvmm.errors import ConfigError
from pyvmm.host import backends
from pyvmm.host.handover import BackendProcess, StartedEndpoint
from pyvmm.loop import EventLoop
from pyvmm.vhost_user.frontend import Frontend
from pyvmm.vhost_user.recovery import RECONNECT
from pyvmm.virtio import kinds

VERSION_1 = 1 << 32
FUSE_LOOKUP, FUSE_MKDIR, FUSE_OPEN, FUSE_READ, FUSE_INIT = 1, 9, 14, 15, 26
BLK_IN, BLK_OUT, BLK_FLUSH = 0, 1, 4
BLK_F_RO, BLK_F_FLUSH, BLK_F_MQ = 1 << 5, 1 << 9, 1 << 12


class Rig:
    """One backend, one frontend and its rings; closed in the order a VM does it."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.loop = EventLoop()
        self.closers: list[Callable[[], None]] = []
        self.lost: list[str] = []

    def connect(
        self, process: BackendProcess, kind: str, queues: int, config: bytes | None = None, **options: Any
    ) -> tuple[Frontend, list[Ring]]:
        self.closers.append(process.close)
        found = kinds.by_name(kind)
        assert found is not None
        sizes = (128,) * queues
        frontend = Frontend(
            process.endpoint, found, sizes, config, self.memory.ram, self.loop, name="dev", **options
        )
        frontend.on_lost = self.lost.append
        frontend.start_watching()
        self.closers.append(frontend.close)
        rings = [Ring(self.memory, index) for index in range(queues)]
        self.closers += [ring.close for ring in rings]
        return frontend, rings

    def pump(self, condition: Callable[[], object], seconds: float = 10.0) -> None:
        """Run the loop until `condition` holds."""
        end = monotonic() + seconds

        def look() -> None:
            if condition() or monotonic() > end:
                self.loop.stop()
            else:
                self.loop.call_later(0.01, look)

        look()
        self.loop.run()
        assert condition()

    def close(self) -> None:
        for close in reversed(self.closers):
            close()
        self.loop.close()
        self.memory.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    if backends.find_virtiofsd() is None or backends.find_program("qemu-storage-daemon") is None:
        pytest.skip("virtiofsd or qemu-storage-daemon is missing; apt install qemu-system-common qemu-utils")
    with no_new_fds():
        rig = Rig()
        yield rig
        rig.close()


# -- virtiofsd ---------------------------------------------------------------------


@pytest.fixture(params=["c", "rust"])
def virtiofsd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two programs of this name, made the one that is found."""
    kind = str(request.param)
    programs = backends.find_programs("virtiofsd")
    found = [path for path in programs if backends.is_c_virtiofsd(path) == (kind == "c")]
    if not found:
        where = {"c": "apt install qemu-system-common", "rust": "scripts/backends virtiofsd"}
        pytest.skip(f"the {kind} virtiofsd is not installed; {where[kind]}")
    if kind == "c" and os.geteuid():
        pytest.skip("QEMU's virtiofsd needs root")
    monkeypatch.setattr(backends, "find_virtiofsd", lambda: found[0])
    return kind


def fuse(ring: Ring, opcode: int, node: int, body: bytes, size: int) -> tuple[int, bytes]:
    """One FUSE request (Linux uapi fuse.h, struct fuse_in_header); error number and reply."""
    header = struct.pack("<IIQQIIII", 40 + len(body), opcode, 7, node, 0, 0, 0, 0)
    out, data = ring.request([header, body], [16, size])
    length, error, unique = struct.unpack("<IiQ", out)
    assert unique == 7
    return error, data[: length - 16]


def fuse_init(ring: Ring) -> tuple[int, int]:
    error, data = fuse(ring, FUSE_INIT, 0, struct.pack("<IIII48x", 7, 36, 65536, 0), 64)
    assert error == 0
    major, minor = struct.unpack_from("<II", data)
    return major, minor


def start_fs(rig: Rig, folder: Path, **options: Any) -> tuple[Frontend, list[Ring]]:
    process = backends.start_virtiofsd(FsDevice("tag", str(folder)))
    return rig.connect(process, "fs", 2, b"tag".ljust(36, b"\0") + struct.pack("<I", 1), **options)


def read_hello(ring: Ring) -> bytes:
    """LOOKUP, OPEN and READ of the file `hello` in the root."""
    error, entry = fuse(ring, FUSE_LOOKUP, 1, b"hello\0", 128)
    assert error == 0
    node = struct.unpack_from("<Q", entry)[0]
    error, opened = fuse(ring, FUSE_OPEN, node, struct.pack("<II", 0, 0), 16)
    assert error == 0
    handle = struct.unpack_from("<Q", opened)[0]
    error, data = fuse(ring, FUSE_READ, node, struct.pack("<QQIIQII", handle, 0, 4096, 0, 0, 0, 0), 4096)
    assert error == 0
    return data


@pytest.mark.usefixtures("virtiofsd")
def test_virtiofsd_serves_a_file(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "hello").write_bytes(b"from the host")
    frontend, rings = start_fs(rig, tmp_path)
    assert (frontend.device_id, frontend.config_size) == (26, 40)
    assert frontend.read_config(0, 4) == b"tag\0"
    assert frontend.features & VERSION_1
    frontend.activate(VERSION_1, [ring.setup for ring in rings])
    assert fuse_init(rings[1])[0] == 7
    assert read_hello(rings[1]) == b"from the host"


@pytest.mark.usefixtures("virtiofsd")
def test_virtiofsd_after_a_device_reset(rig: Rig, tmp_path: Path) -> None:
    """A guest that reboots: rings are stopped, zeroed and started again from 0."""
    (tmp_path / "hello").write_bytes(b"still here")
    frontend, rings = start_fs(rig, tmp_path)
    for _ in range(3):
        frontend.activate(VERSION_1, [ring.setup for ring in rings])
        assert fuse_init(rings[1])[0] == 7
        assert read_hello(rings[1]) == b"still here"
        link = frontend._link  # it has been told of memory once, and keeps it
        assert link is not None and link.client.regions == frontend._memory.payload.regions
        frontend.reset()
        for ring in rings:
            ring.restart()
    assert not rig.lost


@pytest.mark.usefixtures("virtiofsd")
@pytest.mark.parametrize("name", ["with,comma", "back\\slash", "with space", "ünï"])
def test_virtiofsd_with_odd_directory_names(rig: Rig, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "hello").write_bytes(name.encode())
    frontend, rings = start_fs(rig, folder)
    frontend.activate(VERSION_1, [ring.setup for ring in rings])
    fuse_init(rings[1])
    assert read_hello(rings[1]) == name.encode()


@pytest.mark.usefixtures("virtiofsd")
def test_a_killed_backend_is_reported_with_its_end(rig: Rig, tmp_path: Path) -> None:
    frontend, rings = start_fs(rig, tmp_path)
    frontend.activate(VERSION_1, [ring.setup for ring in rings])
    endpoint = frontend._endpoint
    assert isinstance(endpoint, StartedEndpoint)
    os.kill(endpoint.process.pid, signal.SIGKILL)
    rig.pump(lambda: rig.lost)
    assert rig.lost == ["the backend closed the connection (it ended with status 137)"]


@contextmanager
def killed(rig: Rig, frontend: Frontend) -> Iterator[None]:
    """Kills the backend and waits until another one is there; the loop runs meanwhile and in the block."""
    back = threading.Event()
    frontend.on_back = back.set
    thread = threading.Thread(target=rig.loop.run)
    thread.start()
    try:
        endpoint = frontend._endpoint
        assert isinstance(endpoint, StartedEndpoint)
        os.kill(endpoint.process.pid, signal.SIGKILL)
        assert back.wait(20)
        yield
    finally:
        frontend.close()  # what was started in the thread ends with it
        rig.loop.stop()
        thread.join()


@pytest.mark.usefixtures("virtiofsd")
def test_a_killed_virtiofsd_is_started_again(rig: Rig, tmp_path: Path) -> None:
    """It knows nothing of what the driver had open: that answers with errors until it is mounted again."""
    (tmp_path / "hello").write_bytes(b"still here")
    frontend, rings = start_fs(rig, tmp_path, on_loss=RECONNECT)
    frontend.activate(VERSION_1, [ring.setup for ring in rings])
    fuse_init(rings[1])
    error, entry = fuse(rings[1], FUSE_LOOKUP, 1, b"hello\0", 128)
    node = struct.unpack_from("<Q", entry)[0]
    with killed(rig, frontend):
        error, _ = fuse(rings[1], FUSE_OPEN, node, struct.pack("<II", 0, 0), 16)
        assert error < 0
        frontend.reset()
        for ring in rings:
            ring.restart()
        frontend.activate(VERSION_1, [ring.setup for ring in rings])
        fuse_init(rings[1])
        assert read_hello(rings[1]) == b"still here"
    assert not rig.lost


@pytest.mark.usefixtures("virtiofsd")
def test_virtiofsd_ends_with_its_connection(rig: Rig, tmp_path: Path) -> None:
    process = backends.start_virtiofsd(FsDevice("tag", str(tmp_path)))
    frontend, _ = rig.connect(process, "fs", 2, b"tag")
    frontend.close()
    assert process.child.wait(5) is not None


FUSE_SETATTR, FUSE_UNLINK, FUSE_CREATE = 4, 10, 35
FATTR_MODE = 1
WRITES = {
    "mkdir": (FUSE_MKDIR, struct.pack("<II", 0o755, 0) + b"new\0"),
    "create": (FUSE_CREATE, struct.pack("<IIII", os.O_RDWR, 0o100644, 0, 0) + b"file\0"),
    "unlink": (FUSE_UNLINK, b"hello\0"),
    "chmod": (FUSE_SETATTR, struct.pack("<II", FATTR_MODE, 0).ljust(68, b"\0") + struct.pack("<I16x", 0o777)),
}


def attempts(rig: Rig, device: FsDevice) -> dict[str, int]:
    """What each way to change something is answered, by a fresh virtiofsd."""
    frontend, rings = rig.connect(backends.start_virtiofsd(device), "fs", 2, b"tag")
    frontend.activate(VERSION_1, [ring.setup for ring in rings])
    fuse_init(rings[1])
    assert read_hello(rings[1]) == b"from the host"
    entry = fuse(rings[1], FUSE_LOOKUP, 1, b"hello\0", 128)[1]
    node = struct.unpack_from("<Q", entry)[0]
    error, _ = fuse(rings[1], FUSE_OPEN, node, struct.pack("<II", os.O_WRONLY, 0), 16)
    answers = {name: fuse(rings[1], opcode, 1, body, 256)[0] for name, (opcode, body) in WRITES.items()}
    return {"open": error, **answers}


@pytest.mark.usefixtures("virtiofsd")
def test_read_only_is_enforced_by_the_host(rig: Rig, tmp_path: Path) -> None:
    """The guest's own mount option protects nothing from a guest whose root speaks FUSE."""
    (tmp_path / "hello").write_bytes(b"from the host")
    mode = tmp_path.stat().st_mode
    answers = attempts(rig, FsDevice("tag", str(tmp_path), readonly=True))
    assert answers == dict.fromkeys(["open", *WRITES], -errno.EROFS)
    assert [path.name for path in tmp_path.iterdir()] == ["hello"]
    assert tmp_path.stat().st_mode == mode
    (tmp_path / "new").mkdir()  # the host itself goes on as before


@pytest.mark.usefixtures("virtiofsd")
def test_writes_succeed_where_nobody_forbids_them(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "hello").write_bytes(b"from the host")
    answers = attempts(rig, FsDevice("tag", str(tmp_path)))
    assert answers == dict.fromkeys(["open", *WRITES], 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new"]


@pytest.mark.parametrize("cache", ["auto", "always", "never"])
def test_cache_modes_are_the_same_for_both(rig: Rig, tmp_path: Path, virtiofsd: str, cache: str) -> None:
    process = backends.start_virtiofsd(FsDevice("tag", str(tmp_path), cache=cache))
    frontend, _ = rig.connect(process, "fs", 2, b"tag")
    assert frontend.features & VERSION_1


def test_missing_directory() -> None:
    with pytest.raises(ConfigError, match="dir=/nowhere: no such directory"):
        backends.start_virtiofsd(FsDevice("tag", "/nowhere"))


# -- qemu-storage-daemon -----------------------------------------------------------


def blk(ring: Ring, kind: int, sector: int, data: bytes = b"", size: int = 0) -> tuple[int, bytes]:
    """One block request (virtio 1.2, 5.2.6); status and data."""
    out = [struct.pack("<IIQ", kind, 0, sector)] + ([data] if data else [])
    *rest, status = ring.request(out, ([size] if size else []) + [1])
    return status[0], b"".join(rest)


def start_disk(rig: Rig, device: DiskDevice, **options: Any) -> tuple[Frontend, list[Ring]]:
    return rig.connect(backends.start_disk(device), "block", device.num_queues, **options)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk,image.raw"
    path.write_bytes(b"".join(bytes([n]) * 512 for n in range(200)))
    return path


def test_raw_disk(rig: Rig, image: Path) -> None:
    frontend, rings = start_disk(rig, DiskDevice(str(image)))
    assert struct.unpack("<Q", frontend.read_config(0, 8)) == (200,)
    assert frontend.features & BLK_F_FLUSH and not frontend.features & BLK_F_RO
    frontend.activate(VERSION_1 | BLK_F_FLUSH, [ring.setup for ring in rings])
    assert blk(rings[0], BLK_IN, 7, size=1024) == (0, bytes([7]) * 512 + bytes([8]) * 512)
    assert blk(rings[0], BLK_OUT, 3, b"w" * 512) == (0, b"")
    assert blk(rings[0], BLK_FLUSH, 0) == (0, b"")
    assert image.read_bytes()[3 * 512 : 4 * 512] == b"w" * 512
    frontend.reset()
    rings[0].restart()
    frontend.activate(VERSION_1, [ring.setup for ring in rings])
    assert blk(rings[0], BLK_IN, 3, size=512) == (0, b"w" * 512)
    assert not rig.lost


def test_a_killed_storage_daemon_is_started_again(rig: Rig, image: Path) -> None:
    frontend, rings = start_disk(rig, DiskDevice(str(image)), on_loss=RECONNECT)
    frontend.activate(VERSION_1 | BLK_F_FLUSH, [ring.setup for ring in rings])
    assert blk(rings[0], BLK_OUT, 3, b"w" * 512) == (0, b"")
    with killed(rig, frontend):
        assert blk(rings[0], BLK_IN, 3, size=512) == (0, b"w" * 512)
        assert blk(rings[0], BLK_OUT, 4, b"x" * 512) == (0, b"")
        assert blk(rings[0], BLK_FLUSH, 0) == (0, b"")
    assert image.read_bytes()[3 * 512 : 5 * 512] == b"w" * 512 + b"x" * 512
    assert not rig.lost


def test_read_only_disk(rig: Rig, image: Path) -> None:
    image.chmod(0o444)
    frontend, rings = start_disk(rig, DiskDevice(str(image), readonly=True))
    assert frontend.features & BLK_F_RO
    frontend.activate(VERSION_1 | BLK_F_RO, [ring.setup for ring in rings])
    assert blk(rings[0], BLK_OUT, 3, b"w" * 512)[0] != 0
    assert image.read_bytes()[3 * 512] == 3


def test_several_queues(rig: Rig, image: Path) -> None:
    frontend, rings = start_disk(rig, DiskDevice(str(image), num_queues=4))
    assert frontend.features & BLK_F_MQ
    assert struct.unpack("<H", frontend.read_config(34, 2)) == (4,)
    frontend.activate(VERSION_1 | BLK_F_MQ, [ring.setup for ring in rings])
    for ring in rings:
        assert blk(ring, BLK_IN, 9, size=512) == (0, bytes([9]) * 512)


def test_qcow2_disk(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    make_qcow2(path, sectors=2048)
    frontend, rings = start_disk(rig, DiskDevice(str(path)))
    assert struct.unpack("<Q", frontend.read_config(0, 8)) == (2048,)
    frontend.activate(VERSION_1, [ring.setup for ring in rings])
    assert blk(rings[0], BLK_OUT, 2000, b"q" * 512) == (0, b"")
    assert blk(rings[0], BLK_IN, 2000, size=512) == (0, b"q" * 512)
    assert path.stat().st_size < 1 << 20


def make_qcow2(path: Path, sectors: int, backing: bytes = b"") -> None:
    """An empty version 2 image (docs/interop/qcow2.txt): header, L1, refcount table and block."""
    cluster = 1 << 16
    header = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb", 2, 512 if backing else 0, len(backing), 16, sectors * 512,
        0, 1, cluster, 2 * cluster, 1, 0, 0,
    )  # fmt: skip
    image = bytearray(4 * cluster)
    image[: len(header)] = header
    image[512 : 512 + len(backing)] = backing
    struct.pack_into(">Q", image, 2 * cluster, 3 * cluster)
    struct.pack_into(">4H", image, 3 * cluster, 1, 1, 1, 1)
    path.write_bytes(image)


def test_write_cache_switch_is_forwarded(rig: Rig, image: Path) -> None:
    """The one byte (wce) that the daemon lets a driver write."""
    frontend, _ = start_disk(rig, DiskDevice(str(image)))
    before = frontend.read_config(32, 1)
    frontend.write_config(32, bytes([1 - before[0]]))
    assert frontend.read_config(32, 1) != before
    assert not rig.lost


def test_an_image_has_one_writer(rig: Rig, image: Path) -> None:
    start_disk(rig, DiskDevice(str(image)))
    for readonly in (False, True):
        with pytest.raises(ConfigError, match="another machine uses it"):
            start_disk(rig, DiskDevice(str(image), readonly=readonly))


def test_an_image_may_have_several_readers(rig: Rig, image: Path) -> None:
    for _ in range(2):
        start_disk(rig, DiskDevice(str(image), readonly=True))


def test_what_the_backend_said_is_in_the_message(rig: Rig, image: Path) -> None:
    with pytest.raises(ConfigError, match=r"no vhost-user dialogue .*it ended with status 1: .*qcow2"):
        start_disk(rig, DiskDevice(str(image), image_type="qcow2"))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (DiskDevice("/nowhere/disk"), "path=/nowhere/disk: No such file or directory; name an image"),
        (DiskDevice("/tmp"), "path=/tmp: Is a directory"),
    ],
)
def test_unusable_images(device: DiskDevice, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backends.start_disk(device)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    process = backends.start_disk(DiskDevice(str(image)))
    assert list((tmp_path / "run").iterdir()) == []
    process.close()
    process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
