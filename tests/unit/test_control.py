"""The control socket of no machine: what may go wrong with it while a machine runs."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
from fakes.backend import no_new_fds
from fakes.limits import descriptors_left

from pyvmm.control import ControlSocket
from pyvmm.loop import EventLoop


@pytest.mark.parametrize("count", [0, 1])
def test_who_connects_while_descriptors_are_short_does_not_end_the_machine(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be none for the connection, or none for the memory."""
    monkeypatch.chdir(tmp_path)
    ram = os.memfd_create("ram")
    with no_new_fds(), EventLoop() as loop:
        control = ControlSocket("s", lambda: {"pid": 1}, ram, loop)
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect("s")
            with descriptors_left(count):
                loop._turn(1)
                begin = time.monotonic()
                loop._turn(0.05)
                assert count or time.monotonic() - begin >= 0.05, "it is not looked at all the time"
            loop.call_later(0.2, loop.stop)
            loop.run()
            peer.setblocking(False)
            assert count or peer.recv(99) == b'{"pid": 1}', "it waited for better times"
        control.close()
    os.close(ram)
