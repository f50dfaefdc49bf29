"""A driver of an entropy device in a whole machine, run by the test beside the guest.

The guest only spins: the test's thread is its driver, on the machine's own buses and memory.
"""

from __future__ import annotations

import struct
import threading
import time

from fakes.driver import ConfigAccess, VirtioDriver
from fakes.packed_driver import AVAIL, EVENTS_AT, USED
from fakes.program import LIMIT
from fakes.ring_driver import WRITE

from pyvmm import layout
from pyvmm.virtio import spec
from pyvmm.vm import STOPPED

BUFFER = 0x30_0000


class Entropy:
    """The driver of an entropy device of `built`, whose rings are at `base`."""

    def __init__(self, built, slot, base):
        self.driver = VirtioDriver(built.board.mmio, ConfigAccess(built.board.mmio, slot))
        self._ram, self._base, self._count = built.ram, base, 0

    def start(self):
        driver = self.driver
        driver.probe()
        assert driver.negotiate()
        driver.queue(0, self._base, 8)
        driver.add_status(spec.DRIVER_OK)
        self._used = self._base + spec.desc_bytes(8) + spec.avail_bytes(8) + 3 & ~3

    def ask(self, seconds=10.0):
        """Offer a buffer; whether it comes back in time."""
        avail = self._base + spec.desc_bytes(8)
        self._count += 1
        with memoryview(self._ram) as ram:
            struct.pack_into("<QIHH", ram, self._base, BUFFER, 64, 2, 0)
            struct.pack_into("<HHH", ram, avail, 0, self._count, 0)
        self.driver.notify(0)
        due = time.monotonic() + seconds
        while time.monotonic() < due:
            with memoryview(self._ram) as ram:
                if struct.unpack_from("<H", ram, self._used + 2)[0] == self._count:
                    return True
            time.sleep(0.002)
        return False


class PackedEntropy(Entropy):
    """The same with a packed ring, whose only ID is used again and again."""

    def start(self):
        self.driver.probe()
        assert self.driver.negotiate(self.driver.device_features())
        self.driver.queue(0, self._base, 8)
        self.driver.add_status(spec.DRIVER_OK)

    def ask(self, seconds=10.0):
        turn, place = divmod(self._count, 8)
        at, lap = self._base + 16 * place, (USED, AVAIL)[turn % 2 == 0]
        with memoryview(self._ram) as ram:
            struct.pack_into("<QIHH", ram, at, BUFFER, 64, 0, WRITE | lap)
        self.driver.notify(0)
        due = time.monotonic() + seconds
        while time.monotonic() < due:
            with memoryview(self._ram) as ram:
                flags = struct.unpack_from("<H", ram, at + 14)[0]
            if flags & (AVAIL | USED) != lap:
                self._count += 1
                self.wait_for(self._count)
                return True
            time.sleep(0.002)
        return False

    def wait_for(self, count, flags=EVENTS_AT):
        """Ask for an event at the used descriptor after so many."""
        turn, place = divmod(count, 8)
        with memoryview(self._ram) as ram:
            avail = self._base + spec.desc_bytes(8)
            struct.pack_into("<HH", ram, avail, place | (turn % 2 == 0) << 15, flags)


def loop_answers(loop, seconds=30.0):
    """Whether the event loop does what it is asked, or is stuck somewhere."""
    answered = threading.Event()
    loop.call_soon_threadsafe(answered.set)
    return answered.wait(seconds)


def scenario(built, loop, steps):
    """Run `built` and `steps()` beside it; what went wrong in the steps is raised."""
    failures = []

    def play():
        try:
            steps()
        except BaseException as error:
            failures.append(error)
        finally:
            built.stop()

    thread = threading.Thread(target=play)
    thread.start()
    outcome = built.run()
    thread.join()
    if failures:
        raise failures[0]
    assert outcome.kind == STOPPED


def restart(built):
    """What a guest does, on a machine that spins; returns when the next one runs."""
    eventually(lambda: built._born)  # its first one runs
    born = built._born
    built.board.pio.write(layout.PORT_RESET, 1, 1)
    eventually(lambda: built._born != born)


def eventually(test):
    due = time.monotonic() + LIMIT
    while not test():
        assert time.monotonic() < due
        time.sleep(0.002)
