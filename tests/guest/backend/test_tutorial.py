"""docs/backends.md: its device, its guest and its test, as they are printed there, do what it says."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from guest.machines import Machine

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[3] / "docs" / "backends.md"
TITLE = re.compile(r"(?:# |/\* )([\w.]+)")


def files() -> dict[str, str]:
    """The files that the page shows, by the names in their first lines."""
    blocks = re.findall(r"^```(?:python|c)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return {found[1]: block for block in blocks if (found := TITLE.match(block))}


def test_tutorial(machine: Machine) -> None:
    folder = machine.shared / "tutorial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    assert set(files()) == {"pattern.py", "init.c", "test_driver.py"}
    for name, text in files().items():
        (folder / name).write_text(text)
    pytest_words = f"{sys.executable} -P -m pytest -q -p no:cacheprovider -c /dev/null test_driver.py"
    done = machine.run("sh", "-c", f"cd {folder} && exec {pytest_words}", timeout=200).ok()
    assert b"12 passed" in done.stdout, repr(done)
