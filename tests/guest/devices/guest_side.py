"""The guest's side of the device tests: the first process's only child runs each row's proof.

$RESULTS is a writable directory shared with the host.  It holds `rows.json`, what to prove, and
gets `NAME.json` for each row.  A proof is a function of the row's name and
arguments that moves data through the device with the guest's own driver and reports what it
saw.  Each runs in a process of its own with a time limit, so that one device cannot stop
the others.
"""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from typing import Any

from guest.devices.proofs import LIMIT, PROOFS, RESULTS, save


def prove(row: dict[str, Any]) -> None:
    """One row, in a process of its own."""
    begin = time.monotonic()
    try:
        report = PROOFS[row["proof"]](row["name"], row["args"])
    except BaseException:
        report = {"error": traceback.format_exc()}
    save(row["name"], report | {"seconds": round(time.monotonic() - begin, 2)})


def limited(row: dict[str, Any]) -> None:
    """`prove` with a time limit."""
    pid = os.fork()
    if not pid:
        signal.alarm(LIMIT)
        prove(row)
        os._exit(0)
    os.waitpid(pid, 0)
    if not (RESULTS / f"{row['name']}.json").exists():
        save(row["name"], {"error": f"no result after {LIMIT} s"})


def main() -> None:
    """Prove every row."""
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    console_fd = os.open("/dev/kmsg", os.O_WRONLY)
    for row in json.loads((RESULTS / "rows.json").read_text()):
        os.write(console_fd, f"device tests: {row['name']}\n".encode())
        limited(row)


if __name__ == "__main__":
    main()
