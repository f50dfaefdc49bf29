"""The host's ends of the devices: before the guest runs, meanwhile, and what is left afterwards.

Each step is a function of a row's place and puts what it saw into the place's report.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guest.devices import gpio
from guest.devices.common import (
    MIB,
    blocks,
    checksum,
    digest,
    distinct,
    find_event,
    listing,
    numbered,
    received,
    sent,
    written,
)
from guest.devices.place import LIMIT, Place, wait_for_path

from pyvmm.vhost_user.picture import SAVE_SECONDS

UHID_CREATE2, UHID_INPUT2 = 11, 12
# The report descriptor of a keyboard: 8 modifiers, a byte of nothing, 6 keys.
KEYBOARD = bytes.fromhex(
    "05010906a101050719e029e71500250175019508810295017508810195067508150025650507190029658100c0"
)


# -- before: what a row's backend serves ---------------------------------------------------


def prepare_fs(place: Place) -> None:
    """A file system that has everything, in a file; below it memory, for a file that is large."""
    folder, image, large = place.dir / "fs", place.image, place.dir / "large"
    folder.mkdir()
    large.mkdir()
    with image.open("wb") as file:
        file.truncate(128 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=1", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    (folder / "large").mkdir()
    subprocess.run(["mount", "--bind", large, folder / "large"], check=True)
    with (large / "data").open("wb", buffering=0) as file:
        place.report["in"] = checksum(written(file, distinct(place.row.args["megabytes"])))
    (folder / "named").touch()
    os.setxattr(folder / "named", "user.from-host", b"set on the host")
    place.report["xattr"] = b"set on the host".hex()


def prepare_disk(place: Place) -> None:
    """An image that begins with known bytes."""
    args = place.row.args
    raw = place.dir / "raw" if args.get("format") else place.image
    with raw.open("wb") as file:
        place.report["in"] = digest(written(file, numbered(4)))
        file.truncate(args["size"])
    if args.get("format"):
        convert("raw", raw, args["format"], place.image)


def convert(source_format: str, source: Path, target_format: str, target: Path) -> None:
    """From one image format to another."""
    command = ["qemu-img", "convert", "-f", source_format, "-O", target_format, source, target]
    subprocess.run(command, check=True)


def prepare_rng(place: Place) -> None:
    """The file whose bytes are the device's random numbers."""
    (place.dir / "source").write_bytes(os.urandom(MIB))


def prepare_i2c(place: Place) -> None:
    """An adapter of a preloaded library's, whose registers are a file."""
    folder = place.dir / "sys/bus/i2c/devices/i2c-0"
    folder.mkdir(parents=True)
    (folder / "name").write_text("stand-in\n")
    (place.dir / "dev").mkdir()
    registers = os.urandom(256)
    (place.dir / "dev/i2c-0").write_bytes(registers)
    place.report["in"] = registers[0x40:0x50].hex()
    preload(place, "i2c_adapter.c")


