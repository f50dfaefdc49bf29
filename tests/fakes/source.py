"""pyvmm's own source as trees: modules, what each imports and when, functions and docstrings.

For the tests of style.  Imports are read, never executed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pyvmm"


class Import(NamedTuple):
    """`name` is absolute; `top`: it happens as the module loads; `types`: under TYPE_CHECKING."""

    name: str
    top: bool
    types: bool


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its full name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(), str(path))


@cache
def imports(name: str) -> frozenset[Import]:
    """What the module imports, anywhere in it."""
    path = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return frozenset(_imports(tree(path), package, top=True, types=False))


def _imports(node: ast.AST, package: str, top: bool, types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, top, types) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (Import(name, top, types) for name in _targets(child, package))
        elif isinstance(child, ast.If):
            for part in child.body:
                yield from _imports(
                    ast.Module([part], []), package, top and not _is_main(child), types or _is_types(child)
                )
            yield from _imports(ast.Module(child.orelse, []), package, top, types)
        else:
            runs_later = isinstance(child, ast.FunctionDef | ast.Lambda)
            yield from _imports(child, package, top and not runs_later, types)


def _targets(node: ast.ImportFrom, package: str) -> Iterator[str]:
    """Full names; of `from a import b` it is a.b when that is a module of ours."""
    base = node.module or ""
    if node.level:
        parts = package.split(".")
        base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
    for alias in node.names:
        full = f"{base}.{alias.name}"
        yield full if full in modules() or base == "pyvmm._native" else base


def _is_types(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _is_main(node: ast.If) -> bool:
    return ast.unparse(node.test) == "__name__ == '__main__'"


class Definition(NamedTuple):
    """A class or function: where, its node, and whether it is reachable by public names alone."""

    path: Path
    owner: ast.ClassDef | None
    node: ast.FunctionDef | ast.ClassDef
    public: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.node.lineno}: {self.node.name}"


def definitions(path: Path) -> Iterator[Definition]:
    """Every class and function in a file, at any depth."""
    return _definitions(path, tree(path), None, public=True)


def _definitions(path: Path, node: ast.AST, owner: ast.ClassDef | None, public: bool) -> Iterator[Definition]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            visible = public and not child.name.startswith("_")
            yield Definition(path, owner, child, visible)
            inner = child if isinstance(child, ast.ClassDef) else None
            yield from _definitions(path, child, inner, visible and inner is not None)
        else:
            yield from _definitions(path, child, owner, public)
