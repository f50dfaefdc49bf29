"""One backend process after another behind the same ring: what a frontend that reconnects does."""

from __future__ import annotations

import os
import signal

from fakes.ring_driver import DriverQueue, Ram, RawFrontend, receive_one

from pyvmm.backend.process import spawn
from pyvmm.vhost_user.payloads import Inflight


class Life:
    """One backend process after another behind the same ring and the same in-flight file."""

    def __init__(self, make, size):
        self.make, self.size = make, size
        self.ram = Ram(32 << 20)
        self.queue = DriverQueue(self.ram, self.size, event_idx=True)
        self.file = None
        self.process = self.frontend = None

    def start(self):
        self.process = spawn(self.make)
        self.frontend = RawFrontend(self.process.take_socket())
        self.frontend.negotiate()
        self.frontend.share(self.ram)
        if self.file is None:
            self.frontend.send("GET_INFLIGHT_FD", Inflight(0, 0, 1, self.size))
            message = receive_one(self.frontend.sock, self.frontend.replies)
            self.file = message.payload, message.take_fds()[0]
        description, fd = self.file
        assert self.frontend.tell("SET_INFLIGHT_FD", description, [fd]) == 0
        # what frontends that cannot know better send: the used index
        assert self.frontend.start(0, self.queue, base=self.ram.u16(self.queue.used + 2)) == 0

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        assert self.process.wait(10) == 128 + signal.SIGKILL
        self.process.close()
        self.frontend.close()

    def close(self):
        self.kill()
        os.close(self.file[1])
        self.queue.close()
        self.ram.close()
