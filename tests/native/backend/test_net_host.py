"""The network device at the host's network: a TAP interface, and passt.

Every interface is in a network namespace that its test makes.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from fakes.net_driver import (
    EXPERIMENT,
    F_CSUM,
    F_GUEST_CSUM,
    F_GUEST_TSO4,
    F_GUEST_TSO6,
    F_HOST_TSO4,
    F_HOST_TSO6,
    F_STATUS,
    MAC,
    NEEDS_CSUM,
    NO_HEADER,
    PLAIN,
    RECEIVED,
    Card,
    cpu_ticks,
    frame,
)

from pyvmm.backend.net import Net
from pyvmm.backend.process import spawn
from pyvmm.backend.wire import StreamWire, TapWire, open_tap


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


# -- a TAP interface ----------------------------------------------------------------------------

NAME = "pyvmm0"
CLONE_NEWNET = 0x4000_0000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
SOL_PACKET, PACKET_VNET_HDR = 263, 15
VNET = 10  # bytes of the header that packet sockets have


def alone():
    """This process, a child, goes into a network namespace of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())


def flag_up(name, up=True):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sH22x", name.encode(), IFF_UP if up else 0)
        fcntl.ioctl(sock, SIOCSIFFLAGS, request)


class Segment:
    """A card at a TAP interface in a namespace, and a packet socket at the interface's other side."""

    def __init__(self, stack, features):
        ours, theirs = socket.socketpair()
        stack.enter_context(ours)

        def make():
            alone()
            device = Net(lambda: TapWire(NAME))
            with suppress(FileNotFoundError):  # the kernel's own words would be in between
                Path(f"/proc/sys/net/ipv6/conf/{NAME}/disable_ipv6").write_text("1")
            flag_up(NAME)
            packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            packets.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            packets.bind((NAME, EXPERIMENT))
            socket.send_fds(theirs, [b"."], [packets.fileno()])
            return device

        self.process = spawn(make, [theirs.fileno()])
        stack.callback(self.process.close)
        theirs.close()
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        self.packets = stack.enter_context(socket.socket(fileno=fds[0]))
        self.packets.settimeout(10)
        self.card = Card(self.process.take_socket(), features).start()
        stack.callback(self.card.close)

    def inside(self, *words):
        """A command in the namespace."""
        command = ["nsenter", f"--net=/proc/{self.process.pid}/ns/net", *words]
        subprocess.run(command, check=True)


@pytest.fixture
def segment(stack):
    if os.geteuid():
        pytest.skip("a network namespace needs root")
    return lambda features=None: Segment(stack, features)


def test_frames_through_a_tap(segment):
    wire = segment()
    wire.card.give(100)
    for number in range(100):
        wire.packets.send(NO_HEADER[:VNET] + frame(number))
    assert wire.card.receive(100) == [RECEIVED + frame(number) for number in range(100)]
    assert wire.card.send(NO_HEADER, frame(7))
    assert wire.packets.recv(2048) == NO_HEADER[:VNET] + frame(7)


OFFERED = F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_HOST_TSO4 | F_HOST_TSO6 | F_STATUS


def test_headers_of_the_driver_pass(segment):
    wire = segment()
    assert wire.card.offered & ((1 << 24) - 1) == OFFERED
    assert wire.card.send(NEEDS_CSUM, frame(1))
    assert wire.packets.recv(2048) == NEEDS_CSUM[:VNET] + frame(1)


@pytest.mark.parametrize("features", [None, PLAIN, PLAIN | F_GUEST_TSO4])
def test_checksums_are_left_to_drivers_that_can(segment, features):
    wire = segment(features)
    wire.card.give()
    wire.packets.send(NEEDS_CSUM[:VNET] + frame(1))
    (got,) = wire.card.receive()
    if features is None:
        assert got == NEEDS_CSUM[:VNET] + b"\1\0" + frame(1)
    else:
        assert got[:12] == RECEIVED
        assert got[12:] != frame(1)  # there is a checksum now


def test_a_header_that_the_host_refuses_costs_one_frame(segment):
    wire = segment()
    bad = struct.pack("<BBHHHHH", 1, 0, 0, 0, 0xFFFF, 0xFFFF, 0)
    assert wire.card.send(bad, frame(1))
    assert wire.card.send(NO_HEADER, frame(2))
    assert wire.packets.recv(2048)[VNET:] == frame(2)


def test_an_interface_that_is_down_loses_frames(segment):
    wire = segment()
    wire.card.give()
    wire.inside("busybox", "ip", "link", "set", NAME, "down")
    assert wire.card.send(NO_HEADER, frame(1))
    before = cpu_ticks(wire.process.pid)
    time.sleep(0.3)
    assert cpu_ticks(wire.process.pid) - before <= 2
    wire.inside("busybox", "ip", "link", "set", NAME, "up")
    wire.packets.close()
    assert wire.card.send(NO_HEADER, frame(2))
    assert wire.card.status() == 1
    assert wire.process.wait(0) is None


