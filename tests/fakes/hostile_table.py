"""A table of everything that a backend can do to us.

A case is a script for the backend, or what it does while the guest runs, and the words by which the
loss is told; no words mean that the device goes on working.  Silence and death at each request are
not here: `test_hostile_requests` derives those from the table of messages.
"""

from __future__ import annotations

import errno
import os
from typing import Any, NamedTuple

from fakes import backend as fake
from fakes.backend import Script
from fakes.hostile import (
    F_SEAL_FUTURE_WRITE,
    F_SEAL_WRITE,
    Deed,
    buffer,
    closes_what_it_got,
    dies,
    fill,
    floods,
    maps,
    maps_and_cuts,
    maps_until_it_is_too_much,
    moves_a_vector,
    notice,
    on_eventfds,
    pipe,
    reads,
    refused,
    request,
    resets,
    seal,
    some_file,
    storm_of_interrupts,
    talks,
    trickle,
    unasked,
    writes,
)

from pyvmm.vhost_user.codec import encode_request
from pyvmm.vhost_user.messages import HEADER, Request
from pyvmm.vhost_user.messages import ProtocolFeature as P
from pyvmm.vhost_user.payloads import U64, Config, Empty, Mmap, VringState


class Case(NamedTuple):
    """`script` is the backend's; `deed` is done in service; `told` is a pattern of what is said; a
    device that `heals` works again after the reset that it asks for."""

    told: str
    script: Script = {}  # noqa: RUF012
    deed: Deed | None = None
    options: dict[str, Any] = {}  # noqa: RUF012
    silent: bool = False
    heals: bool = False


SLOW = {"silent": True}
LATE, ENDED, LOST = "did not answer in time", "connection (was closed|broke)", "is lost|did not start"
ANSWERS: dict[str, tuple[fake.Action, str, dict[str, Any]]] = {
    "silence": (fake.silence, LATE, SLOW),
    "half a header": (fake.cut(5), LATE, SLOW),
    "a header only": (fake.cut(12), LATE, SLOW),
    "half a payload": (fake.cut(15), LATE, SLOW),
    "an answer that trickles": (trickle, LATE, SLOW),
    "the end": (fake.hang_up, ENDED, {}),
    "the end in a header": (fake.cut_and_hang_up(7), "in the middle of a message", {}),
    "the end in a payload": (fake.cut_and_hang_up(13), "in the middle of a message", {}),
    "a reply to another request": (fake.request_id(15), "reply to GET_PROTOCOL_FEATURES", {}),
    "a reply to an unknown request": (fake.request_id(4711), "reply to unknown request 4711", {}),
    "a reply to request 0": (fake.request_id(0), "reply to unknown request 0", {}),
    "no reply flag": (fake.flags(1), "flags 0x1", {}),
    "a reply that wants a reply": (fake.flags(0xD), "flags 0xd", {}),
    "another version": (fake.flags(6), "flags 0x6", {}),
    "reserved flags": (fake.flags(0x15), "flags 0x15", {}),
    "too short a payload": (fake.size(4), "with 4 bytes of payload", {}),
    "too long a payload": (fake.size(1000), "with 1000 bytes of payload", {}),
    "4 GiB of payload": (fake.size(0xFFFF_FFFF), "with 4294967295 bytes of payload", {}),
    "a descriptor": (fake.with_fds(1), "1 descriptors where 0 belong", {}),
    "32 descriptors": (fake.with_fds(32), "32 descriptors where 0 belong", {}),
    "33 descriptors": (fake.with_fds(33), "descriptors came with one message", {}),
    "noise": (fake.noise, "flags 0x312e312f", {}),
}

