"""Inputs to start from: for each part a plain, successful run, and a few that go wrong.

A fuzzer finds its way from these faster than from nothing; the tests see from their ends that the
parts do what they should, since a run that always fails early would find nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from struct import pack

from fuzz.backend import RIGHT, RUNS
from fuzz.kinds import KINDS
from fuzz.parts import NAMES
from fuzz.source import ACK, OWN, Writer

from pyvmm.vhost_user.codec import encode_ack, encode_reply, encode_request
from pyvmm.vhost_user.messages import (
    BACKEND_REQUESTS,
    F_PROTOCOL_FEATURES,
    FRONTEND_REQUESTS,
    HEADER,
    Request,
)
from pyvmm.vhost_user.messages import ProtocolFeature as P
from pyvmm.vhost_user.payloads import (
    U64,
    Config,
    Empty,
    Inflight,
    MemRegion,
    MemTable,
    Mmap,
    Payload,
    VringState,
)

ROW = FRONTEND_REQUESTS.by_name
VIRTIO = 1 << 32 | F_PROTOCOL_FEATURES
PROTOCOL = P.MQ | P.REPLY_ACK | P.CONFIG | P.BACKEND_REQ
FS_CONFIG = 44  # bytes
OPENING = (
    encode_reply(ROW["GET_FEATURES"], U64(VIRTIO)),
    encode_reply(ROW["GET_PROTOCOL_FEATURES"], U64(PROTOCOL)),
    encode_ack(ROW["SET_BACKEND_REQ_FD"]),
    encode_reply(ROW["GET_QUEUE_NUM"], U64(2)),
    encode_reply(ROW["GET_CONFIG"], Config(0, 0, bytes(FS_CONFIG))),
)
OWNER = encode_request(ROW["SET_OWNER"], Empty())
STARTING = ["SET_FEATURES", "SET_MEM_TABLE", "SET_VRING_NUM"]
STARTING += ["SET_VRING_BASE", "SET_VRING_ADDR", "SET_VRING_CALL", "SET_VRING_KICK", "SET_VRING_ENABLE"]
ONE_QUEUE = 93  # the step that starts the device, with one queue
STOPPING = ("SET_VRING_ENABLE",)


def part(name: str) -> Writer:
    return Writer().byte(NAMES.index(name))


def codec(replies: bool, table: int, stream: bytes, pieces: Sequence[tuple[int, int]] = ()) -> bytes:
    out = part("codec").byte(table | replies << 1, len(pieces))
    for piece in pieces:
        out.byte(*piece)
    return out.data + stream


def _region() -> MemRegion:
    return MemRegion(0, 1 << 20, 1 << 45, 0)


def codecs() -> list[bytes]:
    table = encode_request(ROW["SET_MEM_TABLE"], MemTable((_region(), _region())), 2)
    inflight = encode_reply(ROW["GET_INFLIGHT_FD"], Inflight(4096, 0, 1, 64), 1)
    change = encode_request(BACKEND_REQUESTS.by_name["CONFIG_CHANGE_MSG"], Empty(), 0, True)
    return [
        codec(False, 0, table, [(len(table), 2)]),
        codec(False, 0, OWNER + table, [(12, 0), (20, 2)]),
        codec(True, 0, inflight, [(5, 0), (40, 1)]),
        codec(True, 0, b"".join(OPENING)),
        codec(False, 1, change * 2),
        codec(False, 0, encode_request(Request(77, "UNKNOWN"), Empty()), [(12, 3)]),
        codec(True, 0, b"HTTP/1.1 200 OK\r\n"),
        codec(False, 0, HEADER.pack(ROW["SET_FEATURES"].id, 1, 4) + bytes(4)),
        codec(False, 0, OWNER, [(len(OWNER), 1)]),
    ]


def sessions() -> list[bytes]:
    def asks(out: Writer, name: str, said: bytes = b"", fds: int = 0) -> Writer:
        out.byte(ROW[name].id)
        out.data += said
        return out.byte(fds)

    hostile = part("session").byte(0).number(VIRTIO).number(PROTOCOL)
    pair = part("session").byte(2).number(VIRTIO).number(PROTOCOL)
    for out in (hostile, pair):
        for name, value in (("GET_FEATURES", VIRTIO), ("GET_PROTOCOL_FEATURES", PROTOCOL)):
            asks(out, name)
            if out is hostile:
                out.byte(OWN, 0)
            out.byte(0).data += value.to_bytes(8, "little")
            if out is pair:
                out.byte(0)
        asks(out, "SET_PROTOCOL_FEATURES", PROTOCOL.to_bytes(8, "little"))
        if out is pair:
            out.byte(0)
        asks(out, "SET_VRING_NUM", VringState(0, 64).encode())
        (out.byte(ACK, 0) if out is hostile else out).number(0)
    asked = part("session").byte(1).number(VIRTIO).number(PROTOCOL)
    asked.byte(1, 0, 8, 0, 0).data += VIRTIO.to_bytes(8, "little")
    asked.byte(0)
    grasping = part("session").byte(1).number(0).number(0)
    grasping.byte(ROW["SET_FEATURES"].id).data += (1).to_bytes(8, "little")
    return [hostile.data, pair.data, asked.data, grasping.data]


def configs() -> list[bytes]:
    def answer(out: Writer, said: bytes) -> Writer:
        return out.byte(OWN, 0, 0).number(0).byte(0).block(said)

    out = answer(part("config").byte(0).number(16), bytes(range(16)))
    out.byte(2).number(4)  # a read of 4 bytes at 4
    answer(out, bytes(range(16)))
    out.byte(5).number(8).byte(1, 2)  # a write of 2 bytes at 8
    shrink = part("config").byte(1).number(16).byte(OWN, 0, 1)
    answer(shrink, bytes(12)).byte(2).number(0)
    answer(shrink, bytes(12))
    other = answer(part("config").byte(0).number(16), bytes(32))
    local = part("config").byte(2).number(8).block(b"tag").byte(2).number(0)
    return [out.data, shrink.data, other.data, local.data]


def says(out: Writer, answers: Sequence[bytes]) -> Writer:
    out.byte(len(answers))
    for data in answers:
        out.byte(0).block(data)
    return out


def frontends() -> list[bytes]:
    def acks(names: Sequence[str], queues: int) -> list[bytes]:
        per_ring = {name for name in names if "VRING" in name}
        return [encode_ack(ROW[name]) for name in names for _ in range(queues if name in per_ring else 1)]

    def rings(payloads: Sequence[Payload]) -> list[bytes]:
        return [encode_reply(ROW["GET_VRING_BASE"], payload) for payload in payloads]

    opened = says(part("frontend").byte(1), OPENING).data
    change = encode_request(BACKEND_REQUESTS.by_name["CONFIG_CHANGE_MSG"], Empty(), 0, True)
    start = (
        says(Writer().byte(ONE_QUEUE), acks(STARTING, 1)).byte(0).data
    )  # one queue, no requests of its own
    stop = says(Writer().byte(2), acks(STOPPING, 1) + rings([VringState(0, 7)])).byte(0).data
    keep = OPENING[:1] + (encode_reply(ROW["GET_PROTOCOL_FEATURES"], U64(PROTOCOL | P.INFLIGHT_SHMFD)),)
    tracked = says(part("frontend").byte(1), keep + OPENING[2:]).byte(ONE_QUEUE, len(STARTING) + 2).data
    for data in acks(STARTING[:3], 1):
        tracked += bytes((0, len(data))) + data
    buffer = encode_reply(ROW["GET_INFLIGHT_FD"], Inflight(4096, 0, 2, 64), 1)
    tracked += bytes((4, len(buffer))) + buffer
    for data in acks(["SET_INFLIGHT_FD", *STARTING[3:]], 1):
        tracked += bytes((0, len(data))) + data
    read = says(Writer().byte(0), OPENING[-1:]).byte(1, 0).block(change).byte(0, 4).data
    return [
        opened,
        opened + start + read + stop,
        opened + start + start[:40],
        opened + stop,
        tracked,
        *shared(),
    ]


def shared() -> list[bytes]:
    """Openings with shared memory regions, then mappings that are right and wrong."""
    answers = [encode_reply(ROW["GET_FEATURES"], U64(VIRTIO))]
    answers.append(encode_reply(ROW["GET_PROTOCOL_FEATURES"], U64(P.REPLY_ACK | P.SHMEM | P.BACKEND_REQ)))
    answers.append(encode_ack(ROW["SET_BACKEND_REQ_FD"]))
    opening = part("frontend").byte(0, len(answers) + 1)
    for data in answers:
        opening.byte(0).block(data)
    opening.byte(OWN, ROW["GET_SHMEM_CONFIG"].id, 0)
    opening.data += (1).to_bytes(8, "little") + (1 << 20).to_bytes(8, "little") + bytes(48)

    def asks(name: str, fields: Mmap, fds: int) -> bytes:
        data = encode_request(BACKEND_REQUESTS.by_name[name], fields, fds, True)
        return Writer().byte(4 * fds).block(data).byte(0).data

    good, bad = Mmap(0, 0, 0x1000, 0x2000, 1), Mmap(0, 0, 0x2000, 0x1000, 0)
    deeds = [asks("SHMEM_MAP", good, 1), asks("SHMEM_MAP", bad, 1), asks("SHMEM_UNMAP", good, 0)]
    step = Writer().byte(4, 0)  # nothing is said on the main connection
    return [
        opening.data + step.byte(len(deeds)).data + b"".join(deeds),
        opening.data + Writer().byte(4, 0, 1).data + deeds[0],
    ]


def options() -> list[bytes]:
    texts = ("boot=2,max=2", "size=512M,hugepages=on", 'socket="a,b",device_type=fs,queue_sizes=[64,128-130]')
    texts += (
        'path="a""b",num_queues=4',
        "tag=x,dir=/tmp,cache=always",
        "src=/dev/zero",
        "pvh",
        "file=x",
        "0.5",
    )
    texts += ("vsock", '[tag="my,fs",num_request_queues=1]')
    return [part("option").byte(i).data + text.encode() for i, text in enumerate(texts)]


def right(out: Writer, name: str, queue: int = 0, number: int = 0) -> Writer:
    """A frontend's request as it should be, with an ack."""
    return out.byte(_right(name), queue | 2).number(number)


