"""Programs that we wait for: what they say, and that no signal leaves one behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from fakes.program import children

from pyvmm import programs


@pytest.fixture
def ending() -> Iterator[None]:
    """SIGTERM raises, as where the program prepares something."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    before = children()
    yield
    signal.signal(signal.SIGTERM, previous)
    assert children() == before


def test_what_it_says(tmp_path) -> None:  # type: ignore[no-untyped-def]
    words = ["sh", "-c", "pwd; echo wrong >&2; exit 3"]
    assert programs.run(words, str(tmp_path)) == (3, f"{tmp_path}\n", "wrong\n")


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        programs.run(["/nowhere/cc"])


@pytest.mark.usefixtures("ending")
def test_a_signal_while_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *words, **options) -> None:  # type: ignore[no-untyped-def]
            super().__init__(*words, **options)
            os.kill(os.getpid(), signal.SIGTERM)
            assert self.poll() is None

    monkeypatch.setattr(subprocess, "Popen", Slow)
    with pytest.raises(SystemExit):
        programs.run(["sleep", "60"])


@pytest.mark.usefixtures("ending")
def test_a_signal_while_it_runs() -> None:
    with pytest.raises(SystemExit):
        programs.run(["sh", "-c", "kill -TERM $PPID; sleep 60"])


def test_it_blocks_no_signal() -> None:
    code = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    assert programs.run([sys.executable, "-c", code]) == (0, "set()\n", "")
