"""The guest's side of the device tests: the first process's only child runs each row's proof.

$RESULTS is a writable directory shared with the host.  It holds `rows.json`, what to prove, and
gets `NAME.json` for each row.  A proof is a function of the row's name and
arguments that moves data through the device with the guest's own driver and reports what it
saw.  Each runs in a process of its own with a time limit, so that one device cannot stop
the others.
"""

from __future__ import annotations

import array
import errno
import hashlib
import json
import mmap
import os
import signal
import socket
import subprocess
import time
import traceback
import tty
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guest.devices import pci_driver

MIB = 1 << 20
BLOCK = MIB
LIMIT = 120  # seconds for one proof
FIO = ("fio", "--name=verify", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--thread",
       "--rw=randwrite", "--bs=16k", "--size=4M", "--randrepeat=0")  # fmt: skip

RESULTS = Path(os.environ.get("RESULTS", "."))


# -- what proofs share -----------------------------------------------------------------


def digest(chunks: Any) -> str:
    """A checksum of an iterable of bytes."""
    total = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        total.update(chunk)
    return total.hexdigest()


def blocks(path: str | Path, size: int = -1, offset: int = 0) -> Any:
    """The bytes of a file or device, in blocks."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while size and (chunk := file.read(BLOCK if size < 0 else min(size, BLOCK))):
            size -= len(chunk) if size > 0 else 0
            yield chunk


def numbered(megabytes: int, block: bytes | None = None) -> Any:
    """Random blocks that all differ, cheap to make."""
    block = block or os.urandom(BLOCK - 8)
    for number in range(megabytes):
        yield number.to_bytes(8, "little") + block


def received(sock: socket.socket, size: int) -> Any:
    """Exactly `size` bytes of a stream, as they arrive."""
    while size:
        chunk = sock.recv(min(size, BLOCK))
        if not chunk:
            raise EOFError(f"{size} bytes are missing")
        size -= len(chunk)
        yield chunk


def sent(sock: socket.socket, chunks: Any) -> Any:
    """Send what passes through."""
    for chunk in chunks:
        sock.sendall(chunk)
        yield chunk


def fio(name: str, *options: str) -> int:
    """fio writes and verifies; its exit status."""
    done = subprocess.run([*FIO, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        (RESULTS / f"{name}.fio").write_text(done.stdout + done.stderr)
    return done.returncode


def say(name: str, word: str) -> None:
    """Tell the host's side that something is so now."""
    (RESULTS / f"{name}.{word}").touch()


# -- one proof for each kind of device --------------------------------------------------


def fs(name: str, args: dict[str, Any]) -> dict[str, Any]:
    """Checksums both ways, fio, many small changes, extended attributes, a shared mapping."""
    root = Path("/mnt") / name
    root.mkdir()
    subprocess.run(["mount", "-t", "virtiofs", name, root], check=True)
    os.chdir(root)
    report: dict[str, Any] = {"in": digest(blocks("in"))}
    with open("out", "wb", buffering=0) as file:
        report["out"] = digest(written(file, numbered(args["megabytes"])))
        os.fsync(file.fileno())
    report["fio"] = fio(name, f"--directory={root}", "--ioengine=psync")
    report["storm"] = storm(args["files"])
    os.setxattr("out", "user.from-guest", b"set in the guest\0")
    report["xattr"] = os.getxattr("in", "user.from-host").hex()
    report["xattr_back"] = b"set in the guest\0".hex()
    report["mapped"] = mapped("mapped")
    os.chdir("/")
    subprocess.run(["umount", root], check=True)
    return report


def written(file: Any, chunks: Any) -> Any:
    """Write what passes through."""
    for chunk in chunks:
        assert file.write(chunk) == len(chunk)
        yield chunk


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


def listing(folder: str | Path) -> list[str]:
    """Names, modes, sizes, link counts and targets."""
    rows = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        status = entry.stat(follow_symlinks=False)
        target = os.readlink(entry.path) if entry.is_symlink() else ""
        rows.append(f"{entry.name} {status.st_mode:o} {status.st_size} {status.st_nlink} {target}")
    return rows


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
    """The terminal hvc0 carries bytes both ways."""
    fd = os.open("/dev/hvc0", os.O_RDWR | os.O_NOCTTY)
    tty.setraw(fd)
    return exchanged(name, fd, args["bytes"])


def exchanged(name: str, fd: int, size: int) -> dict[str, Any]:
    """Read so many bytes, then write as many others."""
    say(name, "ready")
    data = b""
    while len(data) < size:
        data += os.read(fd, size - len(data))
    out = os.urandom(size)
    view = memoryview(out)
    while view:
        view = view[os.write(fd, view) :]
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


PROOFS: dict[str, Callable[[str, dict[str, Any]], dict[str, Any]]] = {
    proof.__name__: proof
    for proof in (fs, disk, readonly_disk, flush, rng, console, ports, vsock, sound, echo)
}


# -- running them ----------------------------------------------------------------------


def save(name: str, report: dict[str, Any]) -> None:
    """Hand a report to the host, whole or not at all."""
    path = RESULTS / f"{name}.part"
    path.write_text(json.dumps(report))
    path.rename(RESULTS / f"{name}.json")


def prove(row: dict[str, Any]) -> None:
    """One row, in a process of its own."""
    begin = time.monotonic()
    try:
        report = PROOFS[row["proof"]](row["name"], row["args"])
    except BaseException:
        report = {"error": traceback.format_exc()}
    save(row["name"], report | {"seconds": round(time.monotonic() - begin, 2)})


def limited(row: dict[str, Any]) -> None:
    """`prove` with a time limit."""
    pid = os.fork()
    if not pid:
        signal.alarm(LIMIT)
        prove(row)
        os._exit(0)
    os.waitpid(pid, 0)
    if not (RESULTS / f"{row['name']}.json").exists():
        save(row["name"], {"error": f"no result after {LIMIT} s"})


def main() -> None:
    """Prove every row."""
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    console_fd = os.open("/dev/kmsg", os.O_WRONLY)
    for row in json.loads((RESULTS / "rows.json").read_text()):
        os.write(console_fd, f"device tests: {row['name']}\n".encode())
        limited(row)


if __name__ == "__main__":
    main()
