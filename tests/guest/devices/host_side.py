"""The host's side of the device tests, next to a KVM that runs guests: one boot, many devices.

Usage: host_side KERNEL BOOT.  It starts the backend of each row, boots one guest with all of
them, serves the host's ends while the guest's side runs, looks at what is left, and prints
`{row: {"guest": report, "host": report, "log": text} or {"skip": reason}}` as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from guest.devices import rows
from guest.devices.guest_side import MIB, blocks, digest, listing, numbered, received, sent
from guest.devices.rows import Row

from pyvmm import cache
from pyvmm.guest.modules import ModuleTree
from pyvmm.host import backends, kernels

LIMIT = 240  # seconds for the guest
SHARE = "/mnt/results"
# Not busybox's shell: it would run /proc/self/exe, which before /proc is mounted is the file server's.
INIT = """#!/bin/sh
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmp /run; mount -t tmpfs tmp /mnt
busybox ifconfig lo 127.0.0.1 up
mkdir {share}; mount -t virtiofs results {share}
cd /run; RESULTS={share} PYTHONPATH={tests} {python} -P -m guest.devices.guest_side >{share}/guest.log 2>&1
sync
busybox poweroff -f
"""


class Place:
    """One row's directory on the host, its processes, and what is said about it."""

    def __init__(self, row: Row, folder: Path) -> None:
        self.row = row
        self.dir = folder / row.name
        self.results = folder / "results"
        self.report: dict[str, Any] = {}
        self.machine: subprocess.Popen[bytes] | None = None
        self.dir.mkdir()

    @property
    def sock(self) -> str:
        """Where the backend listens."""
        return f"{self.dir}/s{self.row.suffix}"

    @property
    def image(self) -> Path:
        """The row's disk image."""
        return self.dir / "image"

    def fill(self, text: str) -> str:
        """A word of the table with its places filled in."""
        return text.format(
            sock=f"{self.dir}/s", dir=self.dir, image=self.image, python=sys.executable, name=self.row.name
        )

    def wait_for(self, word: str) -> None:
        """Until the guest says so."""
        wait_for_path(self.results / f"{self.row.name}.{word}")

    def words(self) -> list[str]:
        """What pyvmm is told about this device."""
        if self.row.words:
            return [self.fill(word) for word in self.row.words]
        return ["--generic-vhost-user", f"socket={self.sock},{self.fill(self.row.option)}"]


def wait_for_path(path: Path | str, seconds: float = LIMIT) -> None:
    """Until something exists."""
    end = time.monotonic() + seconds
    while not os.path.exists(path):
        if time.monotonic() > end:
            raise TimeoutError(f"{path} did not appear")
        time.sleep(0.02)


def find_program(name: str) -> str | None:
    """A backend's path; `rust-virtiofsd` is the one in Rust, wherever it is."""
    if name == "rust-virtiofsd":
        places = (
            cache.directory("backends", "bin", "virtiofsd"),
            os.path.expanduser("~/.cargo/bin/virtiofsd"),
        )
        return next((path for path in places if os.access(path, os.X_OK)), None)
    if os.path.isabs(name):
        return name if os.access(name, os.X_OK) else None
    return backends.find_program(name)


def load_module(name: str) -> bool:
    """Whether this host's kernel has a module, loaded now; in the lab it is not in /lib/modules."""
    places = [f"/lib/modules/{os.uname().release}", *(kernel.modules for kernel in kernels.find_kernels())]
    tree = next(
        (place for place in places if place and os.uname().release in place and os.path.isdir(place)), None
    )
    if tree is None or not ModuleTree(tree).has(name):
        return False
    for module, contents in ModuleTree(tree).resolve([name]):
        with tempfile.NamedTemporaryFile(suffix=f"-{module}.ko") as file:
            file.write(contents)
            file.flush()
            subprocess.run(["busybox", "insmod", file.name], capture_output=True, check=False)
    return True


# -- before: what a row's backend serves -------------------------------------------------


def prepare_fs(place: Place) -> None:
    """A file system that has everything, in a file."""
    folder, image = place.dir / "fs", place.image
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(512 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", "-E", "lazy_itable_init=1", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    with (folder / "in").open("wb") as file:
        place.report["in"] = digest(save_all(file, numbered(place.row.args["megabytes"])))
    os.setxattr(folder / "in", "user.from-host", b"set on the host")
    place.report["xattr"] = b"set on the host".hex()


def save_all(file: Any, chunks: Any) -> Iterator[bytes]:
    """Write what passes through."""
    for chunk in chunks:
        file.write(chunk)
        yield chunk


def prepare_disk(place: Place) -> None:
    """An image that begins with known bytes."""
    args = place.row.args
    raw = place.dir / "raw" if args.get("format") else place.image
    with raw.open("wb") as file:
        place.report["in"] = digest(save_all(file, numbered(4)))
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


# -- meanwhile: the host's end of the wire -----------------------------------------------


def talk_console(place: Place) -> None:
    """The backend's TCP port."""
    place.wait_for("ready")
    with socket.create_connection(("127.0.0.1", 12345)) as sock:
        place.report |= host_end(sock, place.row.args["bytes"])


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
    place.report["out"] = digest(blocks(folder / "out"))
    place.report["storm"] = listing(folder / "storm")
    place.report["mapped"] = digest(blocks(folder / "mapped"))
    place.report["xattr_back"] = os.getxattr(folder / "out", "user.from-guest").hex()


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
}
NO_STEPS = (nothing, nothing, nothing)


