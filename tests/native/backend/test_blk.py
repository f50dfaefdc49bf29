"""The block device: its own rules, the same answers as qemu-storage-daemon's, and kills."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.lives import Life
from fakes.ring_driver import DriverQueue, Ram, RawFrontend

from pyvmm.backend.process import spawn
from pyvmm.vhost_user.payloads import Config

SECTORS = 256
IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8
OK, IOERR, UNSUPP = 0, 1, 2
F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_WCE, F_MQ = (1 << bit for bit in (2, 5, 6, 9, 11, 12))
EVERYTHING = 1 << 30 | 1 << 32


def header(kind, sector=0):
    return struct.pack("<IIQ", kind, 0, sector)


def noise(count, seed=1):
    return random.Random(seed).randbytes(512 * count)


class Disk:
    """A backend's queue 0; `ask` sends one request and gives what was written to it."""

    def __init__(self, sock, features=None, size=128):
        self.ram = Ram(32 << 20)
        self.queue = DriverQueue(self.ram, size)
        self.frontend = RawFrontend(sock)
        self.offered = self.frontend.negotiate(features)
        self.frontend.share(self.ram, 2)
        assert self.frontend.start(0, self.queue) == 0

    def ask(self, out, room, **options):
        self.queue.add(out, room, **options)
        self.queue.kick()
        done = self.queue.wait(20)
        assert done, "no answer"
        return done[0][1]

    def config(self, offset, size):
        return self.frontend.ask("GET_CONFIG", Config(offset, 0, bytes(size))).data

    def close(self):
        self.frontend.close()
        self.queue.close()
        self.ram.close()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(noise(SECTORS))
    return path


@pytest.fixture
def plug():
    """Our device in a process of its own, as a `Disk`."""

    def plug(image, features=EVERYTHING, size=128, **options):
        def make():
            from pyvmm.backend.blk import Blk

            return Blk(str(image), size=size, **options)

        process = spawn(make)
        stack.callback(process.close)
        disk = Disk(process.take_socket(), features, size)
        stack.callback(disk.close)
        return disk

    with ExitStack() as stack:
        yield plug


def test_reads_what_is_in_the_image(plug, image):
    disk, data = plug(image), image.read_bytes()
    assert disk.ask([header(IN, 3)], [512, 1]) == data[3 * 512 : 4 * 512] + b"\0"
    assert disk.ask([header(IN)], [512 * SECTORS, 1]) == data + b"\0"
    assert disk.ask([header(IN, 1)], [100, 924, 1]) == data[512 : 3 * 512] + b"\0"
    assert disk.ask([header(IN, 2)], [513]) == data[1024:1536] + b"\0"  # data and status in one buffer


def test_writes_into_the_image(plug, image):
    disk, data = plug(image), noise(4, 2)
    assert disk.ask([header(OUT, 5) + data[:7], data[7:]], [1]) == b"\0"
    assert disk.ask([header(IN, 5)], [2048, 1]) == data + b"\0"
    assert image.read_bytes()[5 * 512 : 9 * 512] == data


