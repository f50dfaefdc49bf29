"""`scripts/bench startup`: how long until a guest runs, beside QEMU's microvm in the same run.

The guest of the first part is the own kernel with its entry overwritten: its first
instruction writes a byte to the serial port and its next ones halt.  So everything up to the
first guest instruction is measured as it is (a kernel of full size, 1 GiB of RAM, a virtio-fs
device with a real virtiofsd), on any KVM, one that emulates ring 0 too.  The second part boots
the real kernel to /init, and the third lets it idle there; where this host cannot, they run in
the lab.  Runs are interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from options import number

from pyvmm.boot import elf
from pyvmm.guest import cpio
from pyvmm.host import accel, backends, kernels

REACHED = b"\n"  # what the probe writes, and what /init writes
PROBE = bytes.fromhex("66baf803 b00a ee f4 ebfd")  # mov dx, 0x3f8; mov al, 10; out dx, al; hlt; jmp to hlt
INIT = r"""
#include <sys/mount.h>
#include <unistd.h>
int main(void)
{
    write(1, "reached /init\n", 14);
    if (mount("root", "/root", "virtiofs", MS_RDONLY, 0) == 0 && access("/root/bin", R_OK) == 0)
        write(1, "idle\n", 5);
    for (;;) pause();
}
"""
PYVMM = [str(Path(sys.executable).parent / "pyvmm")]
MACHINE = "microvm,accel=kvm,pcie=on,pit=off,pic=off,rtc=off,memory-backend=ram"
CMDLINE = "console=ttyS0 panic=-1 reboot=a tsc=reliable quiet"
DEADLINE = 240.0
SETTLE, IDLE_SECONDS = 2.0, 5.0
DEVNULL = subprocess.DEVNULL
Share = tuple[float, float]  # of a CPU, in percent: a process's main thread, its other threads
MONITOR = {"greets": b"QMP", "answers": b"prelaunch"}


def probe_kernel(kernel: str, target: Path) -> Path:
    """A copy of `kernel` whose PVH entry tells that it was reached."""
    data = bytearray(Path(kernel).read_bytes())
    fd = os.open(kernel, os.O_RDONLY)
    try:
        parsed = elf.parse(fd, kernel)
    finally:
        os.close(fd)
    assert parsed.pvh_entry is not None
    segment = next(s for s in parsed.loads if s.paddr <= parsed.pvh_entry < s.paddr + s.filesz)
    start = segment.offset + parsed.pvh_entry - segment.paddr
    data[start : start + len(PROBE)] = PROBE
    target.write_bytes(data)
    return target


def initramfs(folder: Path) -> Path:
    """An archive whose /init says so, mounts its files and waits."""
    source, program, archive = folder / "init.c", folder / "init", folder / "init.cpio"
    source.write_text(INIT)
    subprocess.run(["gcc", "-static", "-Os", "-o", program, source], check=True)
    entries = [cpio.directory("root"), cpio.directory("dev"), cpio.character("dev/console", 5, 1)]
    entries.append(cpio.regular("init", program.read_bytes(), 0o755))
    archive.write_bytes(cpio.archive(entries))
    return archive


@contextmanager
def file_server(path: Path) -> Iterator[int]:
    """Process id of a virtiofsd that listens at `path` already."""
    program = backends.find_virtiofsd()
    assert program is not None
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        argv = [program, f"--fd={listener.fileno()}", "-f", "-o", "log_level=err"]
        argv += ["-o", "source=/usr", "-o", "sandbox=chroot"]
        server = subprocess.Popen(argv, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.2)  # so that its own start is nobody's
        yield server.pid
    finally:
        server.kill()
        server.wait()


def pyvmm_argv(kernel: Path, memory: str, extra: list[str], sock: Path) -> list[str]:
    """pyvmm with one virtio-fs device and the serial port on standard output."""
    streams = ["--console", "off", "--serial", "tty", "--cmdline", CMDLINE]
    return [*_pyvmm(kernel, memory, sock), *streams, *extra]


def pyvmm_with_console_argv(kernel: Path, memory: str, extra: list[str], sock: Path) -> list[str]:
    """pyvmm with one virtio-fs device and its default console on standard output."""
    return [*_pyvmm(kernel, memory, sock), "--cmdline", CMDLINE.replace("ttyS0", "hvc0"), *extra]


def _pyvmm(kernel: Path, memory: str, sock: Path) -> list[str]:
    words = [*PYVMM, "--kernel", str(kernel), "--memory", f"size={memory}"]
    return [*words, "--fs", f"tag=root,socket={sock}"]


def qemu_argv(kernel: Path, memory: str, extra: list[str], sock: Path) -> list[str]:
    """QEMU's microvm with the same."""
    return [
        "qemu-system-x86_64", "-M", MACHINE, "-cpu", "host,-arch-capabilities", "-m", memory,
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-serial", "stdio", "-kernel", str(kernel), "-append", CMDLINE,
        "-object", f"memory-backend-memfd,id=ram,size={memory},share=on",
        "-chardev", f"socket,id=fs,path={sock}", "-device", "vhost-user-fs-pci,chardev=fs,tag=root", *extra,
    ]  # fmt: skip


