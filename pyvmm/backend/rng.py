"""A virtio entropy device (virtio 1.3, section 5.4): random bytes from a file of the host.

It owns the source's descriptor.  It must not know who runs it.
"""

from __future__ import annotations

import os
import stat

from .. import log
from ..files import open_file
from .device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .._native.vring import Chain
    from .queue import Queue

SOURCE = "/dev/urandom"
CURE = "name a readable file or device"
KINDS = (stat.S_ISREG, stat.S_ISCHR, stat.S_ISBLK)
PORTION = 64 << 10  # at most so much for one request: a guest must not keep us busy for long


class Rng(Device):
    """Fills buffers from `source`.  At the end of a plain file the guest waits for ever."""

    device_id = 4
    queue_sizes = (256,)

    def __init__(self, source: str = SOURCE) -> None:
        super().__init__()
        self._source = source
        self._fd = open_file(source, source, CURE, *KINDS)

    def close(self) -> None:
        os.close(self._fd)

    def on_queue(self, queue: Queue) -> None:
        for chain in queue:
            if not self._fill(chain):
                queue.keep(chain)

    def _fill(self, chain: Chain) -> bool:
        """Write at least one byte, as the specification demands; false when there is none."""
        if not chain.writable:
            return True
        try:
            count, why = os.readv(self._fd, [chain.writable_views()[0][:PORTION]]), ""
        except OSError as error:
            count, why = 0, f": {error.strerror}"
        if not count:
            log.once(self._source, f"rng: {self._source} has no more bytes to give{why}")
            return False
        chain.wrote(count)
        return True


if __name__ == "__main__":
    from .program import main

    main("rng", lambda options: Rng(options.source), [("--source", SOURCE, "file to read random bytes from")])
