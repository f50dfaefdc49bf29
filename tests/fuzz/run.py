"""The fuzzer: atheris on the parts, with pyvmm instrumented for coverage.

    python tests/fuzz/run.py [--part NAME] [libFuzzer's options] [corpus directories]

A directory that is not there is made, with the seeds in it.

It must not change what an input means: that is in `source` and `parts`, which work without it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["pyvmm"]):
    from fuzz import parts, seeds

    from pyvmm import log


def main() -> None:
    """Until libFuzzer ends the process."""
    argv, only = [f"{sys.executable} -P {__file__}", *sys.argv[1:]], ""  # a merge runs this again, by a shell
    if argv[1:2] == ["--part"]:
        only = argv[2]
        if only not in parts.PARTS:
            sys.exit(f"there is no part {only}; there are {', '.join(parts.NAMES)}")
        argv = argv[:1] + argv[3:]
    for name in argv[1:]:
        if not name.startswith("-") and not os.path.exists(name):
            os.mkdir(name)
            seeds.write(Path(name))
    log._say = lambda text: None  # what a user is told once a run, nobody wants a million times
    atheris.Setup(argv, lambda data: bool(parts.run(data, only)) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