def preload(place: Place, source: str) -> None:
    """Compile a stand-in for hardware."""
    path = Path(__file__).with_name(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", place.dir / "preload.so", path], check=True)


def prepare_gpio(place: Place) -> None:
    """A chip of a preloaded library's, whose lines are a file, and edges what is put into pipes.

    The released backend tells the guest the opposite of each input.
    """
    count = place.row.args["lines"]
    levels = "".join(str(byte & 1) for byte in os.urandom(count - 1))
    levels += opposite(levels[-1])  # one of the last two rises, the other falls
    (place.dir / "lines").write_text(levels)
    for line in range(count):
        os.mkfifo(place.dir / f"edges-{line}")
    place.report |= {"in": opposite(levels[count // 2 :]), "names": [f"line-{line}" for line in range(count)]}
    preload(place, "gpio_chip.c")


def prepare_keyboard(place: Place) -> None:
    """A keyboard that the kernel believes in (HID in user space)."""
    name = place.row.args["keyboard"].encode()
    create = struct.pack("=I128s64s64sHHIIII", UHID_CREATE2, name, b"", b"", len(KEYBOARD), 3, 1, 2, 3, 0)
    place.uhid = os.open("/dev/uhid", os.O_RDWR)
    os.write(place.uhid, create + KEYBOARD.ljust(4096, b"\0"))
    end = time.monotonic() + 20
    while True:
        with contextlib.suppress(FileNotFoundError):
            (place.dir / "event").symlink_to(f"/dev/input/{find_event(name.decode())}")
            return
        assert time.monotonic() < end, "the keyboard does not appear"
        time.sleep(0.1)


# -- meanwhile: the host's end of the wire -----------------------------------------------


def talk_console(place: Place) -> None:
    """The backend's TCP port: key by key, each echoed by the guest, then text."""
    place.wait_for("ready")
    keys = os.urandom(place.row.args["keys"]).hex().encode()[: place.row.args["keys"]]
    with socket.create_connection(("127.0.0.1", 12345)) as sock:
        sock.settimeout(LIMIT)
        assert sock.recv(1) == b">"
        for at in range(len(keys)):
            sock.sendall(keys[at : at + 1])
            assert sock.recv(1) == keys[at : at + 1]
        place.report["in"] = digest([keys])
        place.report["out"] = digest(received(sock, place.row.args["bytes"]))


def host_end(sock: socket.socket, size: int) -> dict[str, str]:
    """Send so many bytes, then read as many."""
    sock.settimeout(LIMIT)
    given = digest(sent(sock, [os.urandom(size)]))
    return {"in": given, "out": digest(received(sock, size))}


def talk_ports(place: Place) -> None:
    """One unix socket for each port."""
    for port in ("second", "first"):
        wait_for_path(place.results / f"{place.row.name}-{port}.ready")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(f"{place.dir}/{port}")
            both = host_end(sock, place.row.args["bytes"])
            place.report |= {f"{port}_{way}": value for way, value in both.items()}


def talk_vsock(place: Place) -> None:
    """Firecracker's convention: a unix socket for what the guest calls, CONNECT for what we call."""
    size = place.row.args["megabytes"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{place.dir}/host_1235")
        listener.listen()
        listener.settimeout(LIMIT)
        sock, _ = listener.accept()
        with sock:
            place.report["out"] = digest(received(sock, size * MIB))
            sock.sendall(b"ok")
    place.wait_for("listening")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LIMIT)
        sock.connect(f"{place.dir}/host")
        sock.sendall(b"CONNECT 1234\n")
        assert sock.recv(64).startswith(b"OK"), "the backend did not connect"
        place.report["in"] = digest(sent(sock, numbered(size)))
        assert sock.recv(2) == b"ok"


def talk_gpio(place: Place) -> None:
    """Look at what the guest drives; move the last two lines."""
    lines, count = place.dir / "lines", place.row.args["lines"]
    for step in range(len(place.row.args["levels"])):
        place.wait_for(f"driven{step}")
        place.report[f"out{step}"] = lines.read_text()[: count // 2]
        place.seen(f"driven{step}")
    for line in (count - 1, count - 2):
        place.wait_for(f"armed{line}")
        levels = lines.read_text()
        seen, level = levels[line], opposite(levels[line])
        lines.write_text(levels[:line] + level + levels[line + 1 :])
        event = gpio.EVENT.pack(time.monotonic_ns(), gpio.EDGE[level], line, 1, 1)
        (place.dir / f"edges-{line}").write_bytes(event)
        place.report[f"edge{line}"] = [line, gpio.EDGE[seen], seen]


def opposite(levels: str) -> str:
    """The other level of each line."""
    return "".join("10"[int(level)] for level in levels)


def talk_keyboard(place: Place) -> None:
    """Type a, b, c ...: usages 4, 5, 6 and so on of the HID keyboard page."""
    place.wait_for("ready")
    for usage in range(4, 4 + place.row.args["keys"]):
        for keys in (bytes([0, 0, usage]), b""):
            report = keys.ljust(8, b"\0")
            os.write(place.uhid, struct.pack("=IH", UHID_INPUT2, len(report)) + report.ljust(4096, b"\0"))
    codes = (30, 48, 46, 32, 18, 33, 34, 35)[: place.row.args["keys"]]  # KEY_A, KEY_B, KEY_C ...
    place.report["keys"] = [[code, value] for code in codes for value in (1, 0)]


def talk_net(place: Place) -> None:
    """The host's end of the wire: an address, and an iperf3 server for two runs."""
    tap = place.row.args["tap"]
    wait_for_path(f"/sys/class/net/{tap}")
    subprocess.run(["busybox", "ifconfig", tap, "10.9.0.1", "netmask", "255.255.255.0", "up"], check=True)
    for way, end in (("out", "sum_received"), ("in", "sum_sent")):
        ended: dict[str, Any] = {}
        while end not in ended:  # a client that failed tries again
            done = subprocess.run(["iperf3", "-s", "-1", "-J"], capture_output=True, check=False)
            ended = json.loads(done.stdout)["end"]
        total = ended[end]["bytes"]
        place.report[way] = min(total // MIB, place.row.args["megabytes"])  # a sender may be ahead


def talk_gpu(place: Place) -> None:
    """What pyvmm saved of the display."""
    place.wait_for("shown")
    wait_for_path(place.dir / "screen.png")
    time.sleep(3 * SAVE_SECONDS)
    place.report["picture"] = digest([read_png(place.dir / "screen.png")])
    place.seen("shown")


def read_png(path: Path) -> bytes:
    """The pixels of a PNG file as pyvmm writes it: RGB, no filters."""
    data = path.read_bytes()
    width = int.from_bytes(data[16:20], "big")
    start = data.index(b"IDAT")
    size = int.from_bytes(data[start - 4 : start], "big")
    rows = zlib.decompress(data[start + 4 : start + 4 + size])
    return b"".join(rows[at + 1 : at + 1 + 3 * width] for at in range(0, len(rows), 1 + 3 * width))


def talk_flush(place: Place) -> None:
    """The plug is pulled: the machine and the storage daemon get SIGKILL."""
    place.wait_for("flushed")
    machine = place.machine
    assert machine is not None
    children = Path(f"/proc/{machine.pid}/task/{machine.pid}/children").read_text().split()
    for pid in (machine.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)


# -- afterwards: what is on the host -----------------------------------------------------


def inspect_fs(place: Place, guest: dict[str, Any]) -> None:
    """Read, below the backend, what the guest wrote."""
    folder = place.dir / "fs"
    place.report["out"] = checksum(blocks(place.dir / "large/data"))
    place.report["storm"] = listing(folder / "storm")
    place.report["mapped"] = digest(blocks(folder / "mapped"))
    place.report["xattr_back"] = os.getxattr(folder / "named", "user.from-guest").hex()


def inspect_disk(place: Place, guest: dict[str, Any]) -> None:
    """Read the image as qemu-img sees it."""
    image = place.image
    if place.row.args.get("format"):
        image = place.dir / "after"
        convert(place.row.args["format"], place.image, "raw", image)
    offset = 0 if place.row.proof == "flush" else 8 * MIB
    place.report["out"] = digest(blocks(image, 8 * MIB, offset))


def inspect_readonly(place: Place, guest: dict[str, Any]) -> None:
    """Nothing has changed."""
    place.report["in"] = digest(blocks(place.image, 4 * MIB))


def inspect_rng(place: Place, guest: dict[str, Any]) -> None:
    """What the guest got is somewhere in the source."""
    data = bytes.fromhex(guest.get("bytes", ""))
    pieces = [data[at : at + 64] for at in range(0, len(data), 64)]
    source = (place.dir / "source").read_bytes()
    place.report["bytes"] = data.hex() if pieces and all(piece in source for piece in pieces) else "others"


def inspect_i2c(place: Place, guest: dict[str, Any]) -> None:
    """The registers that the guest wrote."""
    place.report["out"] = (place.dir / "dev/i2c-0").read_bytes()[0x10:0x20].hex()


def nothing(*_: object) -> None:
    """A row without this step."""


# For each proof: before, meanwhile, afterwards.
STEPS: dict[str, tuple[Callable[..., None], Callable[..., None], Callable[..., None]]] = {
    "fs": (prepare_fs, nothing, inspect_fs),
    "disk": (prepare_disk, nothing, inspect_disk),
    "readonly_disk": (prepare_disk, nothing, inspect_readonly),
    "flush": (prepare_disk, talk_flush, inspect_disk),
    "rng": (prepare_rng, nothing, inspect_rng),
    "console": (nothing, talk_console, nothing),
    "ports": (nothing, talk_ports, nothing),
    "vsock": (nothing, talk_vsock, nothing),
    "i2c": (prepare_i2c, nothing, inspect_i2c),
    "gpio": (prepare_gpio, talk_gpio, nothing),
    "keyboard": (prepare_keyboard, talk_keyboard, nothing),
    "net": (nothing, talk_net, nothing),
    "gpu": (nothing, talk_gpu, nothing),
}
NO_STEPS = (nothing, nothing, nothing)
