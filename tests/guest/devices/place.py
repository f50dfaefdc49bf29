"""One row's place on the host: its directory, its words for pyvmm, and what this host must have for it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from guest.devices.rows import Row

from pyvmm.guest.modules import ModuleTree
from pyvmm.host import backends, kernels

LIMIT = 200  # seconds for the guest


class Place:
    """One row's directory on the host, its processes, and what is said about it."""

    def __init__(self, row: Row, folder: Path) -> None:
        self.row = row
        self.dir = folder / row.name
        self.results = folder / "results"
        self.report: dict[str, Any] = {}
        self.uhid = -1
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

    def seen(self, word: str) -> None:
        """Answer the guest that asked with this word."""
        (self.results / f"{self.row.name}.{word}.seen").touch()

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
        programs = backends.find_programs("virtiofsd")
        return next((path for path in programs if not backends.is_c_virtiofsd(path)), None)
    if os.path.isabs(name):
        return name if os.access(name, os.X_OK) else None
    return backends.find_program(name)


def load_module(name: str) -> bool:
    """Whether this host's kernel has a module, loaded now; in the lab it is not in /lib/modules."""
    places = [f"/lib/modules/{os.uname().release}", *(kernel.modules for kernel in kernels.find_kernels())]
    trees = [place for place in places if place and os.uname().release in place]
    tree = next((place for place in trees if os.path.isdir(f"{place}/kernel")), None)  # headers have none
    if tree is None or not ModuleTree(tree).has(name):
        return False
    for module, contents in ModuleTree(tree).resolve([name]):
        with tempfile.NamedTemporaryFile(suffix=f"-{module}.ko") as file:
            file.write(contents)
            file.flush()
            subprocess.run(["busybox", "insmod", file.name], capture_output=True, check=False)
    return True


def why_not(row: Row) -> str:
    """What this host lacks for a row."""
    program = row.backend[0].replace("{python}", sys.executable) if row.backend else ""
    if program and find_program(program) is None:
        return f"{row.name}: {program} is not installed; scripts/backends installs it"
    for module in row.modules:
        if not load_module(module):
            return f"{row.name}: this host's kernel has no {module}"
    return ""