class Started:
    """A VMM that has just said what it was started for; `seconds` since its exec."""

    def __init__(self, argv: list[str], mark: bytes = REACHED, cpus: int = 1, stdin: int = DEVNULL) -> None:
        self.argv, self.cpus = argv, cpus
        begin = time.monotonic()
        self.process = subprocess.Popen(argv, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._wait_for(mark, begin)
        self.seconds = time.monotonic() - begin

    def _wait_for(self, mark: bytes, begin: float) -> None:
        assert self.process.stdout is not None
        seen = b""
        while mark not in seen:
            left = begin + DEADLINE - time.monotonic()
            if not select.select([self.process.stdout], [], [], max(0, left))[0]:
                self.close()
                raise TimeoutError(f"{self.argv[0]} did not get there in {DEADLINE:g} s: {seen!r}")
            data = os.read(self.process.stdout.fileno(), 4096)
            if not data:
                raise RuntimeError(f"{self.argv[0]} ended: {self.close()}")
            seen += data

    def private_kib(self) -> float:
        """Proportional set size in KiB without the guest's RAM, which is a memfd of ours or theirs."""
        total = counted = 0
        for line in Path(f"/proc/{self.process.pid}/smaps").read_text().splitlines():
            if line[:1] in "0123456789abcdef" and ":" not in line.split()[0]:
                counted = "/memfd:" not in line
            elif line.startswith("Pss:") and counted:
                total += int(line.split()[1])
        return float(total)

    def other_threads(self) -> int:
        """Threads besides the virtual CPUs' and KVM's own, which live in the process too."""
        names = [path.read_text() for path in Path(f"/proc/{self.process.pid}/task").glob("*/comm")]
        return sum(not name.startswith("kvm-") for name in names) - self.cpus

    def idle_percent(self, seconds: float = 3.0) -> float:
        """CPU time used while the guest halts, of one CPU."""
        time.sleep(0.3)
        return sum(busy_percent([self.process.pid], seconds)[0])

    def close(self) -> str:
        """End it; returns what it said on standard error."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.communicate(timeout=20)[1].decode(errors="replace")[-2000:]
        finally:
            self.process.kill()


def busy_percent(pids: list[int], seconds: float) -> list[Share]:
    """CPU time that each process uses."""
    before = [_on_cpu(pid) for pid in pids]
    time.sleep(seconds)
    pairs = zip(before, map(_on_cpu, pids), strict=True)
    return [(100 * (new[0] - old[0]) / seconds, 100 * (new[1] - old[1]) / seconds) for old, new in pairs]


def _on_cpu(pid: int) -> tuple[float, float]:
    """Seconds on a CPU so far, of the main thread and of the others."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    times = {task.name: int((task / "schedstat").read_text().split()[0]) / 1e9 for task in tasks}
    return times.pop(str(pid)), sum(times.values())


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def monitor(argv: list[str], mark: bytes) -> float:
    """Seconds until QEMU's monitor says `mark`.

    It greets before there is a machine, with a kernel and devices that do not exist too; it
    answers once they are there.
    """
    with tempfile.TemporaryFile() as commands:
        commands.write(b'{"execute": "qmp_capabilities"} {"execute": "query-status"}\n')
        commands.seek(0)
        vmm = Started([*argv, "-S", "-qmp", "stdio", "-serial", "none"], mark, stdin=commands.fileno())
    vmm.close()
    return vmm.seconds


def first_instruction(folder: Path, runs: int) -> list[list[str]]:
    """Rows about a guest of 1 GiB up to its first instruction, and about what then stands there."""
    kernel = probe_kernel(kernels.find_kernel("own").path, folder / "probe.elf")
    sock = folder / "fs.sock"
    ours, theirs = (make(kernel, "1G", [], sock) for make in (pyvmm_argv, qemu_argv))
    greeting = [word for word in theirs if word not in ("-serial", "stdio")]
    times: dict[str, list[float]] = {name: [] for name in ("python", "pyvmm", "qemu", *MONITOR)}
    state: dict[str, list[float]] = {}
    for _ in range(runs):
        times["python"].append(_bare_interpreter())
        for name, argv in (("pyvmm", ours), ("qemu", theirs)):
            with file_server(sock):
                vmm = Started(argv)
                state[name] = [vmm.private_kib() / 1024, vmm.other_threads(), vmm.idle_percent(1.0)]
                times[name].append(vmm.seconds)
                vmm.close()
        for name, mark in MONITOR.items():
            with file_server(sock):
                times[name].append(monitor(greeting, mark))
    rows = [_row(f"exec to first guest instruction, {how.__name__}", times, how) for how in (min, _median)]
    for name in MONITOR:
        rows.append(_plain(f"QEMU's monitor {name}, median", "", _ms(_median(times[name]))))
    rows.append(_plain("the bare interpreter, median", f"{_ms(_median(times['python']))}", ""))
    for index, (what, unit) in enumerate(STATE):
        rows.append(_plain(what, f"{state['pyvmm'][index]:.1f}{unit}", f"{state['qemu'][index]:.1f}{unit}"))
    return rows


STATE = (
    ("proportional set size without guest RAM", " MiB"),
    ("threads besides the virtual CPU's", ""),
    ("CPU while the guest halts", " %"),
)


def to_init(folder: Path, runs: int) -> list[list[str]]:
    """Rows about the own kernel booted to /init."""
    kernel = Path(kernels.find_kernel("own").path)
    archive, sock = str(initramfs(folder)), folder / "fs.sock"
    lines = {
        "pyvmm": pyvmm_argv(kernel, "512M", ["--initramfs", archive], sock),
        "qemu": qemu_argv(kernel, "512M", ["-initrd", archive], sock),
    }
    times: dict[str, list[float]] = {name: [] for name in lines}
    for _ in range(runs):
        for name, argv in lines.items():
            with file_server(sock):
                vmm = Started(argv, b"reached /init")
                times[name].append(vmm.seconds)
                vmm.close()
    return [_row(f"exec to /init, {how.__name__}", times, how) for how in (min, _median)]


IDLE = ("main thread", "virtual CPU (other threads)", "console process", "virtiofsd")


def idle(folder: Path, _: int) -> list[list[str]]:
    """Rows about the own kernel that waits in /init, with files mounted; under both VMMs at once."""
    kernel, archive = Path(kernels.find_kernel("own").path), str(initramfs(folder))
    groups = []
    with ExitStack() as stack:
        for make, option in ((pyvmm_with_console_argv, "--initramfs"), (qemu_argv, "-initrd")):
            sock = folder / f"{make.__name__}.sock"
            server = stack.enter_context(file_server(sock))
            vmm = Started(make(kernel, "512M", [option, archive], sock), b"idle")
            stack.callback(vmm.close)
            groups.append([vmm.process.pid, server, *_children(vmm.process.pid)])
        time.sleep(SETTLE)
        shares = busy_percent([pid for group in groups for pid in group], IDLE_SECONDS)
    ours = _idle_column(*shares[: len(groups[0])])
    theirs = _idle_column(*shares[len(groups[0]) :])
    return [
        _plain(f"CPU while Linux idles, {name}", *row) for name, *row in zip(IDLE, ours, theirs, strict=True)
    ]


def _idle_column(vmm: Share, server: Share, *console: Share) -> list[str]:
    values = [vmm[0], vmm[1], sum(sum(share) for share in console) if console else None, sum(server)]
    return ["" if value is None else f"{value:.2f} %" for value in values]


def in_the_lab(parts: list[str], runs: int) -> list[list[str]]:
    """These parts, by this program inside the emulated machine."""
    options = ["--only", *parts, "--json", "--runs", str(runs)]
    argv = [*PYVMM, "lab", "--", sys.executable, "-P", __file__, *options]
    done = subprocess.run(argv, stdout=subprocess.PIPE, check=True)
    rows: list[list[str]] = json.loads(done.stdout)
    return [[f"in the lab: {row[0]}", *row[1:]] for row in rows]


def _bare_interpreter() -> float:
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.monotonic() - begin


def _median(values: list[float]) -> float:
    return statistics.median(values)


_median.__name__ = "median"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _row(what: str, times: dict[str, list[float]], how: Callable[[list[float]], float]) -> list[str]:
    ours, theirs = how(times["pyvmm"]), how(times["qemu"])
    return [what, _ms(ours), _ms(theirs), f"{ours / theirs:.2f}"]


def _plain(what: str, ours: str, theirs: str) -> list[str]:
    return [what, ours, theirs, ""]


PARTS = {"first": first_instruction, "init": to_init, "idle": idle}


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench startup", description=__doc__.split("\n\n", maxsplit=1)[0]
    )
    parser.add_argument("--runs", type=number, default=10, help="how often each is started (default 10)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts only")
    parser.add_argument("--json", action="store_true", help="rows as JSON, for programs")
    given = parser.parse_args()
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as name:
        folder = Path(name)
        needs_lab = not os.environ.get(accel.LAB_MARK) and accel.why_not()
        elsewhere = [part for part in given.only if part != "first"] if needs_lab else []
        for part in given.only:
            if part not in elsewhere:
                rows += PARTS[part](folder, given.runs)
        if elsewhere:
            rows += in_the_lab(elsewhere, max(1, given.runs // 4))
    if given.json:
        print(json.dumps(rows))
    else:
        print("| figure | pyvmm | QEMU microvm | ratio |\n|---|---|---|---|")
        for row in rows:
            print("| " + " | ".join(row) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