def _right(name: str) -> int:
    return next(i for i, said in enumerate(RIGHT) if said.name == name)


def other(out: Writer, name: str, kind: int) -> Writer:
    """The same with a descriptor of another kind."""
    what = next(what for what in range(0x40, 0x60) if what % len(RIGHT) == _right(name))
    return out.byte(what, 2).number(0).byte(kind)


def offer(out: Writer, *buffers: int, queue: int = 0) -> Writer:
    """A chain of a driver's."""
    out.byte(0xA0, queue)
    for size in buffers:
        out.number(size)
    return out


def scribble(out: Writer, at: int, data: bytes) -> Writer:
    out.byte(0xC0, len(data)).number(at).data += data
    return out


def begun(device: int, features: int = 0) -> Writer:
    """A device with a running queue."""
    return part("backend").byte(device | 1 << 2 | features << 3)


def backends() -> list[bytes]:
    found = []
    for device in range(4):
        out = offer(offer(begun(device, 2), 3, 3), 0, 100)
        for name, number in (("SET_VRING_CALL", 0), ("SET_MEM_TABLE", 0), ("SET_VRING_ADDR", 0)):
            right(out, name, 0, number)
        out.byte(_right("SET_VRING_ENABLE") + 1, 2, 0)
        right(offer(out, 5, 5), "SET_VRING_ENABLE")
        found.append(right(out, "GET_VRING_BASE").data)
    packed = right(begun(0, 3), "RESET_OWNER")
    for name in ("SET_VRING_ADDR", "SET_VRING_KICK", "SET_VRING_ENABLE"):
        right(packed, name)
    scribble(packed, 0, pack("<QIHH", 0x8000, 64, 3, 1 << 15 | 2)).byte(0xE0, 0)
    found.append(right(packed, "GET_VRING_BASE").data)
    state = right(begun(0), "GET_VRING_BASE")
    for number in (0, 1):
        right(right(state, "SET_DEVICE_STATE_FD", 0, number), "CHECK_DEVICE_STATE")
    found.append(state.data)
    tracked = begun(0)
    for name in ("RESET_DEVICE", "SET_FEATURES", "GET_INFLIGHT_FD", "SET_INFLIGHT_FD", *STARTING[3:]):
        right(tracked, name)
    found.append(right(offer(tracked, 3, 3), "RESET_DEVICE").data)
    rest = begun(0)
    for name in ("GET_QUEUE_NUM", "GET_MAX_MEM_SLOTS", "GET_SHMEM_CONFIG", "GET_CONFIG", "SET_CONFIG"):
        right(rest, name)
    for name in ("SET_BACKEND_REQ_FD", "SET_VRING_ERR", "REM_MEM_REG", "ADD_MEM_REG"):
        right(rest, name)
    found.append(rest.data)
    broken = scribble(right(begun(0), "SET_VRING_ERR"), 0x202, b"\xff\xff").byte(0xE0, 0)
    found.append(right(broken, "GET_VRING_BASE").data)
    found += [other(begun(kind & 3), "SET_VRING_KICK", kind).byte(0xE0, 0).data for kind in range(len(KINDS))]
    found += [
        other(begun(1), name, 3).data for name in ("SET_VRING_CALL", "SET_MEM_TABLE", "SET_INFLIGHT_FD")
    ]
    return found