def test_hundreds_of_pieces(plug, image):
    """More buffers than one system call takes, through an indirect table."""
    disk, data = plug(image, EVERYTHING | 1 << 28, 1024), noise(SECTORS, 3)
    pieces = [data[at : at + 64] for at in range(0, len(data) // 2, 64)]
    assert disk.ask([header(OUT), *pieces[:1020]], [1], indirect=True) == b"\1"  # not whole sectors
    assert disk.ask([header(OUT), *pieces[:1016]], [1], indirect=True) == b"\0"
    assert image.read_bytes()[: 1016 * 64] == data[: 1016 * 64]


def test_flush_and_identity(plug, image):
    disk = plug(image)
    assert disk.ask([header(FLUSH)], [1]) == b"\0"
    assert disk.ask([header(GET_ID)], [20, 1]) == b"disk.img".ljust(20, b"\0") + b"\0"
    assert disk.ask([header(GET_ID)], [4, 1]) == b"disk\0"


def test_read_only(plug, image):
    image.chmod(0o444)
    before = image.read_bytes()
    disk = plug(image, EVERYTHING | F_RO, read_only=True)
    assert disk.offered & F_RO
    assert disk.ask([header(OUT), bytes(512)], [1]) == b"\1"
    assert disk.ask([header(IN)], [512, 1])[-1] == OK
    assert disk.ask([header(FLUSH)], [1]) == b"\0"
    assert image.read_bytes() == before


def test_configuration_space(plug, image):
    with image.open("ab") as file:
        file.write(b"rest")
    disk = plug(image, queues=3)
    offered = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_WCE | F_MQ
    assert disk.offered & (offered | F_RO) == offered
    assert disk.frontend.number("GET_QUEUE_NUM") == 3
    capacity, _, seg_max, _, blk_size = struct.unpack("<QIIII", disk.config(0, 24))
    assert (capacity, seg_max, blk_size) == (SECTORS, 126, 512)
    assert struct.unpack("<H", disk.config(34, 2)) == (3,)
    assert disk.config(32, 1) == b"\1"
    disk.frontend.tell("SET_CONFIG", Config(32, 0, b"\0"))
    assert disk.config(32, 1) == b"\0"
    disk.frontend.tell("SET_CONFIG", Config(0, 0, b"\xff" * 60))
    assert disk.config(0, 8) == struct.pack("<Q", SECTORS)
    assert disk.config(32, 1) == b"\1"


@pytest.mark.parametrize(
    ("features", "cache", "flags"),
    [(F_FLUSH, 1, 0), (F_FLUSH | F_WCE, 1, 0), (F_FLUSH | F_WCE, 0, os.RWF_DSYNC), (0, 1, os.RWF_DSYNC)],
)
def test_writes_go_through_unless_the_driver_can_flush(image, monkeypatch, features, cache, flags):
    """Section 5.2.5.2; the flag of each write is what decides."""
    from pyvmm.backend.blk import Blk

    seen = []
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset, flags: seen.append(flags) or 512)
    device = Blk(str(image))
    device.driver_features = features
    device.on_config_write(32, bytes([cache]))
    assert device._move(0, [memoryview(bytes(512))], 512, device._write) == OK
    assert seen == [flags]
    device.close()


MALFORMED = {
    "no header": ([], [512, 1], IOERR),
    "short header": ([header(IN)[:15]], [512, 1], IOERR),
    "no whole sector": ([header(IN)], [511, 1], IOERR),
    "write of no whole sector": ([header(OUT), bytes(513)], [1], IOERR),
    "beyond the end": ([header(IN, SECTORS)], [512, 1], IOERR),
    "over the end": ([header(IN, SECTORS - 1)], [1024, 1], IOERR),
    "sector that wraps": ([header(IN, (1 << 64) - 1)], [512, 1], IOERR),
    "write over the end": ([header(OUT, SECTORS - 1), bytes(1024)], [1], IOERR),
    "unknown type": ([header(77)], [512, 1], UNSUPP),
    "discard, never offered": ([header(11), bytes(16)], [1], UNSUPP),
    "read of nothing": ([header(IN)], [1], OK),
    "write of nothing": ([header(OUT)], [1], OK),
}


@pytest.mark.parametrize(("out", "room", "status"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_requests_get_a_status(plug, image, out, room, status):
    before = image.read_bytes()
    disk = plug(image)
    assert disk.ask(out, room)[-1] == status
    assert disk.ask([header(IN)], [512, 1]) == before[:512] + b"\0"
    assert image.read_bytes() == before


def test_request_without_room_for_a_status_is_given_back(plug, image):
    disk = plug(image)
    assert disk.ask([header(IN)], []) == b""
    assert disk.ask([header(FLUSH)], [1]) == b"\0"


def test_image_that_shrinks_costs_the_request_only(plug, image):
    disk = plug(image)
    os.truncate(image, 1024)
    assert disk.ask([header(IN, 1)], [1024, 1])[-1] == IOERR
    assert disk.ask([header(IN, 1)], [512, 1])[-1] == OK


# -- beside qemu-storage-daemon --------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path):
    """The same for qemu-storage-daemon."""
    program = shutil.which("qemu-storage-daemon")
    if program is None:
        pytest.skip("qemu-storage-daemon is missing")

    def plug(image, writable=True):
        path = str(tmp_path / "daemon.sock")
        node = f"driver=file,node-name=d,filename={image},read-only={'off' if writable else 'on'}"
        export = f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={path}"
        command = [
            program,
            "--blockdev",
            node,
            "--export",
            export + ",writable=" + ["no", "yes"][writable],
        ]
        stack.enter_context(process := subprocess.Popen(command))
        stack.callback(process.terminate)
        disk = Disk(connect(path, process), EVERYTHING)
        stack.callback(disk.close)
        return disk

    with ExitStack() as stack:
        yield plug


def connect(path, process):
    end = time.monotonic() + 20
    while time.monotonic() < end and process.poll() is None:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
            return sock
        except OSError:
            sock.close()
            time.sleep(0.02)
    raise AssertionError("nobody listens")


def requests(count, seed):
    """Reads, writes, flushes and nonsense, in and around the image."""
    rng = random.Random(seed)
    for _ in range(count):
        kind = rng.choice((IN, IN, IN, OUT, OUT, OUT, FLUSH, 2, 99))
        sector = rng.choice((rng.randrange(SECTORS), rng.randrange(SECTORS), SECTORS - 2, SECTORS, 1 << 60))
        length = 512 * rng.randrange(9) + rng.choice((0, 0, 0, 0, 1, 100))
        cut = rng.randrange(length + 1)
        pieces = [size for size in (cut, length - cut) if size]
        if kind == OUT:
            yield [header(kind, sector), *(rng.randbytes(size) for size in pieces)], [1]
        else:
            yield [header(kind, sector)], [*(pieces if kind == IN else []), 1]


@pytest.mark.parametrize("writable", [True, False])
def test_same_answers_as_qemu_storage_daemon(plug, daemon, image, tmp_path, writable):
    other = tmp_path / "other.img"
    shutil.copy(image, other)
    ours, theirs = plug(image, read_only=not writable), daemon(other, writable)
    statuses = set()
    for out, room in requests(300, 7):
        answers = [disk.ask(out, room) for disk in (ours, theirs)]
        assert answers[0][-1] == answers[1][-1], (out[0], room)
        assert len(answers[0]) == len(answers[1])
        if answers[0][-1] == OK:  # else the bytes mean nothing
            assert answers[0] == answers[1]
        statuses.add(answers[0][-1])
    assert statuses == {OK, IOERR, UNSUPP}
    assert image.read_bytes() == other.read_bytes()
    assert ours.config(0, 24) == theirs.config(0, 24)  # up to and with blk_size


# -- kills -------------------------------------------------------------------------------------


def test_killed_at_any_moment_it_loses_nothing_acknowledged(image):
    def make():
        from pyvmm.backend.blk import Blk

        return Blk(str(image), size=64)

    rng, life = random.Random(11), Life(make, 64)
    life.start()
    ram, queue = life.ram, life.queue
    slots, free, busy, wanted = ram.alloc(16 * 1024), list(range(16)), {}, {}
    acknowledged = 0
    for _ in range(30):
        goal = acknowledged + rng.randrange(1, 100)
        while acknowledged < goal:
            while free and len(queue.free) >= 3:
                slot = free.pop()
                at, sector, data = slots + 1024 * slot, slot * 8 + rng.randrange(8), rng.randbytes(512)
                ram.data[at : at + 528] = header(OUT, sector) + data
                ram.data[at + 528] = 0xFF
                head = queue.add_rows([(at, 16, 0), (at + 16, 512, 0), (at + 528, 1, 2)])
                busy[head] = slot, sector, data
            queue.kick()
            done = queue.wait(20)
            assert done, "stuck"
            for head, status in done:
                slot, sector, data = busy.pop(head)
                assert status == b"\0"
                wanted[sector] = data
                free.append(slot)
            acknowledged += len(done)
        queue.kick()
        life.kill()
        now = image.read_bytes()
        sectors_busy = {sector for _, sector, _ in busy.values()}
        for sector in wanted.keys() - sectors_busy:
            assert now[sector * 512 : sector * 512 + 512] == wanted[sector]
        life.start()
    life.close()


# -- the program ---------------------------------------------------------------------------------


def program(*arguments, **options):
    command = [sys.executable, "-P", "-m", "pyvmm.backend.blk", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_program(tmp_path, image):
    path = str(tmp_path / "blk.sock")
    with program(
        "--socket-path", path, "--blk-file", str(image), "--read-only", "--num-queues", "2"
    ) as process:
        disk = Disk(connect(path, process))
        assert disk.offered & F_RO
        assert disk.frontend.number("GET_QUEUE_NUM") == 2
        assert disk.ask([header(IN)], [512, 1]) == image.read_bytes()[:512] + b"\0"
        disk.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--blk-file", "/nonexistent"], "--blk-file /nonexistent: No such file"),
        (["--blk-file", "/dev/null"], "neither a file nor a block device"),
        ([], "--blk-file must be given"),
    ],
)
def test_program_without_a_usable_image(tmp_path, arguments, text):
    with program("--socket-path", str(tmp_path / "s"), *arguments) as process:
        assert process.wait(20) == 2
        assert text in process.stderr.read()
