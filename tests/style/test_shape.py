"""Size and shape: short functions, files that fit in a head, a word on everything public."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from fakes.source import ROOT, Definition, definitions, modules, tree

LONG_FILE = 400
REASON = "In one file because"  # what the first paragraph of a longer one says
SOURCES = ("*.py", "*.pyx", "*.pxd", "*.pyi", "*.c", "*.h", "scripts/*", ".ci/*")
LEFT_OVER = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")


@cache
def files() -> list[Path]:
    """Every source in the checkout that is not ignored."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", *SOURCES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def python() -> list[Path]:
    return [path for path in files() if path.suffix == ".py"]


def test_long_files_say_why() -> None:
    long = [path for path in files() if path.read_text().count("\n") > LONG_FILE]
    assert [str(path) for path in long if REASON not in beginning(path)] == []


def beginning(path: Path) -> str:
    """The docstring or comment that a file begins with, where the reason for its length belongs."""
    text = path.read_text()
    if path.suffix in (".py", ".pyi", ".pyx"):
        found = re.match(r'(?:#[^\n]*\n)*"""(.*?)"""', text, re.DOTALL)
    else:
        found = re.match(r"((?:#[^\n]*\n)+)|/\*(.*?)\*/", text, re.DOTALL)
    return " ".join(found[0].replace("#", " ").split()) if found else ""


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.py", '"""Why.\n\nIn one file\nbecause it is.\n"""\n', True),
        ("a.py", '"""Why."""\nREASON = "In one file because"\n', False),
        ("a.pyx", '# cython: x=1\n"""In one file because it is."""\n', True),
        ("a.h", "/* In one file because it is. */\nint x;\n", True),
        ("a", "#!/bin/sh\n# In one file\n# because it is.\n", True),
        ("a", "#!/bin/sh\necho In one file because\n", False),
    ],
)
def test_a_reason_is_one_only_at_the_beginning(tmp_path: Path, name: str, text: str, found: bool) -> None:
    (tmp_path / name).write_text(text)
    assert (REASON in beginning(tmp_path / name)) == found


def test_every_module_says_what_it_is() -> None:
    silent = [
        str(path) for path in python() if path.read_text().strip() and not ast.get_docstring(tree(path))
    ]
    assert silent == []


@pytest.mark.parametrize("room", ["pyvmm", "tests"])
def test_functions_are_short(room: str) -> None:
    lengths = [
        found.node.end_lineno - found.node.lineno + 1
        for path in python()
        if path.is_relative_to(ROOT / room)
        for found in definitions(path)
        if isinstance(found.node, ast.FunctionDef) and found.node.end_lineno
    ]
    assert statistics.median(lengths) <= 10
    assert sum(length < 40 for length in lengths) >= 0.9 * len(lengths)


def public() -> Iterator[Definition]:
    for path in modules().values():
        yield from (found for found in definitions(path) if found.public)


def explained() -> set[str]:
    """Methods that some class documents: implementations of a contract need no second text."""
    every = (found for path in modules().values() for found in definitions(path))
    return {found.node.name for found in every if found.owner and ast.get_docstring(found.node)}


def is_protocol(found: Definition) -> bool:
    """Methods of a Protocol are documented by the class."""
    return found.owner is not None and any(ast.unparse(base) == "Protocol" for base in found.owner.bases)


def handlers() -> set[str]:
    """Methods that are found by the name of a row in a table of messages or registers."""
    from pyvmm.vhost_user.messages import REQUESTS
    from pyvmm.virtio.common import REGISTERS

    rows = {f"{access}_{row.name}" for row in REGISTERS for access in ("read", "write")}
    return rows | {row.name.lower() for row in REQUESTS}


def test_everything_public_is_explained() -> None:
    known = explained() | handlers()
    silent = [
        str(found)
        for found in public()
        if not ast.get_docstring(found.node)
        and not is_protocol(found)
        and not (found.owner and found.node.name in known)
    ]
    assert silent == []


def test_nothing_is_left_for_later() -> None:
    marked = [
        f"{path}:{number}"
        for path in files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if any(word in line for word in LEFT_OVER)
    ]
    assert marked == []
