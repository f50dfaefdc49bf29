"""One proof for each kind of device: data through the guest's own driver, and a report of what it saw.

A proof is a function of the row's name and arguments.  What it reports under a key must be what the
host's side reports under it.  `say`, `ask` and `save` are its words to the host: files in $RESULTS.
In one file because the proofs share these words and are read beside each other.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import socket
import struct
import subprocess
import time
import tty
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guest.devices import kms, pci_driver
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
from guest.devices.gpio import EDGES, INPUT, OUTPUT, Chip

LIMIT = 150  # seconds for one proof
RESULTS = Path(os.environ.get("RESULTS", "."))
I2C_RDWR, I2C_M_RD = 0x0707, 1
SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17
EVENT, EV_KEY = struct.Struct("@qqHHi"), 1
FIO = ("fio", "--name=verify", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--thread",
       "--rw=randwrite", "--bs=16k", "--size=4M", "--randrepeat=0")  # fmt: skip


class I2cMessage(ctypes.Structure):
    """struct i2c_msg."""

    _fields_ = (
        ("address", ctypes.c_uint16), ("flags", ctypes.c_uint16), ("length", ctypes.c_uint16),
        ("data", ctypes.c_uint64),
    )  # fmt: skip


def say(name: str, word: str) -> None:
    """Tell the host's side that something is so now."""
    (RESULTS / f"{name}.{word}").touch()


def ask(name: str, word: str) -> None:
    """Tell the host's side something, and wait until it has looked."""
    say(name, word)
    while not (RESULTS / f"{name}.{word}.seen").exists():
        time.sleep(0.02)


def save(name: str, report: dict[str, Any]) -> None:
    """Hand a report to the host, whole or not at all."""
    path = RESULTS / f"{name}.part"
    path.write_text(json.dumps(report))
    path.rename(RESULTS / f"{name}.json")


