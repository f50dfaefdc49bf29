"""Linux restarts: real backends serve each life of the guest, one after another."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import pytest
from guest.machines import Machine
from guest.test_boot import disk_image

from pyvmm.host.kernels import Kernel

pytestmark = pytest.mark.slow

LIVES = 3
# The file system stays mounted and files open when the guest restarts, as after a crash.
BODY = f"""
mount -t virtiofs share /mnt || poweroff -f
life=$(($(cat /mnt/life 2>/dev/null || echo 0) + 1)); echo $life >/mnt/life
echo "life $life, $(grep -c . /lines 2>/dev/null || echo 0) lines on disk, $(md5sum </mnt/blob)"
echo line >>/lines; sync
exec 9</mnt/blob
[ $life -lt {LIVES} ] && reboot -f
read word; echo "heard $word"
"""


def test_files_disk_and_console_serve_every_life(machine: Machine, own: Kernel, scratch: Path) -> None:
    """The same virtiofsd and storage daemon; what is typed reaches the last life."""
    share = scratch / "share"
    share.mkdir()
    (share / "blob").write_bytes(os.urandom(1 << 20))
    digest = hashlib.md5((share / "blob").read_bytes()).hexdigest()
    image = disk_image(scratch, BODY)
    log = scratch / "log"
    script = f"""
        set -o pipefail; : >{log}
        (until grep -q 'life {LIVES}' {log}; do sleep 0.2; done; echo ping) |
        {machine.pyvmm_words} -v --kernel {own.path} --cpus boot=2 --disk path={image} \\
            --fs tag=share,dir={share} --cmdline "console=hvc0 root=/dev/vda1 rw quiet" | tee {log}
    """
    done = machine.run("bash", "-c", script, timeout=200).ok()
    lives = re.findall(rf"life (\d), (\d) lines on disk, {digest}", done.stdout.decode())
    assert lives == [(str(life + 1), str(life)) for life in range(LIVES)], repr(done)
    assert b"heard ping" in done.stdout, repr(done)
    assert re.findall(r"restarts \((\d)\)", done.stderr.decode()) == ["1", "2"], repr(done)


def test_a_restart_ends_the_run_when_told_so(machine: Machine, own: Kernel, scratch: Path) -> None:
    image = disk_image(scratch, "echo going; reboot -f")
    done = machine.pyvmm(
        "--no-reboot", "--kernel", own.path, "--disk", f"path={image}",
        "--cmdline", "console=hvc0 panic=-1 root=/dev/vda1 ro quiet",
    ).ok()  # fmt: skip
    assert done.stdout.count(b"going") == 1, repr(done)


def test_a_guest_that_crashes_later_is_reported(machine: Machine, own: Kernel, scratch: Path) -> None:
    """A triple fault in the second life is a crash, not a restart."""
    triple = "[ -e /been ] && echo triple >/sys/kernel/reboot/type"
    image = disk_image(scratch, f"{triple}; touch /been; sync; reboot -f")
    done = machine.pyvmm(
        "-v", "--kernel", own.path, "--disk", f"path={image}",
        "--cmdline", "console=hvc0 root=/dev/vda1 rw quiet", faults=True,
    )  # fmt: skip
    assert done.status == 126, repr(done)
    assert done.stderr.count(b"restarts (") == 1 and b"triple fault" in done.stderr, repr(done)
