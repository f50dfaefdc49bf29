"""The fuzzer: atheris on the parts, with pyvmm instrumented for coverage.

    python tests/fuzz/run.py [--part NAME] [libFuzzer's options] [corpus directories]

It must not change what an input means: that is in `source` and `parts`, which work without it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["pyvmm"]):
    from fuzz import parts

    from pyvmm import log


def main() -> None:
    """Until libFuzzer ends the process."""
    argv, only = sys.argv, ""
    if argv[1:2] == ["--part"]:
        only = argv[2]
        if only not in parts.PARTS:
            sys.exit(f"there is no part {only}; there are {', '.join(parts.NAMES)}")
        argv = argv[:1] + argv[3:]
    log._say = lambda text: None  # what a user is told once a run, nobody wants a million times
    atheris.Setup(argv, lambda data: bool(parts.run(data, only)) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
