"""The device for upper.c: gives text back in capitals.  `python upper.py --socket-path S [--faults PLAN]`"""

from pyvmm.backend import Device
from pyvmm.backend.program import main


class Upper(Device):
    """One virtqueue; each chain is a text and room for the answer."""

    device_id = 62  # nobody's, so far
    queue_sizes = (16,)

    def on_queue(self, queue):
        for chain in queue:
            chain.write(chain.read().upper())


if __name__ == "__main__":
    main("upper", lambda options: Upper())