def proxies() -> list[bytes]:
    def asks(out: Writer, name: str, *rest: int) -> Writer:
        return right(out.byte(1), name, *rest).byte(0)

    def gives(out: Writer, at: int, data: bytes, how: int = 0) -> Writer:
        assert len(data) % 3 == 0
        out.byte(len(data), at).data += data
        return out.byte(how)

    def opened() -> Writer:
        out = part("proxy").byte(1)
        out.data += bytes(RUNS)  # the answers
        return out

    def used(*elements: tuple[int, int]) -> bytes:
        data = pack("<HH", 0, len(elements)) + b"".join(pack("<II", *element) for element in elements)
        return data + bytes(-len(data) % 3)

    served = gives(offer(opened().byte(1), 3, 3), 0, used((0, 3)))
    requests = asks(opened(), "SET_BACKEND_REQ_FD").byte(0x84)
    lost = opened()
    lost.byte(1, _right("GET_CONFIG"), 2, 0, 0xFF, OWN, 0)
    return [
        asks(served, "GET_VRING_BASE").data,
        asks(gives(offer(opened().byte(1), 3, 3), 0, used((0, 4096))), "RESET_DEVICE").data,
        gives(offer(opened().byte(1), 3, 3), 0, used((5, 3), (6, 3))).data,
        gives(opened(), 0, pack("<HHH", 0, 999, 0), 3).data,
        requests.byte(0x81, OWN, 0, 0).data,
        lost.data,
        part("proxy").byte(1).data + bytes(4) + b"\xa0" * RUNS,
    ]


def seeds() -> list[bytes]:
    """All of them."""
    return [*codecs(), *sessions(), *configs(), *frontends(), *options(), *backends(), *proxies()]


def write(folder: Path) -> None:
    """Each into a file of its own."""
    for number, data in enumerate(seeds()):
        (folder / f"seed-{number}").write_bytes(data)
