"""What a wheel holds is what git tracks: the explicit lists of the Meson files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tracked(*patterns):
    command = ["git", "-C", str(ROOT), "ls-files", "--", *patterns]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


@pytest.fixture(autouse=True)
def checkout():
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")


TREES = {
    "pyvmm": ("*.py", "*.pyi", "*.typed"),
    "guest-images": ("*.c", "*.h", "*/config"),
}


@pytest.mark.parametrize("tree", TREES)
def test_every_tracked_source_is_installed(tree):
    text = (ROOT / tree / "meson.build").read_text()
    listed = re.findall(r"^    '(.+)',$", text, re.MULTILINE)
    assert len(listed) == len(set(listed))
    wanted = tracked(*(f"{tree}/{pattern}" for pattern in TREES[tree]))
    assert {f"{tree}/{path}" for path in listed} == wanted, "run scripts/list-sources and commit its result"


@pytest.mark.parametrize(("tree", "target"), [("pyvmm", "pyvmm"), ("guest-images", "pyvmm/guest/images")])
def test_every_source_is_installed_in_the_folder_that_it_comes_from(tree, target):
    text = (ROOT / tree / "meson.build").read_text()
    for block, folder in re.findall(r"py\.install_sources\((.*?)subdir: '(.+?)'", text, re.DOTALL):
        folders = {os.path.dirname(f"{target}/{path}") for path in re.findall(r"'(.+?)',", block)}
        assert folders == {folder}


def test_every_extension_has_a_row_and_a_stub():
    text = (ROOT / "native" / "meson.build").read_text()
    rows = re.findall(r"^  '(\w+)',$", text, re.MULTILINE)
    assert rows == sorted(rows)
    assert {f"native/{name}.pyx" for name in rows} == tracked("native/*.pyx")
    stubs = {f"pyvmm/_native/{name}.pyi" for name in rows}
    assert stubs == tracked("pyvmm/_native/*.pyi")


def test_the_lists_are_as_the_script_writes_them():
    script = ROOT / "scripts" / "list-sources"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0


def test_the_command_starts_without_slow_imports():
    """pip writes the interpreter into a script that begins with `#!python`, and nothing else."""
    text = (ROOT / "bin" / "pyvmm").read_text()
    assert text.startswith("#!python\n")
    loaded = re.findall(r"^[ \t]*(?:import|from) .*", text, re.MULTILINE)
    assert loaded == ["import _signal", "from pyvmm.cli import main"]
    assert "bin/pyvmm" in tracked("bin/*")
