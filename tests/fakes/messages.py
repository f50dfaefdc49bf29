"""One example of every payload, shared by the tests of both directions."""

from __future__ import annotations

from pyvmm.vhost_user.messages import Request
from pyvmm.vhost_user.payloads import (
    U64,
    Config,
    DeviceState,
    Empty,
    Inflight,
    Iotlb,
    Log,
    MemRegion,
    MemTable,
    Mmap,
    Payload,
    Raw,
    SharedObject,
    ShmemConfig,
    SingleRegion,
    VringAddr,
    VringArea,
    VringFile,
    VringState,
)

REGIONS = (MemRegion(0, 1 << 20, 0x7F0000000000, 0), MemRegion(1 << 32, 4096, 0x7F0000100000, 1 << 20))

# payload, its bytes after the header in hexadecimal (little endian)
EXAMPLES: tuple[tuple[Payload, str], ...] = (
    (Empty(), ""),
    (U64(0x0102030405060708), "0807060504030201"),
    (VringState(3, 256), "0300000000010000"),
    (
        VringAddr(1, 0, 0x1000, 0x3000, 0x2000, 0),
        "01000000 00000000 0010000000000000 0030000000000000 0020000000000000 0000000000000000",
    ),
    (VringFile(2, True), "0200000000000000"),
    (VringFile(2, False), "0201000000000000"),
    (
        MemTable(REGIONS),
        "02000000 00000000"
        "0000000000000000 0000100000000000 00000000007f0000 0000000000000000"
        "0000000001000000 0010000000000000 00001000007f0000 0000100000000000",
    ),
    (MemTable(()), "0000000000000000"),
    (
        SingleRegion(0x1000, 0x2000, 0x3000, 0x4000),
        "0000000000000000 0010000000000000 0020000000000000 0030000000000000 0040000000000000",
    ),
    (Log(0x1000, 0x20), "0010000000000000 2000000000000000"),
    (Config(4, 0, b"\xaa\xbb\xcc"), "04000000 03000000 00000000 aabbcc"),
    (Inflight(0x1000, 0, 2, 128), "0010000000000000 0000000000000000 0200 8000 00000000"),
    (DeviceState(1, 0), "01000000 00000000"),
    (VringArea(1, 0x1000, 0x2000), "0100000000000000 0010000000000000 0020000000000000"),
    (VringArea(0x101, 0x1000, 0x2000), "0101000000000000 0010000000000000 0020000000000000"),
    (
        Iotlb(0x1000, 0x2000, 0x3000, 3, 2),
        "0010000000000000 0020000000000000 0030000000000000 03 02 000000000000",
    ),
    (SharedObject(bytes(range(16))), "000102030405060708090a0b0c0d0e0f"),
    (ShmemConfig(1, (0x1000, *[0] * 255)), "01000000 00000000 0010000000000000" + "00" * 8 * 255),
    (
        Mmap(7, 0x1000, 0x2000, 0x3000, 1),
        "07 00000000000000 0010000000000000 0020000000000000 0030000000000000 0100000000000000",
    ),
    (Raw(b"anything"), "616e797468696e67"),
)


def of(kind: type[Payload]) -> list[Payload]:
    """All examples of one payload class."""
    return [payload for payload, _ in EXAMPLES if type(payload) is kind]


def fds_for(payload: Payload, bounds: tuple[int, int]) -> list[int]:
    """Stand-ins for as many descriptors as `payload` wants beside it."""
    announced = payload.fd_count()
    count = bounds[0] if announced is None else announced
    return list(range(100, 100 + count))


def requests_of(request: Request) -> list[tuple[Payload, list[int]]]:
    """What `request` can look like: payload and descriptors."""
    return [(payload, fds_for(payload, request.fds)) for payload in of(request.payload)]


def replies_of(request: Request) -> list[tuple[Payload, list[int]]]:
    """What its answers can look like."""
    return [
        (payload, fds_for(payload, request.reply_fds)) for kind in request.replies for payload in of(kind)
    ]
