"""Write virtio devices in Python and serve them over vhost-user.

    from pyvmm.backend import Device, serve

    class Rng(Device):
        device_id = 4
        queue_sizes = (256,)

        def on_queue(self, queue):
            for chain in queue:
                chain.write(os.urandom(chain.writable))

    serve(Rng(), "/run/rng.sock")

The names are loaded at first use: the VMM imports this package on its way to the guest.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .aio import serve_async as serve_async
    from .config import ConfigSpace as ConfigSpace
    from .device import Device as Device
    from .local import DeviceThread as DeviceThread
    from .process import DeviceProcess as DeviceProcess
    from .process import spawn as spawn
    from .queue import Chain as Chain
    from .queue import Queue as Queue
    from .server import serve as serve
    from .shared_memory import SharedMemory as SharedMemory

_HOMES = {
    "Chain": "queue",
    "ConfigSpace": "config",
    "Device": "device",
    "DeviceProcess": "process",
    "DeviceThread": "local",
    "Queue": "queue",
    "SharedMemory": "shared_memory",
    "serve": "server",
    "serve_async": "aio",
    "spawn": "process",
}

__all__ = [
    "Chain",
    "ConfigSpace",
    "Device",
    "DeviceProcess",
    "DeviceThread",
    "Queue",
    "SharedMemory",
    "serve",
    "serve_async",
    "spawn",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
