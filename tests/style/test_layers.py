"""The drawing of layers in docs/architecture.md is what the imports say, and start-up stays short."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from fakes.source import ROOT, imports, modules

# Each costs a guest's start more than it gives: see CONTRIBUTING.md
SLOW = {
    *("argparse", "ast", "asyncio", "concurrent", "copy", "dataclasses", "datetime", "difflib", "glob"),
    *("hashlib", "importlib", "inspect", "json", "logging", "multiprocessing", "numpy", "pathlib"),
    *("platform", "random", "re", "shutil", "subprocess", "tempfile", "textwrap", "traceback", "typing"),
    *("typing_extensions", "urllib", "uuid", "lz4", "zstandard"),
}
# What `pyvmm run` and `pyvmm boot` load, in this process or in one forked from it.
BOOT_PATH = (
    *("pyvmm.cli.run", "pyvmm.cli.boot", "pyvmm.run", "pyvmm.vm", "pyvmm.host.accel", "pyvmm.host.children"),
    *("pyvmm.backend.console", "pyvmm.backend.server", "pyvmm.backend.rng"),
)
NATIVE_USERS = (
    *("pyvmm.vm", "pyvmm.machine", "pyvmm.board", "pyvmm.vcpus"),
    *("pyvmm.host.", "pyvmm.backend.", "pyvmm._native"),
)
NATIVE_AT_LOAD = ("pyvmm.backend.", "pyvmm._native")
OURS = [name for name in modules() if name != "pyvmm" and not name.startswith("pyvmm._native")]


def drawing() -> list[list[str]]:
    """The rows of the block under the heading `Import layers`, names below pyvmm."""
    text = (ROOT / "docs/architecture.md").read_text()
    block = text.partition("## Import layers")[2].split("```")[1]
    return [row.split() for row in block.strip().splitlines()]


def place(name: str) -> tuple[int, str]:
    """Row and the drawn name that covers a module: the longest one wins."""
    best = (-1, "")
    for index, row in enumerate(drawing()):
        for drawn in row:
            if f"{name}.".startswith(f"pyvmm.{drawn}.") and len(drawn) > len(best[1]):
                best = (index, drawn)
    return best


@pytest.mark.parametrize("name", OURS)
def test_imports_go_up(name: str) -> None:
    row, drawn = place(name)
    assert row >= 0, f"{name} has no place in docs/architecture.md"
    for target in sorted({entry.name for entry in imports(name) if entry.name in OURS}):
        other_row, other = place(target)
        same_room = other.partition(".")[0] == drawn.partition(".")[0]
        assert other_row < row or (other_row == row and same_room), f"{name} imports {target}"


def test_every_name_in_the_drawing_exists() -> None:
    for drawn in (name for row in drawing() for name in row):
        assert f"pyvmm.{drawn}" in modules(), drawn


@pytest.mark.parametrize("name", OURS)
def test_the_compiled_core_is_imported_where_it_may_be(name: str) -> None:
    for entry in imports(name):
        if entry.name.startswith("pyvmm._native"):
            assert name.startswith(NATIVE_USERS), f"{name} imports {entry.name}"
            late = not entry.top or entry.types
            assert late or name.startswith(NATIVE_AT_LOAD), f"{name} imports {entry.name} as it loads"


def test_the_compiled_core_knows_errors_only() -> None:
    for path in sorted((ROOT / "native").glob("*.pyx")):
        for target in re.findall(r"^\s*(?:from|import)\s+(pyvmm[\w.]*)", path.read_text(), re.MULTILINE):
            assert target == "pyvmm.errors" or target.startswith("pyvmm._native."), f"{path.name}: {target}"


def loaded(roots: tuple[str, ...]) -> set[str]:
    """The modules of ours that load with `roots`."""
    seen: set[str] = set()
    todo = list(roots)
    while todo:
        name = todo.pop()
        if name in modules() and name not in seen:
            seen.add(name)
            todo += [entry.name for entry in imports(name) if entry.top and not entry.types]
            todo.append(name.rpartition(".")[0])
    return seen


@pytest.mark.parametrize("name", sorted(loaded(BOOT_PATH)))
def test_the_boot_path_imports_nothing_slow(name: str) -> None:
    slow = {entry.name for entry in imports(name) if entry.top and not entry.types}
    assert not {target for target in slow if target.partition(".")[0] in SLOW}


def test_the_interpreter_agrees() -> None:
    """What is really loaded, indirectly too, beyond what an empty program loads."""
    code = (
        "import sys; before = set(sys.modules); import pyvmm.cli.run, pyvmm.cli.boot, pyvmm.run;"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    assert "pyvmm.vm" in done.stdout.split()
    assert not SLOW & set(done.stdout.split())
