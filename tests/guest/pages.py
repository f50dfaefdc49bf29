"""Files that a page of the documentation shows: code blocks whose first line is a comment with a name."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from guest.machines import Machine, Result

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(?:python|c|make)\n(.*?)^```", re.DOTALL | re.MULTILINE)
TITLE = re.compile(r"(?:# |/\* )([\w.]+)(?: \*/)?\n")


def save(page: str, folder: Path) -> set[str]:
    """Make a new `folder` of the files of docs/`page`, as printed; returns their names."""
    folder.mkdir()
    blocks = BLOCK.findall((DOCS / page).read_text())
    files = {found[1]: block for block in blocks if (found := TITLE.match(block))}
    for name, text in files.items():
        (folder / name).write_text(text)
    return set(files)


def run_pytest(machine: Machine, folder: Path, test: str, timeout: float) -> Result:
    """Run the page's test, a file and perhaps options, where guests run; returns what pytest did, if well."""
    words = f"{sys.executable} -P -m pytest -q -p no:cacheprovider -c /dev/null {test}"
    return machine.run("sh", "-c", f"cd {folder} && exec {words}", timeout=timeout).ok()
