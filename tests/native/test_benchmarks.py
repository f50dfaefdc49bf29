"""`scripts/bench`: which benchmarks there are, and what they refuse; what they measure is not judged here."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.source import ROOT

NAMES = {path.stem for path in (ROOT / "tests" / "bench").glob("*.py") if "__main__" in path.read_text()}


def run(*argv):
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words", [(), ("rings",), ("options",)])
def test_only_benchmarks_are_listed(words):
    status, stdout, stderr = run(ROOT / "scripts" / "bench", *words)
    start, _, names = stderr.strip().partition("There are: ")
    assert (status, stdout, start) == (2, "", "bench: which benchmark? ")
    assert set(names.split(", ")) == NAMES


def test_help_names_them_too():
    status, stdout, _ = run(ROOT / "scripts" / "bench", "--help")
    assert status == 0
    assert {line.split()[1] for line in stdout.splitlines() if "scripts/bench" in line} == NAMES


@pytest.mark.parametrize("runs", ["0", "-1", "many"])
@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_runs_at_least_once(name, runs):
    program = ROOT / "tests" / "bench" / f"{name}.py"
    status, stdout, stderr = run(sys.executable, "-P", program, f"--runs={runs}")
    assert (status, stdout) == (2, "")
    assert f"--runs: '{runs}': a number from 1 on is needed" in stderr
