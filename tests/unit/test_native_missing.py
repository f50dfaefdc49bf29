"""Without a compiled core, the import says what to do."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "pyvmm" / "_native" / "__init__.py"


def test_import_without_extensions_names_the_cure(tmp_path):
    package = tmp_path / "__init__.py"
    package.write_bytes(SOURCE.read_bytes())
    spec = importlib.util.spec_from_file_location(
        "no_core", package, submodule_search_locations=[str(tmp_path)]
    )
    module = importlib.util.module_from_spec(spec)
    with pytest.raises(ImportError, match="core is missing.*run scripts/build-inplace in a checkout"):
        spec.loader.exec_module(module)
