"""Servers that want the same place: the first keeps it, whatever becomes of the second."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from time import monotonic, sleep

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.backend import no_new_fds

from pyvmm.backend import serve
from pyvmm.backend.loop import DeviceLoop
from pyvmm.backend.rng import Rng


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
