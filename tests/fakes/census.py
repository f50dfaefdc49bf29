"""What a process holds: descriptors, threads, mappings, children; and that a block leaves no more.

Counts are of what a machine makes: mappings of memory files and of KVM, not of the allocator or of
libraries, which come and stay with the first use of anything.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fakes.program import children

PATIENCE = 5.0  # seconds
OURS = ("/memfd:", "anon_inode:", "/dev/", "/SYSV")


def descriptors() -> Counter[str]:
    """What is open, by what it leads to without numbers that differ each time."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        try:
            found[os.readlink(f"/proc/self/fd/{name}").partition(":[")[0]] += 1
        except FileNotFoundError:
            continue
    return found


def mappings() -> Counter[str]:
    """Names of mapped memory files and KVM structures."""
    found: Counter[str] = Counter()
    for line in Path("/proc/self/maps").read_text().splitlines():
        name = line.split(maxsplit=5)[5:]
        if name and name[0].startswith(OURS):
            found[name[0]] += 1
    return found


def census() -> dict[str, Counter[str]]:
    """Everything that a machine may leave behind."""
    return {
        "descriptors": descriptors(),
        "threads": Counter(thread=len(os.listdir("/proc/self/task"))),
        "mappings": mappings(),
        "children": Counter(str(pid) for pid in children()),
    }


def more(before: dict[str, Counter[str]], after: dict[str, Counter[str]]) -> dict[str, Counter[str]]:
    """What there is more of."""
    return {what: extra for what in before if (extra := after[what] - before[what])}


@contextmanager
def leaves_nothing() -> Iterator[None]:
    """Fails when the block leaves anything.

    A thread that was joined is gone for Python before it is for the kernel, so it gets some time.
    """
    before = census()
    yield
    due = time.monotonic() + PATIENCE
    while left := more(before, census()):
        assert time.monotonic() < due, f"left behind: {left}"
        time.sleep(0.01)