QUIET, SLOTS = fake.PROTOCOL & ~P.REPLY_ACK, fake.PROTOCOL | P.CONFIGURE_MEM_SLOTS | P.STATUS
SHARING = {"protocol": fake.PROTOCOL | P.SHMEM, "shared_memory": {0: 1 << 24, 3: 0x1000}}
OPENING = {
    **{f"GET_FEATURES: {what}": Case(told, {"GET_FEATURES": act}, None, {}, **more)
       for what, (act, told, more) in ANSWERS.items()},
    "an answer to SET_OWNER": Case("reply to SET_OWNER where", {"SET_OWNER": unasked}),
    "SET_BACKEND_REQ_FD is refused": Case("refused SET_BACKEND_REQ_FD",
                                          {"SET_BACKEND_REQ_FD": fake.status(1)}),
    "no memory slots": Case("guest RAM has 1 pieces, and the backend takes 0",
                            options={"protocol": SLOTS, "slots": 0}),
    **{f"shared memory {what}": Case(told, options={**SHARING, "shared_memory": sizes})
       for what, told, sizes in (
        ("of 2**63 bytes", "bytes of shared memory", {0: 1 << 63}),
        ("of 256 regions of 2**63 bytes", "bytes of shared memory", dict.fromkeys(range(256), 1 << 63)),
        ("of 5 regions", "shared memory regions", dict.fromkeys(range(5), 0x1000)),
        ("of half a page", "no whole pages", {0: 0x800}))},
    "no queues": Case("3 queues, but the backend has 0", options={"queues": 0}),
    "too few queues": Case("3 queues, but the backend has 2", options={"queues": 2}),
    "configuration of another length": Case("GET_CONFIG of 8 bytes was answered with 300",
                                            {"GET_CONFIG": fake.reply(Config(0, 0, bytes(300)))}),
    "configuration of another place": Case("GET_CONFIG of 8 bytes was answered with 8 at 4096",
                                           {"GET_CONFIG": fake.reply(Config(4096, 0, bytes(8)))}),
}  # fmt: skip

SETTING_UP = ("SET_FEATURES", "SET_MEM_TABLE", "SET_VRING_NUM", "SET_VRING_BASE", "SET_VRING_ADDR")
SETTING_UP += ("SET_VRING_CALL", "SET_VRING_KICK", "SET_VRING_ENABLE")
STARTING = {
    **{f"{name} is refused": Case(f"refused {name}", {name: fake.status(1)}) for name in SETTING_UP},
    "status -1": Case("refused SET_FEATURES", {"SET_FEATURES": fake.status((1 << 64) - 1)}),
    "an ack too many": Case("reply to SET_FEATURES where", {"SET_FEATURES": fake.twice}),
    "acks that nobody asked for": Case("reply to SET_FEATURES where", {"SET_FEATURES": unasked}, None,
                                       {"protocol": QUIET}),
    "features are not accepted": Case("refuses the driver's features", {"GET_STATUS": fake.reply(U64(3))},
                                      None, {"protocol": SLOTS}),
    "a status is refused": Case("refused SET_STATUS", {("SET_STATUS", 1): fake.status(1)}, None,
                                {"protocol": SLOTS}),
    "ADD_MEM_REG is refused": Case("refused ADD_MEM_REG", {"ADD_MEM_REG": fake.status(1)}, None,
                                   {"protocol": SLOTS}),
    **{f"an in-flight buffer {what}": Case(told, {"GET_INFLIGHT_FD": act}) for what, told, act in (
        ("of 2**64 - 1 bytes", "has 18446744073709551615 bytes", buffer((1 << 64) - 1, 0, some_file)),
        ("of 1 TiB", "has 1099511627776 bytes", buffer(1 << 40, 0, some_file)),
        ("of no bytes", "has 0 bytes", buffer(0, 0, some_file)),
        ("beyond its file", "beyond its file of 4096 bytes", buffer(0x1001, 0, some_file)),
        ("that wraps around", "beyond its file", buffer(0x1000, (1 << 64) - 0x800, some_file)),
        ("without a file", "has no descriptor", buffer(0x1000)),
        ("in a device", "is no file", buffer(0x1000, 0, lambda: [os.open("/dev/zero", os.O_RDWR)])),
        ("in a folder", "is no file", buffer(0x1000, 0, lambda: [os.open("/", os.O_RDONLY)])),
        ("in a socket", "is no file", buffer(0x1000, 0, lambda: [os.eventfd(0)])),
        ("in two files", "2 descriptors where 0 to 1 belong", buffer(0x1000, 0, pipe)))},
    "descriptors with an ack": Case("2 descriptors where 0 belong", {"SET_VRING_KICK": fake.with_fds(2)}),
}  # fmt: skip

