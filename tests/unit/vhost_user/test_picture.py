"""The picture of a display, and its file, which is written while the loop does other things."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from time import monotonic

import pytest

from pyvmm import log
from pyvmm.loop import EventLoop
from pyvmm.vhost_user import picture as module
from pyvmm.vhost_user.picture import Picture, png

LIMIT = 10.0


class Rig:
    """A picture, its file and its loop."""

    def __init__(self, path: Path) -> None:
        self.path, self.loop = path, EventLoop()
        self.picture = Picture("gpu", str(path), self.loop)

    def draw(self, x: int, y: int, width: int, data: bytes) -> None:
        self.picture.draw(x, y, width, memoryview(data))

    def turn_until(self, condition: Callable[[], object]) -> None:
        due = monotonic() + LIMIT
        while not condition():
            assert monotonic() < due
            self.loop._turn(0.01)

    def close(self) -> None:
        self.picture.close()
        self.loop.close()


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    made = Rig(tmp_path / "screen.png")
    yield made
    made.close()


class Slow:
    """Stands in for what makes the file, and takes until it is let go."""

    def __init__(self) -> None:
        self.made: list[bytes] = []
        self.started, self.go = Event(), Event()

    def __call__(self, width: int, height: int, pixels: bytes) -> bytes:
        self.started.set()
        assert self.go.wait(LIMIT)
        self.made.append(bytes(pixels))
        return png(width, height, pixels)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    stand_in = Slow()
    monkeypatch.setattr(module, "png", stand_in)
    return stand_in


def decoded(path: Path) -> tuple[int, int, list[bytes]]:
    """Width, height and rows of RGB of a PNG without filters."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length)[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + length
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 2, 0, 0, 0] and list(chunks)[-1] == b"IEND"
    raw = zlib.decompress(chunks[b"IDAT"])
    rows = [raw[i : i + 1 + 3 * width] for i in range(0, len(raw), 1 + 3 * width)]
    assert all(row[0] == 0 for row in rows)
    return width, height, [row[1:] for row in rows]


def test_the_file_has_the_picture(rig: Rig) -> None:
    """A rectangle in the lower right corner of what is 3 x 2."""
    rig.picture.resize(3, 2)
    rig.draw(0, 0, 3, bytes(range(24)))
    rig.draw(1, 1, 2, bytes(range(100, 108)))
    rig.turn_until(rig.path.exists)
    width, height, rows = decoded(rig.path)
    assert (width, height) == (3, 2)
    assert rows == [bytes((2, 1, 0, 6, 5, 4, 10, 9, 8)), bytes((14, 13, 12, 102, 101, 100, 106, 105, 104))]


def test_the_same_size_again_and_a_display_turned_off_leave_the_picture(rig: Rig) -> None:
    rig.picture.resize(2, 1)
    rig.draw(0, 0, 2, b"12345678")
    pixels = rig.picture.pixels
    for size in ((2, 1), (0, 0), (0, 1), (2, 0), (2, 1)):
        rig.picture.resize(*size)
        assert rig.picture.pixels is pixels and rig.picture.size == (2, 1)
    rig.picture.resize(1, 1)
    assert rig.picture.pixels == bytes(4)


def test_a_rectangle_without_pixels_is_no_work(rig: Rig) -> None:
    class Untouched(bytearray):
        def __setitem__(self, *_: object) -> None:
            pytest.fail("a row was copied")

    rig.picture.resize(8, 8)
    rig.picture.pixels = Untouched(256)
    rig.draw(0, 0, 0, b"")
    assert rig.picture._timer is None, "and nothing is to be saved"


def test_the_loop_goes_on_while_the_file_is_written(rig: Rig, slow: Slow) -> None:
    """What is drawn meanwhile is in the next file."""
    rig.picture.resize(1, 1)
    rig.draw(0, 0, 1, b"old.")
    rig.turn_until(slow.started.is_set)
    for step in range(3):
        rig.draw(0, 0, 1, b"new%d" % step)
        rig.loop._turn(0.01)
    assert not slow.made
    slow.go.set()
    rig.turn_until(lambda: len(slow.made) == 2)
    assert slow.made == [b"old.", b"new2"]


def test_the_end_waits_for_the_file_and_writes_the_last_one(rig: Rig, slow: Slow) -> None:
    rig.picture.resize(1, 1)
    rig.draw(0, 0, 1, b"old.")
    rig.turn_until(slow.started.is_set)
    rig.draw(0, 0, 1, b"new.")
    slow.go.set()
    rig.picture.close()
    assert slow.made == [b"old.", b"new."]
    rig.loop._turn(0.01)
    assert rig.picture._timer is None, "nothing comes after the end"


def test_a_file_that_cannot_be_written_is_told_of_once(
    tmp_path: Path, rig: Rig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log, "_said", set())
    rig.path = tmp_path / "file" / "screen.png"
    rig.path.parent.write_bytes(b"")
    rig.picture = Picture("gpu", str(rig.path), rig.loop)
    rig.picture.resize(1, 1)
    for _ in range(2):
        rig.draw(0, 0, 1, b"1234")
        rig.turn_until(lambda: rig.picture._writer)
        rig.turn_until(lambda: not rig.picture._writer)
    assert capfd.readouterr().err == f"pyvmm: gpu: display={rig.path}: File exists\n"


def test_no_file_no_thread(rig: Rig) -> None:
    rig.picture = Picture("gpu", "", rig.loop)
    rig.picture.resize(1, 1)
    rig.draw(0, 0, 1, b"1234")
    assert rig.picture.pixels == b"1234" and rig.picture._timer is None
