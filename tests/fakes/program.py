"""The program as its users start it: real processes, and proof that nothing of them stays.

`Program` runs `python -m pyvmm` in a directory of its own.  This process becomes the reaper of
orphans, so that a backend that outlives its VMM is seen however it detached itself.
"""

from __future__ import annotations

import ctypes
import functools
import os
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pyvmm

PR_SET_CHILD_SUBREAPER = 36
LIMIT = 30.0  # seconds for whatever should take less than one
POWER_OFF = bytes.fromhex("66ba0006 b034 ee ebfe")  # mov dx, 0x600; mov al, 0x34; out dx, al; jmp $
RESTART = bytes.fromhex("66ba0406 b001 ee ebfe")  # mov dx, 0x604; mov al, 1; out dx, al; jmp $
SPIN = bytes.fromhex("ebfe")
ENTRY = 0x10_0000


def pvh_elf(code: bytes = POWER_OFF, *, base: int = ENTRY, memory: int = 0x1000) -> bytes:
    """A vmlinux of one segment: `code`, entered by PVH in 32-bit protected mode at `base`."""
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", base)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0x200, base, base, len(code), memory, 4)
    notes = struct.pack("<IIQQQQQQ", 4, 4, 0x100, 0, 0, len(note), len(note), 4)
    return ((header + load + notes).ljust(0x100, b"\0") + note).ljust(0x200, b"\0") + code


@functools.cache
def environment() -> dict[str, str]:
    """This process's environment, in which `python -m pyvmm` finds the pyvmm under test."""
    env = dict(os.environ)
    found = subprocess.run([sys.executable, "-P", "-c", "import pyvmm"], capture_output=True, check=False)
    if found.returncode:
        env["PYTHONPATH"] = os.path.dirname(os.path.dirname(pyvmm.__file__))
    return env


def reap_orphans(wanted: bool) -> None:
    """Become the parent of every descendant whose own parent ends, or leave them to others."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)


def children(parent: int = 0) -> set[int]:
    """Process ids of the children of `parent` (default: this process), zombies too.

    Not from /proc/PID/task/*/children, which may leave some out while others end (proc(5)).
    """
    wanted = parent or os.getpid()
    return {int(name) for name in os.listdir("/proc") if name.isdigit() and _parent(name) == wanted}


def _parent(pid: str) -> int:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(text.rpartition(")")[2].split()[1])


def end_children(pids: set[int]) -> None:
    """Kill these children of ours and reap them."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def describe(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        command = "gone"
    return f"{pid}: {command or 'zombie'}"


class Program:
    """One run in `folder`; give it to `with`, which ends it whatever happens."""

    def __init__(self, folder: Path, *argv: str, **options: object) -> None:
        reap_orphans(True)
        self.folder = folder
        self.before = children()
        self.begin = time.time() - 1  # files' times are those of a coarser clock
        self.files = self._listing()
        env = {**environment(), "XDG_CACHE_HOME": str(folder / "cache"), **options.pop("env", {})}  # type: ignore[dict-item]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(
            [*options.pop("under", ()), sys.executable, "-P", "-m", "pyvmm", *argv],  # type: ignore[misc]
            cwd=folder, env=env, **{**streams, **options},  # type: ignore[call-overload]
        )  # fmt: skip
        self.stdout = self.stderr = b""

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        try:
            self.finish()  # fails where a backend that was left behind holds a pipe open
        finally:
            while left := children() - self.before:  # the children of those that are killed come to us
                end_children(left)
            reap_orphans(False)

    def finish(self) -> int:
        """Wait for the end; the exit status as a shell counts it.  `stdout` and `stderr` hold the rest."""
        if not self._closed():
            stdout, stderr = self.process.communicate(timeout=LIMIT)
            self.stdout += stdout or b""
            self.stderr += stderr or b""
        code = self.process.wait(LIMIT)
        return code if code >= 0 else 128 - code

    def _closed(self) -> bool:
        pipes = [pipe for pipe in (self.process.stdout, self.process.stderr) if pipe is not None]
        return bool(pipes) and all(pipe.closed for pipe in pipes)

    def await_stderr(self, text: bytes) -> None:
        """Read standard error until `text` has appeared."""
        pipe = self.process.stderr
        assert pipe is not None
        due = time.monotonic() + LIMIT
        while text not in self.stderr:
            left = due - time.monotonic()
            assert left > 0 and select.select([pipe], [], [], left)[0], f"no {text!r}: {self.stderr!r}"
            data = os.read(pipe.fileno(), 65536)
            assert data, f"ended without {text!r}: {self.stderr!r}"
            self.stderr += data

    def descendants(self) -> set[int]:
        """Process ids of what the program has started by now."""
        return children(self.process.pid)

    def await_descendants(self, count: int) -> set[int]:
        """Wait until `count` of them are there."""
        due = time.monotonic() + LIMIT
        while len(found := self.descendants()) < count:
            assert time.monotonic() < due and self.process.poll() is None, f"only {found}"
            time.sleep(0.005)
        return found

    def check_gone(self, seconds: float = 0.0) -> None:
        """No process and no file of the run is left; orphans get `seconds` to end."""
        due = time.monotonic() + seconds
        while left := children() - self.before - {self.process.pid}:
            for pid in left:
                os.waitpid(pid, os.WNOHANG)
            assert time.monotonic() <= due, f"left behind: {[describe(pid) for pid in left]}"
            time.sleep(0.01)
        assert self._listing() == self.files

    def _listing(self) -> set[str]:
        """Every file in the folder but caches, and what this process made in /tmp."""
        found = {str(path) for path in self.folder.rglob("*") if "cache" not in path.parts}
        found |= {str(path) for path in (self.folder / "cache").rglob("*.part")}
        found |= {str(path) for path in (self.folder / "cache").rglob(".unpacking*")}
        process = getattr(self, "process", None)
        if process is not None:
            named = Path("/tmp").glob(f"pyvmm-{process.pid}-*")  # a killed one may have had that number
            found |= {str(path) for path in named if path.stat().st_mtime > self.begin}
        return found


def run(folder: Path, *argv: str, **options: object) -> tuple[int, str, str]:
    """Run to the end; exit status, standard output and standard error.  Nothing may stay."""
    with Program(folder, *argv, **options) as program:
        status = program.finish()
        program.check_gone()
    return status, program.stdout.decode(), program.stderr.decode()
