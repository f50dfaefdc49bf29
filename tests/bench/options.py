"""What the options of benchmarks are.  It knows no benchmark."""

from __future__ import annotations

import argparse


def number(text: str) -> int:
    """A number of runs, buffers or connections: at least one."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: a number from 1 on is needed")
    return int(text)