def fio(name: str, *options: str) -> int:
    """fio writes and verifies; its exit status."""
    done = subprocess.run([*FIO, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        (RESULTS / f"{name}.fio").write_text(done.stdout + done.stderr)
    return done.returncode


def fs(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """Checksums both ways, fio, many small changes, extended attributes, a shared mapping."""
    root = Path("/mnt") / name
    root.mkdir()
    subprocess.run(["mount", "-t", "virtiofs", name, root], check=True)
    os.chdir(root)
    whole_requests(root)
    report: dict[str, Any] = {"in": checksum(blocks("large/data"))}
    with open("large/data", "r+b", buffering=0) as file:
        report["out"] = checksum(written(file, distinct(args["megabytes"])))
        os.fsync(file.fileno())
    report["fio"] = fio(name, f"--directory={root}", "--ioengine=psync")
    report["storm"] = storm(args["files"])
    os.setxattr("named", "user.from-guest", b"set in the guest\0")
    report["xattr"] = os.getxattr("named", "user.from-host").hex()
    report["xattr_back"] = b"set in the guest\0".hex()
    report["mapped"] = mapped("mapped")
    os.chdir("/")
    subprocess.run(["umount", root], check=True)
    return report


def whole_requests(root: Path) -> None:
    """Read ahead as much as one request takes, eight times the driver's own: the lab waits 10 ms for each."""
    device = root.stat().st_dev
    path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    path.write_text("1024")


def storm(count: int) -> list[str]:
    """Make, fill, rename, link, chmod and remove files; what is left, as the host must see it."""
    os.mkdir("storm")
    for number in range(count):
        path = f"storm/{number}"
        Path(path).write_text(path)
        os.rename(path, f"{path}.moved")
        os.link(f"{path}.moved", f"{path}.hard")
        os.symlink(f"{number}.hard", f"{path}.soft")
        os.chmod(f"{path}.hard", 0o600 + number % 8)
        os.unlink(f"{path}.{'moved' if number % 2 else 'soft'}")
    return listing("storm")


def mapped(path: str) -> str:
    """Change a file through a shared mapping."""
    with open(path, "w+b") as file:
        file.truncate(4 * mmap.PAGESIZE)
        with mmap.mmap(file.fileno(), 0) as view:
            view[:] = os.urandom(len(view))
            view.flush()
            return digest([view[:]])


def find_disk(size: int) -> str:
    """The name of the block device with so many bytes; every row has a size of its own."""
    for path in Path("/sys/block").iterdir():
        if int((path / "size").read_text()) == size // 512:
            return path.name
    raise FileNotFoundError(f"no disk of {size} bytes")


def disk(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """What the host put there, what the host shall find, and fio between them."""
    device = find_disk(args["size"])
    path = f"/dev/{device}"
    report: dict[str, Any] = {"in": digest(blocks(path, 4 * MIB))}
    with open(path, "r+b", buffering=0) as file:
        file.seek(8 * MIB)
        report["out"] = digest(written(file, numbered(8)))
        os.fsync(file.fileno())
    queues = args.get("queues")
    if queues:
        report["queues"] = len(os.listdir(f"/sys/block/{device}/mq"))
        assert report["queues"] == queues, report
    jobs = (f"--numjobs={queues or 1}", "--offset=16M", "--offset_increment=4M", "--group_reporting")
    report["fio"] = fio(name, f"--filename={path}", "--direct=1", "--ioengine=libaio", "--iodepth=8", *jobs)
    return report


def readonly_disk(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """It can be read, and not be written."""
    device = find_disk(args["size"])
    report: dict[str, Any] = {"in": digest(blocks(f"/dev/{device}", 4 * MIB)), "open": "allowed"}
    report["read_only"] = int(Path(f"/sys/block/{device}/ro").read_text())
    try:
        with open(f"/dev/{device}", "r+b", buffering=0) as file:
            file.write(bytes(4096))
            os.fsync(file.fileno())
    except OSError as error:
        name = errno.errorcode[error.errno or 0]
        report["open"] = "EROFS" if name in ("EROFS", "EACCES", "EPERM") else name
    return report


def flush(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """Write and flush; the report leaves before the host pulls the plug."""
    path = f"/dev/{find_disk(args['size'])}"
    with open(path, "r+b", buffering=0) as file:
        report = {"out": digest(written(file, numbered(8)))}
        os.fsync(file.fileno())
    save(name, report)
    say(name, "flushed")
    time.sleep(LIMIT)
    return report


def rng(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """Bytes of the device, for the host to find in its source."""
    with open("/dev/hwrng", "rb", buffering=0) as file:
        data = b"".join(file.read(64) for _ in range(16))
    return {"bytes": data.hex()}


def console(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """The terminal hvc0 carries what is typed, and text back.

    The guest begins, one key at a time, plain text: the released backend drops keys before the guest
    has written, completes a buffer once for each byte in it, and ends when text is not UTF-8.  It runs
    ahead of the guest since it forgets a buffer that the driver gives back before it goes to sleep.
    """
    fd = os.open("/dev/hvc0", os.O_RDWR | os.O_NOCTTY)
    tty.setraw(fd)
    say(name, "ready")
    os.write(fd, b">")
    keys = b""
    for _ in range(args["keys"]):
        keys += os.read(fd, 1)
        os.write(fd, keys[-1:])
    out = os.urandom(args["bytes"] // 2).hex().encode()
    write_all(fd, out)
    return {"in": digest([keys]), "out": digest([out])}


def write_all(fd: int, data: bytes) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def exchanged(name: str, fd: int, size: int) -> dict[str, Any]:
    """Read so many bytes, then write as many others."""
    say(name, "ready")
    data = b""
    while len(data) < size:
        data += os.read(fd, size - len(data))
    out = os.urandom(size)
    write_all(fd, out)
    return {"in": digest([data]), "out": digest([out])}


def ports(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """Two named ports of one device at the same time."""
    report = {}
    fds = {port: os.open(port_device(port), os.O_RDWR) for port in ("second", "first")}
    for port, fd in fds.items():
        both = exchanged(f"{name}-{port}", fd, args["bytes"])
        report |= {f"{port}_{way}": value for way, value in both.items()}
    return report


def port_device(port: str) -> str:
    """The device node of a port that the host named."""
    for path in Path("/sys/class/virtio-ports").iterdir():
        if (path / "name").exists() and (path / "name").read_text().strip() == port:
            return f"/dev/{path.name}"
    raise FileNotFoundError(f"no port {port}")


def vsock(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """A connection to the host carries data out, one from the host carries data in."""
    size = args["megabytes"]
    report = {}
    with socket.socket(socket.AF_VSOCK) as sock:
        sock.connect((socket.VMADDR_CID_HOST, 1235))
        report["out"] = digest(sent(sock, numbered(size)))
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(2) == b"ok"
    with socket.socket(socket.AF_VSOCK) as listener:
        listener.bind((socket.VMADDR_CID_ANY, 1234))
        listener.listen()
        say(name, "listening")
        sock, (cid, _) = listener.accept()
        with sock:
            assert cid == socket.VMADDR_CID_HOST
            report["in"] = digest(received(sock, size * MIB))
            sock.sendall(b"ok")
    return report


def sound(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """One second of music, which the device has to consume at its own pace."""
    path = "/mnt/music"
    Path(path).write_bytes(array.array("h", [(i * 521) % 30000 for i in range(2 * 44100)]).tobytes())
    command = ["aplay", "-D", "hw:0,0", "-t", "raw", "-f", "S16_LE", "-r", "44100", "-c", "2", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    cards = Path("/proc/asound/cards")
    text = cards.read_text() if cards.exists() else ""
    return {"aplay": done.returncode, "said": done.stderr, "cards": text}


def echo(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """A driver of a few lines, in this process, gives buffers to a device with no driver in Linux."""
    with pci_driver.Device(pci_driver.find(0x1040 + 63)) as device:
        queue = device.start()
        good = 0
        for number in range(args["rounds"]):
            data = os.urandom(1 + number * 7 % 2000)
            good += queue.exchange(data, len(data)) == data
    return {"echoed": good}


def i2c(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """Registers of a client: some are written, some are read."""
    fd = os.open("/dev/i2c-0", os.O_RDWR)
    out = os.urandom(16)
    transfer(fd, [(0, bytes([0x10]) + out)])
    read = transfer(fd, [(0, bytes([0x40])), (I2C_M_RD, bytes(16))])
    return {"out": out.hex(), "in": read[1].hex()}


def transfer(fd: int, messages: list[tuple[int, bytes]]) -> list[bytes]:
    """I2C_RDWR: one transfer of several messages to the client at 0x20; what is in each afterwards."""
    rooms = [ctypes.create_string_buffer(data, len(data)) for _, data in messages]
    table = (I2cMessage * len(messages))()
    for entry, (flags, data), room in zip(table, messages, rooms, strict=True):
        entry.address, entry.flags, entry.length, entry.data = 0x20, flags, len(data), ctypes.addressof(room)
    fcntl.ioctl(fd, I2C_RDWR, struct.pack("@QI", ctypes.addressof(table), len(messages)))
    return [room.raw for room in rooms]


def gpio(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """Some lines are driven, the others are read, and an edge of each of the last two arrives.

    One edge a line: the released backend may refuse to wait for a second one.
    """
    chip = Chip(0)
    report: dict[str, Any] = {"names": [chip.name(line) for line in range(args["lines"])]}
    half = args["lines"] // 2
    driven = chip.request(range(half), OUTPUT)
    for step, levels in enumerate(args["levels"]):
        driven.set(levels)
        report[f"out{step}"] = levels
        ask(name, f"driven{step}")
    inputs = chip.request(range(half, args["lines"]), INPUT)
    report["in"] = inputs.get()
    inputs.close()
    for line in (args["lines"] - 1, args["lines"] - 2):
        watched = chip.request(range(line, line + 1), INPUT | EDGES)
        say(name, f"armed{line}")
        report[f"edge{line}"] = [*watched.event(), watched.get()]
        watched.close()
    return report


def keyboard(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """What is typed on the host arrives as events."""
    fd = os.open(f"/dev/input/{find_event(args['keyboard'])}", os.O_RDONLY)
    say(name, "ready")
    keys: list[list[int]] = []
    while len(keys) < 2 * args["keys"]:
        for event in EVENT.iter_unpack(os.read(fd, 64 * EVENT.size)):
            if event[2] == EV_KEY:
                keys.append([event[3], event[4]])
    return {"keys": keys}


def net(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """ping, and iperf3 both ways, to the host."""
    card = next(path.name for path in Path("/sys/class/net").iterdir() if (path / "device").exists())
    subprocess.run(["busybox", "ifconfig", card, "10.9.0.2", "netmask", "255.255.255.0", "up"], check=True)
    if not args["offloads"]:
        whole_checksums(card)
    say(name, "up")
    ping = ["busybox", "ping", "-c", "5", "-w", "30", "10.9.0.1"]
    report: dict[str, Any] = {"ping": subprocess.run(ping, capture_output=True, check=False).returncode}
    for way, more in (("out", []), ("in", ["--reverse"])):
        done = iperf3("-c", "10.9.0.1", "-n", f"{args['megabytes']}M", *more)
        report[way] = min(done["end"]["sum_received"]["bytes"] // MIB, args["megabytes"])
        report[f"{way}_mbit"] = round(done["end"]["sum_received"]["bits_per_second"] / 1e6)
    return report


def whole_checksums(card: str) -> None:
    """The switch hands packets on as they are, so the checksums must be in them (ETHTOOL_STXCSUM)."""
    value = ctypes.create_string_buffer(struct.pack("=II", ETHTOOL_STXCSUM, 0))
    request = struct.pack("@16sQ16x", card.encode(), ctypes.addressof(value))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        fcntl.ioctl(sock, SIOCETHTOOL, request)  # refused where there is nothing to turn off


def iperf3(*options: str) -> dict[str, Any]:
    """What a run reports; the server may not be there yet, which is no status other than 0."""
    report: dict[str, Any] = {"error": "not run"}
    for _ in range(10):
        done = subprocess.run(["iperf3", "-J", *options], capture_output=True, check=False)
        report = json.loads(done.stdout)
        if "error" not in report:
            return report
        time.sleep(1)
    raise AssertionError(report["error"])


def gpu(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """A mode is set and a picture shown; the report is what the host must find on the display."""
    width, height = args["size"]
    row = bytes(channel for x in range(width) for channel in (x & 255, x >> 2 & 255, 255 - (x & 255), 0))
    picture = b"".join(row[:-4] + bytes((y & 255, y >> 2 & 255, 7, 0)) for y in range(height))
    kms.Display(args["card"]).show(picture, width, height)
    ask(name, "shown")  # the display belongs to whoever has it open
    return {"picture": digest([rgb(picture)])}


def frame(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """A backend without displays still takes the driver's buffers."""
    return {"frame": kms.Display(args["card"]).frame(bytes(64 * 64 * 4), 64, 64) > 0}


def rgb(pixels: bytes) -> bytes:
    """Red, green, blue from blue, green, red and nothing."""
    whole = bytearray(len(pixels) // 4 * 3)
    for colour in range(3):
        whole[2 - colour :: 3] = pixels[colour::4]
    return bytes(whole)


PROOFS: dict[str, Callable[[str, dict[str, Any]], dict[str, Any]]] = {
    proof.__name__: proof
    for proof in (
        fs,
        disk,
        readonly_disk,
        flush,
        rng,
        console,
        ports,
        vsock,
        sound,
        echo,
        i2c,
        gpio,
        keyboard,
        net,
        gpu,
        frame,
    )
}
