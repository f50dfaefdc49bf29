"""The compiled core; built from `native/`.  Importing it without a build says how to get one."""

from __future__ import annotations

try:
    from . import memory as memory
except ImportError as error:
    raise ImportError(
        f"pyvmm's compiled core is missing or was built for another Python ({error}); run "
        "scripts/build-inplace in a checkout, or install pyvmm with pip"
    ) from error