# -- one boot ----------------------------------------------------------------------------


class Boot:
    """The rows of one boot, from preparation to the end of every process."""

    def __init__(self, kernel: str, boot: str, folder: Path) -> None:
        self.kernel = kernel
        self.folder = folder
        self.outcome: dict[str, Any] = {}
        self.places: list[Place] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        (folder / "results").mkdir()
        for row in rows.ROWS:
            if row.boot == boot:
                self._add(row)

    def _add(self, row: Row) -> None:
        reason = why_not(row)
        if reason:
            self.outcome[row.name] = {"skip": reason}
            return
        place = Place(row, self.folder)
        STEPS.get(row.proof, NO_STEPS)[0](place)
        self.places.append(place)

    def run(self) -> None:
        """Start the backends, boot, talk, wait, inspect."""
        try:
            for place in self.places:
                self._start_backend(place)
            machine = self._start_machine()
            threads = [self._talk(place, machine) for place in self.places]
            try:
                status: int | str = machine.wait(LIMIT)
            except subprocess.TimeoutExpired:
                machine.terminate()
                status = f"ended after {LIMIT} s; {machine.wait(30)}"
            for thread in threads:
                thread.join(5)
        finally:
            self._end()
        self.outcome["machine"] = {"status": status, "log": self._log()}
        for place in self.places:
            self.outcome[place.row.name] = self._inspect(place)

    def _start_backend(self, place: Place) -> None:
        row = place.row
        if not row.backend:
            return
        program = find_program(row.backend[0].replace("{python}", sys.executable))
        assert program is not None
        argv = [program, *(place.fill(word) for word in row.backend[1:])]
        with (place.dir / "log").open("wb") as log:
            process = subprocess.Popen(argv, stdout=log, stderr=log, env={**os.environ, **dict(row.env)})
        self._processes.append(process)

    def _start_machine(self) -> subprocess.Popen[bytes]:
        results = self.folder / "results"
        wanted = [{"name": place.row.name, "proof": place.row.proof, "args": place.row.args}
                  for place in self.places]  # fmt: skip
        (results / "rows.json").write_text(json.dumps(wanted))
        init = self.folder / "init"
        tests = str(Path(__file__).parents[2])
        init.write_text(INIT.format(share=SHARE, tests=tests, python=sys.executable))
        init.chmod(0o755)
        argv = [sys.executable, "-P", "-m", "pyvmm", "boot", "--kernel", self.kernel, "--cpus", "boot=4"]
        argv += ["--memory", "size=768M", "--console", "off", "--serial", f"file={self.folder}/serial"]
        argv += ["--connect-timeout", "60", "--deadline", "30", "--no-reboot"]
        argv += ["--fs", "tag=root,dir=/,readonly=on,cache=always", "--fs", f"tag=results,dir={results}"]
        argv += [word for place in self.places for word in place.words()]
        argv += ["--cmdline", f"console=ttyS0 panic=-1 quiet root=root rootfstype=virtiofs ro init={init}"]
        with (self.folder / "pyvmm.log").open("wb") as log:
            machine = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._processes.insert(0, machine)
        return machine

    def _talk(self, place: Place, machine: subprocess.Popen[bytes]) -> threading.Thread:
        def talk() -> None:
            try:
                STEPS.get(place.row.proof, NO_STEPS)[1](place)
            except BaseException:
                place.report["error"] = traceback.format_exc()

        place.machine = machine
        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        return thread

    def _inspect(self, place: Place) -> dict[str, Any]:
        path = place.results / f"{place.row.name}.json"
        guest = json.loads(path.read_text()) if path.exists() else {"error": "the guest reports nothing"}
        try:
            STEPS.get(place.row.proof, NO_STEPS)[2](place, guest)
        except BaseException:
            place.report["error"] = traceback.format_exc()
        logs = [place.dir / "log", place.results / f"{place.row.name}.fio"]
        return {"guest": guest, "host": place.report, "log": "".join(map(tail, logs))}

    def _end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _log(self) -> str:
        names = ("pyvmm.log", "serial", "results/guest.log")
        return "\n".join(f"--- {name}\n{tail(self.folder / name)}" for name in names)

    def close(self) -> None:
        """Undo the mounts."""
        for place in self.places:
            if os.path.ismount(place.dir / "fs"):
                subprocess.run(["umount", "-l", place.dir / "fs"], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def tail(path: Path) -> str:
    """The end of a log."""
    return path.read_text(errors="replace")[-3000:] if path.exists() else ""


def why_not(row: Row) -> str:
    """What this host lacks for a row."""
    program = row.backend[0].replace("{python}", sys.executable) if row.backend else ""
    if program and find_program(program) is None:
        return f"{row.name}: {program} is not installed; scripts/backends installs it"
    for module in row.modules:
        if not load_module(module):
            return f"{row.name}: this host's kernel has no {module}"
    return ""


def main() -> None:
    """Run one boot."""
    kernel, name = sys.argv[1:]
    boot = Boot(kernel, name, Path(tempfile.mkdtemp(dir="/run", prefix="devices-")))
    try:
        subprocess.run(["busybox", "ifconfig", "lo", "127.0.0.1", "up"], check=False)
        boot.run()
    finally:
        boot.close()
    print(json.dumps(boot.outcome))


if __name__ == "__main__":
    main()
