"""The screen of a vhost-user GPU: the test is the backend at the other end of its socket."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from socket import socket
from typing import Any

import pytest
from fakes.backend import no_new_fds

from pyvmm import config, devices, log
from pyvmm.errors import ConfigError
from pyvmm.loop import EventLoop
from pyvmm.vhost_user import gpu
from pyvmm.vhost_user.gpu import HEADER, REQUESTS, Screen
from pyvmm.vhost_user.picture import png

IDS = {row.name: row.id for row in REQUESTS}


class Client:
    """What a frontend's client is to a screen; keeps the backend's end."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def call(self, name: str, fds: tuple[int, ...]) -> None:
        self.asked.append(name)
        self.backend = socket(fileno=os.dup(fds[0]))
        self.backend.settimeout(5)


class Rig:
    """A screen, its loop, and the backend's end of the connection."""

    def __init__(self, path: str) -> None:
        self.now = self.tick = 0.0
        self.loop = EventLoop()
        self.client = Client()
        self.screen = Screen("gpu", path, self.loop)
        self.attach()

    def clock(self) -> float:
        """Each look at it takes `tick` seconds."""
        self.now += self.tick
        return self.now

    def attach(self) -> None:
        self.screen.attach(self.client)  # type: ignore[arg-type]
        self.turn()

    def turn(self, seconds: float = 0.0) -> None:
        """Let the loop do what there is to do."""
        self.loop.call_later(seconds, self.loop.stop)
        self.loop.run()
        self.loop._stopped = False

    def post(self, name: str, body: bytes = b"", flags: int = 0) -> None:
        self.client.backend.sendall(HEADER.pack(IDS[name], flags, len(body)) + body)

    def send(self, name: str, body: bytes = b"", flags: int = 0) -> None:
        self.post(name, body, flags)
        self.turn()

    def ask(self, name: str, body: bytes = b"") -> bytes:
        self.send(name, body)
        number, flags, size = HEADER.unpack(self.client.backend.recv(HEADER.size))
        assert (number, flags) == (IDS[name], 4)
        return self.client.backend.recv(size) if size else b""

    def hung_up(self) -> bool:
        self.turn()
        try:
            return self.client.backend.recv(1) == b""
        except ConnectionResetError:  # it had not read everything
            return True

    def close(self) -> None:
        self.screen.close()
        self.client.backend.close()
        self.loop.close()


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    with no_new_fds():
        made = Rig(str(tmp_path / "screen.png"))
        monkeypatch.setattr(gpu, "monotonic", made.clock)
        yield made
        made.close()


def test_the_socket_is_handed_over(rig: Rig) -> None:
    assert rig.client.asked == ["GPU_SET_SOCKET"]


def test_what_a_backend_asks_is_answered(rig: Rig) -> None:
    assert rig.ask("GET_PROTOCOL_FEATURES") == bytes(8)
    rig.send("SET_PROTOCOL_FEATURES", bytes(8))
    displays = rig.ask("GET_DISPLAY_INFO")
    assert len(displays) == 24 + 16 * 24
    assert struct.unpack_from("<I", displays)[0] == 0x1101
    assert struct.unpack_from("<6I", displays, 24) == (0, 0, 1024, 768, 1, 0)
    assert not any(displays[48:])
    assert len(rig.ask("GET_EDID", bytes(4))) == 24 + 8 + 1024
    assert rig.ask("DMABUF_UPDATE", bytes(20)) == b""


def test_the_picture_is_what_was_drawn(rig: Rig) -> None:
    """A screen of 3 x 2, then a rectangle of 2 x 1 in its lower right corner."""
    rig.send("SCANOUT", struct.pack("<3I", 0, 3, 2))
    rig.send("UPDATE", struct.pack("<5I", 0, 0, 0, 3, 2) + bytes(range(24)))
    rig.send("UPDATE", struct.pack("<5I", 0, 1, 1, 2, 1) + bytes(range(100, 108)))
    assert rig.screen.picture.pixels == bytes(range(16)) + bytes(range(100, 108))


def test_what_is_not_saved_yet_is_saved_at_the_end(rig: Rig, tmp_path: Path) -> None:
    rig.send("SCANOUT", struct.pack("<3I", 0, 1, 1))
    rig.send("UPDATE", struct.pack("<5I", 0, 0, 0, 1, 1) + b"\1\2\3\0")
    rig.screen.close()
    assert (tmp_path / "screen.png").read_bytes() == png(1, 1, b"\1\2\3\0")


