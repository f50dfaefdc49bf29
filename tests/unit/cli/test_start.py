"""Ctrl-C while the program is still being loaded: the script, with a `pyvmm` that loads for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.source import ROOT

STARTS = {"script": [str(ROOT / "bin" / "pyvmm")], "module": ["-m", "pyvmm"]}
SLOW = """
import os, signal, time
os.write(1, b"loading")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    raise SystemExit(42)
time.sleep(60)
"""


def loading(folder: Path, start: str, **options: object) -> subprocess.Popen[bytes]:
    """The program, which has come to `from pyvmm.cli import main`; -S: without an installed pyvmm."""
    package = folder / "pyvmm"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(SLOW)
    for name in ("__main__.py", "lean.py"):
        (package / name).write_text((ROOT / "pyvmm" / name).read_text())
    process = subprocess.Popen(
        [sys.executable, "-S", *STARTS[start]], cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,  # type: ignore[call-overload]
    )  # fmt: skip
    assert process.stdout.read(7) == b"loading"
    return process


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_loading_without_a_word(tmp_path: Path, start: str, number: int) -> None:
    with loading(tmp_path, start) as process:
        process.send_signal(number)
        assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == -number  # 128 + number to a shell


@pytest.mark.parametrize("start", STARTS)
def test_what_is_ignored_stays_ignored(tmp_path: Path, start: str) -> None:
    """As for programs that a shell script starts in the background."""
    with loading(tmp_path, start, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) as process:
        assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == 42
