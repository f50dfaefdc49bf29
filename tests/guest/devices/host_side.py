"""The host's side of the device tests, next to a KVM that runs guests: one boot, many devices.

Usage: host_side KERNEL BOOT.  It starts the backend of each row, boots one guest with all of
them, serves the host's ends while the guest's side runs, looks at what is left, and prints
`{row: {"guest": report, "host": report, "log": text} or {"skip": reason}}` as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

from guest.devices import rows
from guest.devices.ends import NO_STEPS, STEPS
from guest.devices.place import LIMIT, Place, find_program, why_not
from guest.devices.rows import Row

SHARE = "/mnt/results"
CPUS = {"queues": 4}  # a disk has no more queues in use than CPUs; the lab is slow with more than one
ONE_CPU = ("taskset", "--cpu-list", str(min(os.sched_getaffinity(0))))
# Not busybox's shell: it would run /proc/self/exe, which before /proc is mounted is the file server's.
INIT = """#!/bin/sh
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmp /run; mount -t tmpfs tmp /mnt
busybox ifconfig lo 127.0.0.1 up
mkdir {share}; mount -t virtiofs results {share}
export TMPDIR=/run RESULTS={share} PYTHONPATH={tests}
cd /run; {python} -P -m guest.devices.guest_side >{share}/guest.log 2>&1
sync
busybox poweroff -f
"""


class Boot:
    """The rows of one boot, from preparation to the end of every process."""

    def __init__(self, kernel: str, boot: str, folder: Path) -> None:
        self.kernel = kernel
        self.boot = boot
        self.folder = folder
        self.outcome: dict[str, Any] = {}
        self.places: list[Place] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        (folder / "results").mkdir()
        for row in rows.ROWS:
            if row.boot == boot:
                self._add(row)

    def _add(self, row: Row) -> None:
        reason = why_not(row)
        if reason:
            self.outcome[row.name] = {"skip": reason}
            return
        place = Place(row, self.folder)
        STEPS.get(row.proof, NO_STEPS)[0](place)
        self.places.append(place)

    def run(self) -> None:
        """Start the backends, boot, talk, wait, inspect."""
        try:
            for place in self.places:
                self._start_backend(place)
            machine = self._start_machine()
            threads = [self._talk(place, machine) for place in self.places]
            try:
                status: int | str = machine.wait(LIMIT)
            except subprocess.TimeoutExpired:
                machine.terminate()
                status = f"ended after {LIMIT} s; {machine.wait(30)}"
            for thread in threads:
                thread.join(5)
        finally:
            self._end()
        self.outcome["machine"] = {"status": status, "log": self._log()}
        for place in self.places:
            self.outcome[place.row.name] = self._inspect(place)

    def _start_backend(self, place: Place) -> None:
        row = place.row
        if not row.backend:
            return
        program = find_program(row.backend[0].replace("{python}", sys.executable))
        assert program is not None
        argv = [program, *(place.fill(word) for word in row.backend[1:])]
        if row.ahead:
            argv = ["chrt", "--fifo", "1", *ONE_CPU, *argv]
        env = {key: place.fill(value) for key, value in row.env}
        with (place.dir / "log").open("wb") as log:
            process = subprocess.Popen(
                argv, stdout=log, stderr=log, env={**os.environ, **env}, stdin=subprocess.PIPE
            )
        if row.polls:
            os.setpriority(os.PRIO_PROCESS, process.pid, 19)
        self._processes.append(process)

    def _start_machine(self) -> subprocess.Popen[bytes]:
        results = self.folder / "results"
        wanted = [{"name": place.row.name, "proof": place.row.proof, "args": place.row.args}
                  for place in self.places]  # fmt: skip
        (results / "rows.json").write_text(json.dumps(wanted))
        init = self.folder / "init"
        tests = str(Path(__file__).parents[2])
        init.write_text(INIT.format(share=SHARE, tests=tests, python=sys.executable))
        init.chmod(0o755)
        argv = [
            sys.executable,
            "-P",
            "-m",
            "pyvmm",
            "boot",
            "--kernel",
            self.kernel,
            "--cpus",
            f"boot={CPUS.get(self.boot, 1)}",
        ]
        argv += ["--memory", "size=768M", "--console", "off", "--serial", f"file={self.folder}/serial"]
        argv += ["--connect-timeout", "60", "--deadline", "30", "--no-reboot"]
        argv += ["--fs", "tag=root,dir=/,readonly=on,cache=always", "--fs", f"tag=results,dir={results}"]
        argv += [word for place in self.places for word in place.words()]
        argv += ["--cmdline", f"console=ttyS0 panic=-1 quiet root=root rootfstype=virtiofs ro init={init}"]
        if any(place.row.ahead for place in self.places):
            argv = [*ONE_CPU, *argv]
        with (self.folder / "pyvmm.log").open("wb") as log:
            machine = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._processes.insert(0, machine)
        return machine

    def _talk(self, place: Place, machine: subprocess.Popen[bytes]) -> threading.Thread:
        def talk() -> None:
            try:
                STEPS.get(place.row.proof, NO_STEPS)[1](place)
            except BaseException:
                place.report["error"] = traceback.format_exc()

        place.machine = machine
        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        return thread

    def _inspect(self, place: Place) -> dict[str, Any]:
        path = place.results / f"{place.row.name}.json"
        guest = json.loads(path.read_text()) if path.exists() else {"error": "the guest reports nothing"}
        try:
            STEPS.get(place.row.proof, NO_STEPS)[2](place, guest)
        except BaseException:
            place.report["error"] = traceback.format_exc()
        logs = [place.dir / "log", place.results / f"{place.row.name}.fio"]
        return {"guest": guest, "host": place.report, "log": "".join(map(tail, logs))}

    def _end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _log(self) -> str:
        names = ("pyvmm.log", "serial", "results/guest.log")
        return "\n".join(f"--- {name}\n{tail(self.folder / name)}" for name in names)

    def close(self) -> None:
        """Undo the mounts."""
        for place in self.places:
            if os.path.ismount(place.dir / "fs"):
                subprocess.run(["umount", "-l", place.dir / "fs"], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def tail(path: Path) -> str:
    """The end of a log."""
    return path.read_text(errors="replace")[-3000:] if path.exists() else ""


def main() -> None:
    """Run one boot."""
    kernel, name = sys.argv[1:]
    boot = Boot(kernel, name, Path(tempfile.mkdtemp(dir="/run", prefix="devices-")))
    try:
        subprocess.run(["busybox", "ifconfig", "lo", "127.0.0.1", "up"], check=False)
        boot.run()
    finally:
        boot.close()
    print(json.dumps(boot.outcome))


if __name__ == "__main__":
    main()
