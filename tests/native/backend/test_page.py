"""The devices that docs/backends.md shows in parts do what it says; the whole ones run in a guest."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from native.backend.test_asyncio import serve_and_drive
from native.backend.test_serving import Driver
from native.backend.test_shared_memory import Pair

from pyvmm.backend import ConfigSpace, Device, DeviceThread, SharedMemory
from pyvmm.vhost_user.payloads import Config

PAGE = Path(__file__).parents[3] / "docs" / "backends.md"
PARTS = {"Counter", "Late", "Window"}
NAMES = {
    "asyncio": asyncio,
    "os": os,
    "ConfigSpace": ConfigSpace,
    "Device": Device,
    "SharedMemory": SharedMemory,
}


def parts():
    """What follows each class statement that begins a block, by the class's name."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return {found[1]: block for block in blocks if (found := re.match(r"class (\w+)", block))}


def shown(name, **names):
    """The class of this name on the page, with `names` around it."""
    namespace = {**NAMES, **names}
    exec(parts()[name], namespace)
    return namespace[name]


def test_all_of_them_are_tested():
    assert parts().keys() == PARTS


def test_late():
    async def compute(data):
        await asyncio.sleep(0.01 * data[0])
        return data.upper()

    late = shown("Late", compute=compute)()

    def script(driver):
        for turn in (3, 1):
            driver.queue.add([bytes([turn]) + b"ab"], [3])
        driver.queue.kick()
        got = []
        while len(got) < 2:
            got += driver.queue.wait(20)
        return [data for _, data in got]

    assert serve_and_drive(late, script) == [b"\1AB", b"\3AB"]
    assert late.tasks == set()


def test_counter():
    counter = shown("Counter")()
    with DeviceThread(counter) as thread:
        driver = Driver(thread.take_socket())
        assert driver.ask([], [4]) == b"\1\0\0\0"
        driver.frontend.tell("SET_CONFIG", Config(0, 0, b"\5\0"))
        assert driver.ask([], [4]) == b"\6\0\0\0"
        assert driver.frontend.ask("GET_CONFIG", Config(4, 0, bytes(4))).data == b"\6\0\0\0"
        driver.close()
    other = shown("Counter")()
    other.load_state(counter.save_state())
    assert (other.config["step"], other.config["count"]) == (5, 6)
    with pytest.raises(ValueError, match="no state"):
        other.load_state(b"")


def test_window(tmp_path):
    (tmp_path / "file").write_bytes(b"zero".ljust(4096) + b"one ".ljust(4096))
    device = shown("Window")(tmp_path / "file")
    pair = Pair(device)
    try:
        assert [pair.do(lambda page=page: device.show(page)) for page in (1, 1, 1 << 20)] == [
            True,
            False,
            False,
        ]
        assert pair.map.there == {(0, 4096): (b"one ", 4096, False)}
    finally:
        pair.close()
