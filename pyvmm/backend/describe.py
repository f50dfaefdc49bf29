"""Announce our backends to other programs of this user: `python -m pyvmm.backend.describe`.

It owns the JSON files of QEMU's docs/interop/vhost-user.json and the launchers that they name,
as such a file can name a program but no arguments.  `echo` has no file: the schema does
not know its kind.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

import pyvmm

from .program import TYPES

KINDS = {
    "blk": "raw disk images, by pyvmm",
    "console": "console ports on terminals, files and sockets, by pyvmm",
    "net": "network cards at TAP interfaces and stream sockets, by pyvmm",
    "rng": "random bytes, by pyvmm",
}
PREFIX = "50-pyvmm-"
LAUNCHER = """\
#!/bin/sh
PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}} exec {python} -P -m pyvmm.backend.{kind} "$@"
"""


def main(argv: list[str] | None = None) -> None:
    """Write everything and print what was written."""
    parser = argparse.ArgumentParser(prog="python -m pyvmm.backend.describe", description=__doc__)
    parser.add_argument(
        "--dir",
        type=Path,
        default=user_dir("XDG_CONFIG_HOME", ".config") / "qemu" / "vhost-user",
        help="where the descriptions go (default: %(default)s, where QEMU's managers and pyvmm look)",
    )
    parser.add_argument(
        "--launchers",
        type=Path,
        default=user_dir("XDG_DATA_HOME", ".local/share") / "pyvmm" / "backends",
        help="where the programs go that they name (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    try:
        for path in write(arguments.dir, arguments.launchers):
            print(path)
    except OSError as error:
        parser.exit(2, f"describe: {error.filename}: {error.strerror}\n")


def user_dir(variable: str, default: str) -> Path:
    """One of the user's directories of the XDG specification, in which relative settings are ignored."""
    given = Path(os.environ.get(variable, ""))
    return given if given.is_absolute() else Path.home() / default


def write(folder: Path, launchers: Path) -> list[Path]:
    """Write a launcher and a description for each kind; the descriptions' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    launchers.mkdir(parents=True, exist_ok=True)
    root = Path(pyvmm.__file__).parent.parent
    written = []
    for kind, text in KINDS.items():
        launcher = launchers.resolve() / f"pyvmm-backend-{kind}"
        launcher.write_text(
            LAUNCHER.format(root=shlex.quote(str(root)), python=shlex.quote(sys.executable), kind=kind)
        )
        launcher.chmod(0o755)
        path = folder / f"{PREFIX}{kind}.json"
        path.write_text(json.dumps(description(kind, text, launcher), indent=2) + "\n")
        written.append(path)
    return written


def description(kind: str, text: str, binary: Path) -> dict[str, object]:
    """One file's contents (VhostUserBackend)."""
    return {"description": text, "type": TYPES.get(kind, kind), "binary": str(binary), "tags": ["pyvmm"]}


if __name__ == "__main__":
    main()
