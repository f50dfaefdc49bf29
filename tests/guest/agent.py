"""Runs commands for the tests inside the emulated machine: JSON lines in, JSON lines out.

One machine serves a whole test run, since starting it costs half a minute.  A request is
`{"argv": [...], "input": base64, "timeout": seconds, "signal_when": [path, number]}` (once the path
is there), the answer `{"status", "stdout", "stderr", "seconds"}`, outputs in base64.  What a command
leaves in its process group is killed.  A command that runs out of time is killed and answers status null;
so does one with a guest that hangs, and its answer says so (`hung`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOOK_SECONDS = 0.5
PAGE_FAULTS = Path("/sys/kernel/debug/kvm/pf_guest")
HUNG = 100_000


def execute(request: dict[str, Any], hung: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Run one request to its end; `hung` is asked now and then."""
    begin = time.monotonic()
    process = subprocess.Popen(
        request["argv"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, **request.get("env", {})},
    )
    if request.get("signal_when"):
        threading.Thread(target=_signal_when, args=(process, *request["signal_when"])).start()
    hangs = threading.Event()
    threading.Thread(target=_watch, args=(process, hung, hangs)).start()
    ended = True
    try:
        out, err = process.communicate(base64.b64decode(request.get("input", "")), timeout=request["timeout"])
    except subprocess.TimeoutExpired:
        ended = False
    _kill_group(process)
    if not ended:
        out, err = process.communicate()
    return {
        "status": process.returncode if ended and not hangs.is_set() else None,
        "hung": hangs.is_set(),
        "stdout": base64.b64encode(out).decode(),
        "stderr": base64.b64encode(err).decode(),
        "seconds": time.monotonic() - begin,
    }


def _watch(process: subprocess.Popen[bytes], hung: Callable[[], bool], hangs: threading.Event) -> None:
    while process.poll() is None:
        time.sleep(LOOK_SECONDS)
        if hung():
            hangs.set()
            _kill_group(process)
            return


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _signal_when(process: subprocess.Popen[bytes], path: str, number: int) -> None:
    while process.poll() is None:
        if os.path.exists(path):
            process.send_signal(number)
            return
        time.sleep(0.1)


def a_guest_hangs() -> bool:
    """Whether KVM itself gave the guests that run now page faults without end.

    What TCG does wrong (guest-images/lab-qemu/tcg.patch) can leave a guest between two states, and then it
    hangs with a million page faults a minute that KVM gives it, of which there are none otherwise.  No VMM
    can do that to a guest.
    """
    return PAGE_FAULTS.exists() and int(PAGE_FAULTS.read_text()) > HUNG


def main() -> None:
    """Serve standard input until it ends."""
    subprocess.run(["mount", "-t", "debugfs", "debug", "/sys/kernel/debug"], check=False)
    print(json.dumps({"ready": os.uname().release}), flush=True)
    for line in sys.stdin:
        try:
            answer = execute(json.loads(line), a_guest_hangs)
        except OSError as error:
            answer = {
                "status": 127,
                "hung": False,
                "stdout": "",
                "stderr": base64.b64encode(str(error).encode()).decode(),
                "seconds": 0,
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
