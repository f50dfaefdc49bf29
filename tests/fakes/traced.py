"""A real backend that dies at a chosen moment of the dialogue: python-ptrace stops it there.

It owns the tracer, which is a process of its own (this file, run as a program): a tracer in ours
would reap a child whose end somebody else waits for.  A moment is the n-th time that the program
enters or leaves a system call; killed there, it has for instance carried a request out and not
answered it.  It knows nothing of what is in the messages.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from types import TracebackType
from typing import Self

ENTER, LEAVE = "enter", "leave"


class Traced:
    """Traces process `pid`, which must be waiting, and kills it at `moment`: "sendmsg enter 3".

    `seen`, after the block, counts what was passed: {"sendmsg enter": 17, ...}.
    """

    def __init__(self, pid: int, moment: str = "") -> None:
        self.seen: dict[str, int] = {}
        argv = [sys.executable, "-P", __file__, str(pid), moment]
        self._tracer = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert self._tracer.stdout is not None
        assert self._tracer.stdout.readline() == "attached\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the end of the traced process, for which the block has seen to."""
        try:
            out, _ = self._tracer.communicate(timeout=20)
        finally:
            self._tracer.kill()
        self.seen = json.loads(out)


def trace(pid: int, moment: str) -> Counter[str]:
    """Follow `pid` to its end; it is killed at `moment`."""
    from ptrace.debugger import ProcessExit, ProcessSignal, PtraceDebugger
    from ptrace.func_call import FunctionCallOptions

    options, seen = FunctionCallOptions(), Counter[str]()
    debugger = PtraceDebugger()
    process = debugger.addProcess(pid, is_attached=False)
    process.syscall()
    print("attached", flush=True)
    while True:
        try:
            process = debugger.waitSyscall().process
        except ProcessSignal as stopped:
            stopped.process.syscall(stopped.signum)
            continue
        except ProcessExit:
            return seen
        call = process.syscall_state.event(options)
        if call is not None:
            what = f"{call.name} {ENTER if call.result is None else LEAVE}"
            seen[what] += 1
            if moment == f"{what} {seen[what]}":
                os.kill(pid, signal.SIGKILL)
                return seen
        process.syscall()


if __name__ == "__main__":
    print(json.dumps(trace(int(sys.argv[1]), sys.argv[2])))
