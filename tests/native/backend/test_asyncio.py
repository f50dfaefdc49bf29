"""Serving in asyncio: completion in any order, timers, ends."""

from __future__ import annotations

import asyncio
import os
import random
import socket

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from native.backend.test_serving import Broken, Driver, Upper, trip

from pyvmm.backend import ConfigSpace, serve_async
from pyvmm.backend.faults import Faults


class Sleepy(Upper):
    """Completes each chain in a task of its own, after as many turns of the loop as it says."""

    def __init__(self):
        super().__init__()
        self.order = []
        self.tasks = set()

    def on_queue(self, queue):
        for chain in queue:
            queue.keep(chain)
            task = asyncio.get_running_loop().create_task(self._answer(queue, chain))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _answer(self, queue, chain):
        data = chain.read()
        for _ in range(data[0]):
            await asyncio.sleep(0)
        chain.write(data.upper())
        self.order.append(data[0])
        chain.push()
        queue.notify()


def drive(sock, script):
    """Run `script(driver)` in a thread and await its result."""

    def work():
        driver = Driver(sock)
        try:
            return script(driver)
        finally:
            driver.close()

    return asyncio.to_thread(work)


def serve_and_drive(device, script):
    """Serve `device` in asyncio until `script(driver)` is done; what that returns."""

    async def main():
        ours, theirs = socket.socketpair()
        serving = asyncio.create_task(serve_async(device, theirs))
        result = await drive(ours, script)
        await serving  # it ends with the connection
        return result

    return asyncio.run(main())


def test_asyncio_with_completion_in_any_order():
    device = Sleepy()
    turns = random.Random(2).sample(range(1, 60), 8)

    def script(driver):
        heads = {driver.queue.add([bytes([turn]) + b"abc"], [4]): turn for turn in turns}
        driver.queue.kick()
        got = []
        while len(got) < len(turns):
            used = driver.queue.wait(20)
            assert used
            got += used
        return {heads[head]: data for head, data in got}, [heads[head] for head, _ in got]

    answers, order = serve_and_drive(device, script)
    assert answers == {turn: bytes([turn]).upper() + b"ABC" for turn in turns}
    assert order == device.order != turns
    assert order == sorted(turns)  # who waits longer comes later


def test_asyncio_at_a_path_until_cancelled(tmp_path):
    path = str(tmp_path / "sock")

    async def main():
        serving = asyncio.create_task(serve_async(Upper(), path))
        for _ in range(3):
            while not os.path.exists(path):
                await asyncio.sleep(0.01)
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(path)
            assert await drive(sock, lambda driver: driver.ask([b"abc"], [3])) == b"ABC"
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving

    asyncio.run(main())
    assert not os.path.exists(path)


def faulty(**plan):
    """A device that answers in tasks, with a plan of faults."""
    device = Sleepy()
    Faults(**plan).attach(device)
    return device


def test_timer_that_a_task_sets():
    """Nothing else happens meanwhile."""
    device = faulty(delay={0}, delay_seconds=0.1)
    assert serve_and_drive(device, lambda driver: driver.ask([b"\1"], [1])) == b"\1"


def test_connection_that_a_task_ends():
    device = faulty(needs_reset={0})

    def script(driver):
        driver.queue.add([b"\1"], [1])
        driver.queue.kick()
        return driver.frontend.sock.recv(1)

    assert serve_and_drive(device, script) == b""


class Timed(Upper):
    """Sets a timer before anybody connects, when nothing else has happened."""

    def open(self, loop):
        self.config = ConfigSpace([("word", 4)])
        loop.call_later(0.01, self.ring)

    def ring(self):
        self.config["word"] = 7


def test_timer_that_is_set_before_the_first_message():
    device = Timed()

    async def main():
        ours, theirs = socket.socketpair()
        serving = asyncio.create_task(serve_async(device, theirs))
        while not len(device.config) or not device.config["word"]:
            await asyncio.sleep(0.01)
        ours.close()
        await serving

    asyncio.run(asyncio.wait_for(main(), 10))


def test_bug_in_a_device_is_raised_by_serve_async():
    async def main():
        ours, theirs = socket.socketpair()
        serving = asyncio.create_task(serve_async(Broken(), theirs))
        driving = asyncio.create_task(drive(ours, trip))
        with pytest.raises(ZeroDivisionError):
            await serving
        await asyncio.gather(driving, return_exceptions=True)

    asyncio.run(main())