def test_messages_in_pieces_are_whole_messages(rig: Rig) -> None:
    data = HEADER.pack(IDS["SCANOUT"], 0, 12) + struct.pack("<3I", 0, 5, 4)
    for byte in data:
        rig.client.backend.sendall(bytes((byte,)))
        rig.turn()
    assert rig.screen.picture.size == (5, 4)


def test_a_message_that_takes_several_reads(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "RECEIVE", 7)
    rig.send("SCANOUT", struct.pack("<3I", 0, 3, 2))
    rig.send("UPDATE", struct.pack("<5I", 0, 0, 0, 3, 2) + bytes(range(24)))
    assert rig.screen.picture.pixels == bytes(range(24))


def test_other_screens_and_cursors_change_nothing(rig: Rig) -> None:
    rig.send("SCANOUT", struct.pack("<3I", 1, 5, 4))
    rig.send("UPDATE", struct.pack("<5I", 1, 0, 0, 1, 1) + bytes(4))
    rig.send("CURSOR_POS", bytes(12))
    rig.send("CURSOR_UPDATE", bytes(20 + gpu.CURSOR_BYTES))
    assert rig.screen.picture.size == (0, 0)
    assert rig.ask("GET_PROTOCOL_FEATURES") == bytes(8)


@pytest.mark.parametrize(
    ("name", "body", "flags"),
    [
        ("GET_PROTOCOL_FEATURES", b"more", 0),
        ("GET_PROTOCOL_FEATURES", b"", 4),
        ("SCANOUT", bytes(11), 0),
        ("SCANOUT", struct.pack("<3I", 0, 8193, 1), 0),
        ("SCANOUT", struct.pack("<3I", 0, 1, 8193), 0),
        ("SCANOUT", struct.pack("<3I", 0, 3841, 2160), 0),
        ("UPDATE", struct.pack("<5I", 0, 0, 0, 1, 1) + bytes(4), 0),
        ("CURSOR_UPDATE", bytes(21 + gpu.CURSOR_BYTES), 0),
    ],
)
def test_nonsense_costs_the_connection(
    rig: Rig, name: str, body: bytes, flags: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(log, "warn", said.append)
    rig.send(name, body, flags)
    assert rig.hung_up() and len(said) == 1


def test_more_pixels_than_a_screen_has_are_not_waited_for(rig: Rig) -> None:
    rig.client.backend.sendall(HEADER.pack(IDS["UPDATE"], 0, 20 + 4 * gpu.MAX_PIXELS + 1))
    assert rig.hung_up()


def test_a_flood_of_messages_leaves_the_loop_time_for_others(rig: Rig) -> None:
    scanouts = [struct.pack("<3I", 0, width, 1) for width in range(1, 101)]
    rig.client.backend.sendall(b"".join(HEADER.pack(IDS["SCANOUT"], 0, 12) + body for body in scanouts))
    rig.tick = gpu.TURN / 8
    rig.turn()
    assert 0 < rig.screen.picture.size[0] < 8
    for _ in range(100):
        rig.turn()
    assert rig.screen.picture.size == (100, 1), "nothing is lost"


def test_answers_that_are_not_read_cost_the_connection(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr(log, "warn", said.append)
    for _ in range(10_000):
        rig.post("GET_EDID", bytes(4))
        rig.turn()
        if said:
            break
    assert len(said) == 1
    while not rig.hung_up():
        rig.client.backend.recv(1 << 20)


def test_a_new_backend_gets_a_new_socket(rig: Rig) -> None:
    old = rig.client.backend
    rig.attach()
    assert old.recv(1) == b""
    old.close()
    assert rig.ask("GET_PROTOCOL_FEATURES") == bytes(8)


def test_a_socket_that_the_loop_never_listened_to_is_closed(rig: Rig) -> None:
    """The machine ends while a new backend is greeted, or was never run."""
    rig.client.backend.close()
    rig.screen.attach(rig.client)  # type: ignore[arg-type]
    rig.screen.close()
    assert rig.client.backend.recv(1) == b""
    rig.turn()


def test_of_two_new_sockets_the_later_one_is_used(rig: Rig) -> None:
    for _ in range(2):
        rig.client.backend.close()
        rig.screen.attach(rig.client)  # type: ignore[arg-type]
    rig.turn()
    assert rig.ask("GET_PROTOCOL_FEATURES") == bytes(8)


def test_a_backend_that_ends_is_no_fault(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "warn", pytest.fail)
    rig.client.backend.shutdown(2)
    rig.turn()
    rig.turn()


def test_only_a_gpu_has_a_display() -> None:
    device = config.generic("device_type=net,socket=/nowhere,display=/tmp/x.png")
    with pytest.raises(ConfigError, match="display=/tmp/x.png: only device_type=gpu has one"):
        devices.prepare(device)
