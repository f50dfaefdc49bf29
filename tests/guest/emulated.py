"""How a guest that the emulated machine lost is told from one that its devices left alone.

TCG may inject an interrupt a second time, into whatever the guest runs then (pyvmm.boot.cpuid says why, and
makes it rare).  A guest that was between two states hangs with a million page faults a minute that KVM gives
it, of which there are none otherwise.  No VMM can do that to a guest, so what hangs so is tried once more.
It runs next to the KVM and outside.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUNG = 100_000  # page faults


def page_faults_by_kvm() -> int:
    """How often KVM itself gave the guests that run now a page fault; 0 where it does not say."""
    counter = Path("/sys/kernel/debug/kvm/pf_guest")
    if not counter.exists():
        subprocess.run(["mount", "-t", "debugfs", "debug", "/sys/kernel/debug"], check=False)
    return int(counter.read_text()) if counter.exists() else 0


def twice(play: Callable[[], dict[str, Any]], what: str) -> dict[str, Any]:
    """What `play` saw, or did the second time if its `page_faults` say that the guest hung."""
    seen = play()
    if seen["page_faults"] > HUNG:
        print(f"\n{what}: the guest hung in the emulated machine; once more", file=sys.__stderr__)
        seen = play()
    return seen
