"""Where guest tests run: on this host when its KVM runs ring 0, else in the emulated machine.

`Machine.run` looks the same on both.  The emulated machine is started once for all tests,
with a directory that both sides see for results that must survive it.
"""

from __future__ import annotations

import base64
import json
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from guest import agent

from pyvmm.host import emulator

START_TIMEOUT = 240
# Debian's QEMU now and then damages the emulated machine's own kernel, stands still, or loses a guest
# (guest-images/lab-qemu/tcg.patch).  What runs in there cannot do that, so it is tried again; more would be
# somebody's.
LOSSES_BORNE = 5
LOST_GUEST = (b"triple fault (KVM_EXIT_SHUTDOWN)", b"Fatal exception")
SHOWN = 3000  # of what a lost command said
PANICKED = "its kernel panicked"


class Result:
    """What a command did; `status` is None when it ran out of time."""

    def __init__(self, argv: list[str], answer: dict[str, Any]) -> None:
        self.argv = argv
        self.status: int | None = answer["status"]
        self.stdout = base64.b64decode(answer["stdout"])
        self.stderr = base64.b64decode(answer["stderr"])
        self.seconds: float = answer["seconds"]

    def __repr__(self) -> str:
        return (
            f"{' '.join(self.argv)}\n-> status {self.status} after {self.seconds:.1f} s\n"
            f"--- stdout\n{_text(self.stdout)}\n--- stderr\n{_text(self.stderr)}"
        )

    def ok(self) -> Result:
        """Itself, if the command succeeded."""
        assert self.status == 0, repr(self)
        return self


def _text(data: bytes) -> str:
    return data[-8000:].decode(errors="replace")


class Machine:
    """Runs commands next to a KVM that can run Linux; subclasses say where."""

    name = "host"

    def __init__(self, shared: Path) -> None:
        self.shared = shared
        self.pyvmm_words = f"{sys.executable} -P -m pyvmm"  # for shell scripts

    def run(
        self,
        *argv: str | Path,
        stdin: bytes = b"",
        timeout: float = 240,
        signal_when: tuple[str, int] | None = None,
        env: dict[str, str] | None = None,
        faults: bool = False,
    ) -> Result:
        """Run `argv` to its end and return what it did; it gets a signal once a path is there.

        `faults`: a guest is meant to end by a triple fault.
        """
        words = [str(word) for word in argv]
        request = {
            "argv": words,
            "input": base64.b64encode(stdin).decode(),
            "timeout": timeout,
            "signal_when": signal_when,
            "env": env or {},
            "faults": faults,
        }
        return Result(words, self._execute(request))

    def pyvmm(self, *argv: str | Path, **options: Any) -> Result:
        """Run pyvmm with this interpreter's installation."""
        return self.run(sys.executable, "-P", "-m", "pyvmm", *argv, **options)

    def _execute(self, request: dict[str, Any]) -> dict[str, Any]:
        return agent.execute(request)

    def close(self) -> None:
        """Nothing to end on the host itself."""


class LabMachine(Machine):
    """The emulated machine of `pyvmm lab`, with the agent in it.

    There is a new one after its kernel has panicked, and after a command that was not done in time.  The
    command runs again then, and after it has lost a guest.
    """

    name = "lab"
    grace = 60.0  # seconds beyond a command's own limit

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        self._losses = 0
        self.losses_borne = LOSSES_BORNE
        self._waiting = False  # for an answer
        self._start()

    def _start(self) -> None:
        shared, cpus = self.shared, "2" if emulator.own_program() else "1"
        self._log = (shared / "lab.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "pyvmm", "lab", "--memory", "9G", "--cpus", cpus]
            + ["--share", str(shared), "--", sys.executable, "-P", agent.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._read_line(START_TIMEOUT)

    def _read_line(self, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            raise TimeoutError(f"the emulated machine did not answer in {timeout} s: {self._tail()}")
        line = self._process.stdout.readline()
        if not line:
            raise EOFError(f"the emulated machine ended: {self._tail()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _tail(self) -> str:
        self._log.flush()
        return (self.shared / "lab.log").read_text(errors="replace")[-3000:]

    def _execute(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._waiting:  # the last command's test has failed for it; no other has to
            self._process.terminate()
            self._renew()
        while True:
            answer, loss = self._try(request)
            if answer is not None and (not loss or self._losses == self.losses_borne):
                return answer
            self._losses += 1
            seen = repr(Result(request["argv"], answer)) if answer is not None else " ".join(request["argv"])
            print(f"\nThe emulated machine: {loss}; once more: {seen[-SHOWN:]}", file=sys.__stderr__)
            if answer is None or (answer["status"] is None and not answer["hung"]):
                self._process.terminate()
                self._renew()

    def _try(self, request: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
        """The answer, if there is any, and what was lost; raises what cannot be borne any more."""
        try:
            answer = self._ask(request)
        except TimeoutError:
            if self._losses == self.losses_borne:
                raise
            return None, "no answer"
        except (EOFError, BrokenPipeError):
            self._process.wait(30)  # until when it may still say why
            if PANICKED not in self._tail() or self._losses == self.losses_borne:
                raise
            return None, PANICKED
        if answer["status"] is None:
            return answer, "a guest hung" if answer["hung"] else "out of time"
        said = base64.b64decode(answer["stdout"]) + base64.b64decode(answer["stderr"])
        lost = any(words in said for words in LOST_GUEST) and not request["faults"]
        return answer, "a guest was lost" if lost else ""

    def _renew(self) -> None:
        self.close()
        self._start()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        self._waiting = True
        answer = self._read_line(request["timeout"] + self.grace)
        self._waiting = False
        return answer

    def close(self) -> None:
        """Let the agent read end of file, which ends the machine."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(30)
        self._process.stdout.close()
        self._log.close()
