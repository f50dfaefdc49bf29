"""Where servers serve: who wants the place of another, or cannot serve, leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from pathlib import Path
from time import monotonic, sleep

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.backend import no_new_fds

from pyvmm.backend import Device, serve, serve_async
from pyvmm.backend.loop import DeviceLoop
from pyvmm.backend.rng import Rng
from pyvmm.errors import ConfigError


def test_a_second_server_at_the_same_path_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with no_new_fds():
        loop = DeviceLoop()
        first = threading.Thread(target=lambda: serve(Rng(), "s", loop=loop))
        first.start()
        due = monotonic() + 10
        while not os.path.exists("s"):
            assert monotonic() < due
            sleep(0.002)
        second = Rng()
        with pytest.raises(OSError, match="already in use"):
            serve(second, "s")
        second.close()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("s")
        loop.stop()
        first.join()
        loop.close()
    assert not os.path.exists("s")


@pytest.mark.parametrize("sizes", [(), (0,), (256, -1), (32769,), (16,) * 257])
def test_a_device_with_impossible_queues_is_refused(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    device, path = Device(), str(tmp_path / "sock")
    device.queue_sizes = sizes
    ours, theirs = socket.socketpair()
    with no_new_fds(), pytest.raises(ConfigError, match="from 1 to 256 virtqueues of 1 to 32768 entries"):
        serve(device, path)
    with pytest.raises(ConfigError):
        serve(device, theirs)
    assert ours.recv(1) == b""  # its end is closed
    ours.close()
    with no_new_fds(), pytest.raises(ConfigError):
        asyncio.run(serve_async(device, path))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("sizes", [(1,), (32768,) * 256])
def test_the_largest_and_smallest_queues(sizes: tuple[int, ...]) -> None:
    device = Device()
    device.queue_sizes = sizes
    ours, theirs = socket.socketpair()
    ours.close()
    serve(device, theirs)