RUNNING = {
    # while the guest runs
    "death": Case("closed the connection", deed=dies),
    "megabytes that nobody asked for": Case("GET_CONFIG: .*flags", deed=talks),
    **{f"GET_CONFIG: {what}": Case(told, {("GET_CONFIG", 1): act}, reads, {}, **more)
       for what, (act, told, more) in ANSWERS.items() if what != "too long a payload"},
    "configuration cannot be read": Case("refused GET_CONFIG",
                                         {("GET_CONFIG", 1): fake.reply(Empty())}, reads, heals=True),
    "configuration of another length": Case("8 bytes was answered with 4",
                                            {("GET_CONFIG", 1): fake.reply(Config(0, 0, bytes(4)))}, reads),
    "configuration cannot be written": Case("refused SET_CONFIG", {"SET_CONFIG": fake.status(1)}, writes,
                                            heals=True),
    "death at SET_CONFIG": Case(LOST, {"SET_CONFIG": fake.hang_up}, writes),
    "a vector is refused": Case("refused SET_VRING_CALL", {("SET_VRING_CALL", 3): fake.status(1)},
                                moves_a_vector),
    # when it stops
    "death at GET_VRING_BASE": Case(LOST, {"GET_VRING_BASE": fake.hang_up}, resets),
    "another ring's base": Case(LOST, {"GET_VRING_BASE": fake.reply(VringState(7, 0))},
                                resets),
    "a ring is not disabled": Case(LOST, {("SET_VRING_ENABLE", 4): fake.status(1)}, resets),
    "a stop without an answer": Case(LOST, {"GET_VRING_BASE": fake.silence}, resets,
                                     {}, **SLOW),
    # its own requests
    "a flood of changes": Case("", deed=floods(False)),
    "a flood of changes, acks unread": Case("did not take a message", deed=floods(True)),
    "half a request": Case("", deed=notice(request("CONFIG_CHANGE_MSG")[:7])),
    "half a request, then the end": Case("", deed=notice(request("CONFIG_CHANGE_MSG")[:7], then_end=True)),
    "the end of its requests": Case("", deed=notice(b"\2", then_end=True)),
    "an unknown request": Case("", deed=notice(encode_request(Request(1006, "DANCE"), Empty()))),
    "a request that is a reply": Case("CONFIG_CHANGE_MSG with flags 0x5", deed=notice(HEADER.pack(2, 5, 0))),
    "a request of 4 GiB": Case("with 4294967295 bytes", deed=notice(HEADER.pack(2, 1, 0xFFFF_FFFF))),
    "a request with a descriptor": Case("1 descriptors where 0",
                                        deed=notice(request("CONFIG_CHANGE_MSG"), 1)),
    "a request with 34 descriptors": Case("more than 32 descriptors",
                                          deed=notice(request("CONFIG_CHANGE_MSG"), 34)),
    "noise as requests": Case("with flags", deed=notice(b"GET / HTTP/1.1\r\n\r\n")),
    **{f"{name} though not agreed on": Case(f"{name} without", deed=notice(request(name), fds))
       for name, fds in (("SHMEM_MAP", 1), ("SHMEM_UNMAP", 0), ("VRING_CALL", 0), ("SHARED_OBJECT_ADD", 0),
                         ("VRING_HOST_NOTIFIER_MSG", 1))},
    "an address translation": Case("IOTLB_MSG before", deed=notice(request("IOTLB_MSG"))),
    # shared memory regions
    **{f"a mapping {what}": Case("", {}, maps(status, *more), SHARING) for what, status, *more in (
        ("in a region that is not there", errno.EINVAL, Mmap(1, 0, 0, 0x1000, 0)),
        ("in region 255", errno.EINVAL, Mmap(255, 0, 0, 0x1000, 0)),
        ("beyond its region", errno.EINVAL, Mmap(3, 0, 0x1000, 0x1000, 0)),
        ("across the end of its region", errno.EINVAL, Mmap(3, 0, 0, 0x2000, 0), lambda: some_file(0x2000)),
        ("at the end of addresses", errno.EINVAL, Mmap(0, 0, (1 << 64) - 0x1000, 0x1000, 0)),
        ("that wraps around", errno.EINVAL, Mmap(0, 0, 0x1000, (1 << 64) - 0x1000, 0)),
        ("of nothing", errno.EINVAL, Mmap(0, 0, 0, 0, 0)),
        ("of half a page", errno.EINVAL, Mmap(0, 0, 0, 0x800, 0)),
        ("at half a page", errno.EINVAL, Mmap(0, 0, 0x800, 0x1000, 0)),
        ("beyond its file", errno.EINVAL, Mmap(0, 0x1000, 0, 0x1000, 0)),
        ("from the end of numbers", errno.EINVAL, Mmap(0, (1 << 64) - 0x1000, 0, 0x1000, 0)),
        ("with strange flags", errno.EINVAL, Mmap(0, 0, 0, 0x1000, 0xFFFE)),
        ("of a pipe", errno.ENODEV, Mmap(0, 0, 0, 0x1000, 0), pipe),
        ("that cannot be written", errno.EACCES, Mmap(0, 0, 0, 0x1000, 1),
         lambda: [os.open(__file__, os.O_RDONLY)]))},
    "something is unmapped that is not": Case("", {}, maps(errno.EINVAL, Mmap(0, 0, 0, 0x1000, 0),
                                                          list, "SHMEM_UNMAP"), SHARING),
    "a mapping without a file": Case("0 descriptors where 1", {}, notice(request("SHMEM_MAP")), SHARING),
    "a mapping loses its memory": Case("", {}, maps_and_cuts, SHARING),
    "more mappings than there can be": Case("", {}, maps_until_it_is_too_much, SHARING),
    # what it was given
    "it closes all it got": Case("", deed=closes_what_it_got),
    "memory is truncated": Case("", deed=refused(lambda fd: os.ftruncate(fd, 0))),
    "memory is extended": Case("", deed=refused(lambda fd: os.ftruncate(fd, 1 << 40))),
    "memory is sealed against writing": Case("", deed=refused(lambda fd: seal(fd, F_SEAL_WRITE))),
    "memory is sealed for all others": Case("", deed=refused(lambda fd: seal(fd, F_SEAL_FUTURE_WRITE))),
    "doorbells that block": Case("", deed=on_eventfds(lambda fd: os.set_blocking(fd, True))),
    "doorbells that are full": Case("", deed=on_eventfds(fill)),
    "doorbells that block and are full": Case("", deed=on_eventfds(
        fill, lambda fd: os.set_blocking(fd, True))),
    "a storm of interrupts": Case("", deed=storm_of_interrupts),
    # what it says about itself
    "it offers every virtio feature": Case("", options={"virtio": (1 << 64) - 1}),
    "it has 2**64 - 1 queues": Case("", options={"queues": (1 << 64) - 1}),
    "it answers byte by byte": Case("", {"GET_FEATURES": fake.drip, "SET_FEATURES": fake.drip,
                                         "GET_CONFIG": fake.drip}, reads),
}  # fmt: skip
TABLE = {"opening": OPENING, "starting": STARTING, "running": RUNNING}
