"""The linters and the type checker find nothing; shell scripts parse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.source import ROOT

BIN = Path(sys.executable).parent
TOOLS = {
    "ruff check": ("ruff", "check", "--no-cache"),
    "ruff format": ("ruff", "format", "--no-cache", "--check"),
    "mypy": ("mypy", "--strict", "pyvmm"),
    "cython-lint": ("cython-lint", "native"),
}


@pytest.mark.parametrize("name", TOOLS)
def test_linter(name: str) -> None:
    program, *arguments = TOOLS[name]
    if not (BIN / program).exists():
        pytest.skip(f"{program} is not installed beside this Python: pip install {program}")
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}  # cython-lint starts pycodestyle
    done = subprocess.run(
        [BIN / program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def scripts() -> list[Path]:
    folders = (ROOT / "scripts", ROOT / ".ci")
    return [
        path for folder in folders if folder.exists() for path in sorted(folder.iterdir()) if path.is_file()
    ]


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_scripts_parse_and_can_be_run(path: Path) -> None:
    first = path.read_text().partition("\n")[0]
    if path.suffix != ".sh":
        assert os.access(path, os.X_OK)
        assert first.startswith(("#!/bin/sh", "#!/usr/bin/env bash", "#!/usr/bin/env python3"))
    if "python" in first:
        compile(path.read_text(), str(path), "exec")
    else:
        shell = "sh" if first.endswith("/sh") else "bash"
        done = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
