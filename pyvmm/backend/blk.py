"""A virtio block device (virtio 1.3, section 5.2) over a raw file or block device of the host.

It owns the image's descriptor, the rules for requests and the configuration space.  It must
not know who runs it.  Bytes go straight between the image and the guest's memory.
"""

from __future__ import annotations

import os
import stat
from struct import Struct

from .. import log
from ..errors import ConfigError
from .config import ConfigSpace
from .device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .._native.vring import Chain
    from .queue import Queue

SECTOR = 512
BLOCK = 4096  # what is told as physical block and preferred size
ID_BYTES = 20
PIECES = 1024  # buffers that one system call takes (IOV_MAX)
HEADER = Struct("<IIQ")  # struct virtio_blk_req: type, reserved, sector

F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY, F_CONFIG_WCE, F_MQ = (
    1 << bit for bit in (2, 5, 6, 9, 10, 11, 12)
)
T_IN, T_OUT, T_FLUSH, T_GET_ID = 0, 1, 4, 8
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2

CONFIG = (
    ("capacity", 8),
    ("size_max", 4),
    ("seg_max", 4),
    ("geometry", 4),
    ("blk_size", 4),
    ("physical_block_exp", 1),
    ("alignment_offset", 1),
    ("min_io_size", 2),
    ("opt_io_size", 4),
    ("writeback", 1),
    ("unused0", 1),
    ("num_queues", 2),
    ("discard", 12),
    ("write_zeroes", 12),
)


class Blk(Device):
    """Serves the image `path`, on `queues` virtqueues of `size` entries.

    Its length in sectors of 512 bytes is the capacity; a rest is not reachable.  ConfigError
    when the file cannot be used.  Up to its own FLUSH, or in write-through mode to its end, a
    write may be in the host's page cache only.
    """

    device_id = 2

    def __init__(self, path: str, *, read_only: bool = False, queues: int = 1, size: int = 256) -> None:
        super().__init__()
        self.queue_sizes = (size,) * queues
        self.features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE | F_MQ
        if read_only:
            self.features |= F_RO
        self._read_only = read_only
        self._fd = open_image(path, read_only)
        self._end = os.lseek(self._fd, 0, os.SEEK_END) // SECTOR
        self._name = os.path.basename(path).encode()[:ID_BYTES]
        self.config = ConfigSpace(CONFIG)
        for name, value in (
            ("capacity", self._end),
            ("seg_max", max(1, size - 2)),
            ("blk_size", SECTOR),
            ("physical_block_exp", (BLOCK // SECTOR).bit_length() - 1),
            ("writeback", 1),
            ("num_queues", queues),
        ):
            self.config[name] = value

    def close(self) -> None:
        os.close(self._fd)

    def on_connect(self) -> None:
        self.config["writeback"] = 1

    def on_config_write(self, offset: int, data: bytes) -> None:
        """Only `writeback` can be written; frontends that write the whole space write the rest back."""
        if self.config.covers("writeback", offset, len(data)):
            place = self.config.place("writeback")
            self.config["writeback"] = data[place.start - offset] & 1

    def on_queue(self, queue: Queue) -> None:
        for chain in queue:
            self._serve(chain)

    # -- requests ------------------------------------------------------------------------

    @property
    def _write_flags(self) -> int:
        """Write-through unless the driver can flush and left the cache on (section 5.2.5.2)."""
        accepted = self.driver_features
        cached = accepted & F_FLUSH and (not accepted & F_CONFIG_WCE or self.config["writeback"])
        return 0 if cached else os.RWF_DSYNC

    def _serve(self, chain: Chain) -> None:
        """Do one request and give it back; the last device-writable byte is its status."""
        room = chain.writable
        if not room:
            log.once("blk", "blk: a request without room for its status")
            return
        views = chain.writable_views()
        views[-1], status = views[-1][:-1], views[-1][-1:]
        try:
            status[0] = self._do(chain, views, room - 1)
        except OSError as error:
            log.once(("blk", error.errno), f"blk: {error.strerror}; the guest sees an I/O error")
            status[0] = S_IOERR
        chain.push(room)

    def _do(self, chain: Chain, into: list[memoryview], room: int) -> int:
        header = chain.read(HEADER.size)
        if len(header) < HEADER.size:
            return S_IOERR
        kind, _, sector = HEADER.unpack(header)
        if kind == T_IN:
            return self._move(sector, into, room, self._read)
        if kind == T_OUT:
            if self._read_only:
                return S_IOERR
            return self._move(sector, chain.readable_views(), chain.readable, self._write)
        if kind == T_FLUSH:
            os.fdatasync(self._fd)
            return S_OK
        return self._identify(into) if kind == T_GET_ID else S_UNSUPP

    def _move(
        self, sector: int, views: list[memoryview], size: int, step: Callable[[list[memoryview], int], int]
    ) -> int:
        """All of `views` from or to `sector` on; what does not fit the image is refused whole."""
        if size % SECTOR or sector > self._end or size // SECTOR > self._end - sector:
            return S_IOERR
        offset, left = sector * SECTOR, size
        while left:
            count = step(views[:PIECES], offset)
            if not count:
                return S_IOERR  # the image has shrunk
            offset += count
            left -= count
            if left:
                views = rest_of(views, count)
        return S_OK

    def _read(self, views: list[memoryview], offset: int) -> int:
        return os.preadv(self._fd, views, offset)

    def _write(self, views: list[memoryview], offset: int) -> int:
        return os.pwritev(self._fd, views, offset, self._write_flags)

    def _identify(self, into: list[memoryview]) -> int:
        text = self._name.ljust(ID_BYTES, b"\0")
        for view in into:
            part = min(len(view), len(text))
            view[:part], text = text[:part], text[part:]
        return S_OK


def rest_of(views: list[memoryview], count: int) -> list[memoryview]:
    """`views` without their first `count` bytes."""
    for i, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[i + 1 :]]
        count -= len(view)
    return []


def open_image(path: str, read_only: bool) -> int:
    """A descriptor of the image; ConfigError when it cannot be had."""
    try:
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"--blk-file {path}: {error.strerror}") from None
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(fd)
        raise ConfigError(f"--blk-file {path}: neither a file nor a block device")
    return fd


if __name__ == "__main__":
    from .inflight import MAX_QUEUES
    from .program import count, main

    main(
        "blk",
        lambda options: Blk(
            options.blk_file,
            read_only=options.read_only,
            queues=count("--num-queues", options.num_queues, MAX_QUEUES),
        ),
        [
            ("--blk-file", None, "the raw image, or a block device"),
            ("--read-only", False, "refuse writes"),
            ("--num-queues", "1", "how many virtqueues"),
        ],
        features=("read-only", "blk-file"),
    )