@pytest.mark.parametrize("watched", [True, False])
def test_an_interface_that_is_deleted_takes_the_link_down(segment, watched):
    wire = segment()
    if not watched:
        wire.packets.send(NO_HEADER[:VNET] + frame(0))  # there is no buffer for it
        time.sleep(0.1)
    wire.inside("busybox", "ip", "link", "del", NAME)
    assert watched or wire.card.send(NO_HEADER, frame(1))
    assert wire.card.told() == "CONFIG_CHANGE_MSG"
    assert wire.card.status() == 0
    assert wire.card.send(NO_HEADER, frame(2))
    before = cpu_ticks(wire.process.pid)
    time.sleep(0.3)
    assert cpu_ticks(wire.process.pid) - before <= 2
    assert wire.process.wait(0) is None


# -- passt --------------------------------------------------------------------------------------

TUNSETPERSIST = 0x400454CB
PASST = """
busybox ip link set up0 up
busybox ip addr add 192.0.2.2/24 dev up0
busybox ip route add default via 192.0.2.1
exec passt --foreground --stderr --one-off --socket {}
"""
GUEST, GATEWAY = bytes([192, 0, 2, 2]), bytes([192, 0, 2, 1])


@pytest.fixture
def passt(stack):
    """The path of a passt's socket, and a UDP socket in its namespace.

    There is one interface, with an address and a route as passt wants, and nothing behind it.
    """
    if shutil.which("passt") is None:
        pytest.skip("passt is not installed")
    ours, theirs = socket.socketpair()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    folder.chmod(0o777)  # it becomes nobody

    def prepare():
        alone()
        fd = open_tap("up0")
        fcntl.ioctl(fd, TUNSETPERSIST, 1)
        os.close(fd)
        flag_up("lo")
        host = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        host.bind(("127.0.0.1", 7000))
        socket.send_fds(theirs, [b"."], [host.fileno()])

    with ours, theirs, (folder / "log").open("wb") as log:
        process = subprocess.Popen(["sh", "-c", PASST.format(folder / "s")], preexec_fn=prepare, stderr=log)  # noqa: PLW1509 (one thread)
        stack.callback(process.wait, 10)
        stack.callback(process.kill)
        host = stack.enter_context(socket.socket(fileno=socket.recv_fds(ours, 1, 1)[1][0]))
    host.settimeout(10)
    for _ in range(1000):
        if (folder / "s").exists():
            return str(folder / "s"), host
        time.sleep(0.01)
    pytest.fail((folder / "log").read_text())


def udp(data, ports, source=GUEST, target=GATEWAY):
    """A UDP datagram in an IP packet; its own checksum may be left out."""
    segment = struct.pack(">HHHH", *ports, 8 + len(data), 0) + data
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(segment), 1, 0, 64, 17, 0) + source + target
    total = sum(struct.unpack(">10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return header[:10] + struct.pack(">H", total ^ 0xFFFF) + header[12:] + segment


def test_the_host_s_network_through_passt(passt, stack):
    """ARP, a DHCP lease, and datagrams both ways between the driver and a socket of the host's."""
    path, host = passt
    process = spawn(lambda: Net(lambda: StreamWire(path)))
    stack.callback(process.close)
    card = Card(process.take_socket(), PLAIN).start()
    stack.callback(card.close)
    card.give(64)

    def exchange(kind, data, wanted):
        assert card.send(NO_HEADER, b"\xff" * 6 + MAC + struct.pack(">H", kind) + data)
        for _ in range(64):  # passt has words of its own in between
            (got,) = card.receive() or pytest.fail("no answer")
            if wanted(got[12:]):
                return got[12:]
        return None

    who_has = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + MAC + GUEST + bytes(6) + GATEWAY
    answer = exchange(0x0806, who_has, lambda got: got[12:14] == b"\x08\x06" and got[20:22] == b"\0\2")
    assert answer[28:32] == GATEWAY
    discover = (
        b"\1\1\6\0" + b"pyvm" + bytes(20) + MAC + bytes(10 + 64 + 128) + b"\x63\x82\x53\x63\x35\1\1\xff"
    )
    everyone = udp(discover, (68, 67), bytes(4), b"\xff" * 4)
    offer = exchange(0x0800, everyone, lambda got: got[36:38] == struct.pack(">H", 68))
    assert offer[46:50] == b"pyvm" and offer[58:62] == GUEST
    assert card.send(NO_HEADER, answer[6:12] + MAC + b"\x08\0" + udp(b"from the guest", (6000, 7000)))
    data, source = host.recvfrom(100)
    assert data == b"from the guest"
    host.sendto(b"from the host", source)
    (got,) = [data for data in card.receive() if data[12 + 36 : 12 + 38] == struct.pack(">H", 6000)]
    assert got[12 + 42 :] == b"from the host"
