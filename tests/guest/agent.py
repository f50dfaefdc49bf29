"""Runs commands for the tests inside the emulated machine: JSON lines in, JSON lines out.

One machine serves a whole test run, since starting it costs half a minute.  A request is
`{"argv": [...], "input": base64, "timeout": seconds, "signal_when": [path, number]}` (once the path
is there), the answer `{"status", "stdout", "stderr", "seconds"}`, outputs in base64.  A command that
runs out of time is killed with its process group and answers status null.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any


def execute(request: dict[str, Any]) -> dict[str, Any]:
    """Run one request to its end."""
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
    status: int | None
    try:
        out, err = process.communicate(base64.b64decode(request.get("input", "")), timeout=request["timeout"])
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        status = None
    return {
        "status": status,
        "stdout": base64.b64encode(out).decode(),
        "stderr": base64.b64encode(err).decode(),
        "seconds": time.monotonic() - begin,
    }


def _signal_when(process: subprocess.Popen[bytes], path: str, number: int) -> None:
    while process.poll() is None:
        if os.path.exists(path):
            process.send_signal(number)
            return
        time.sleep(0.1)


def main() -> None:
    """Serve standard input until it ends."""
    print(json.dumps({"ready": os.uname().release}), flush=True)
    for line in sys.stdin:
        try:
            answer = execute(json.loads(line))
        except OSError as error:
            answer = {
                "status": 127,
                "stdout": "",
                "stderr": base64.b64encode(str(error).encode()).decode(),
                "seconds": 0,
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
