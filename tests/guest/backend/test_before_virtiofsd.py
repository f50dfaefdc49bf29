"""The proxy between pyvmm and a real virtiofsd: a mounted guest, faults, a recording and its replay."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from guest.machines import Machine
from guest.test_boot import CONFIG, VIRTIOFSD, disk_image

from pyvmm.host.kernels import Kernel

pytestmark = pytest.mark.slow

FAULTS = "seed=5,delay=0.05,delay_seconds=0.02,reorder=0.3,spurious_call=0.1"
# A reader and a writer at once: only where there are two requests can they be reordered.
BODY = (
    "mount -t virtiofs myfs /mnt && { md5sum </mnt/in & cat /mnt/in >/mnt/out; wait; }; "
    "umount /mnt && echo unmounted"
)
SCRIPT = """
    cd $(mktemp -d)
    {virtiofsd} --socket-path=fs.sock -o source={folder}/shared -o sandbox=chroot &
    while ! [ -S fs.sock ]; do sleep 0.1; done
    {python} -m pyvmm.backend.proxy --socket-path proxy.sock --to fs.sock --record {folder}/record \\
        --faults {faults} -vv 2>{folder}/proxy.log & proxy=$!
    while ! [ -S proxy.sock ]; do sleep 0.1; done
    {pyvmm} --kernel {kernel} --disk path={image} \\
        --cmdline "console=hvc0 panic=-1 root=/dev/vda1 ro quiet" \\
        --generic-vhost-user "socket=proxy.sock,device_type=fs,queue_sizes=[256,256],config={config}" || exit
    kill $proxy; wait $proxy
    {virtiofsd} --socket-path=again.sock -o source={folder}/shared -o sandbox=chroot &
    while ! [ -S again.sock ]; do sleep 0.1; done
    {pyvmm} trace replay {folder}/record --to again.sock && echo replayed
"""


def test_files_survive_faults_and_a_recording_is_replayed(
    machine: Machine, own: Kernel, scratch: Path
) -> None:
    shared, data = scratch / "shared", os.urandom(3_000_000)
    shared.mkdir()
    (shared / "in").write_bytes(data)
    script = SCRIPT.format(
        virtiofsd=VIRTIOFSD, folder=scratch, kernel=own.path, image=disk_image(scratch, BODY), config=CONFIG,
        pyvmm=machine.pyvmm_words, python=machine.pyvmm_words.removesuffix(" -m pyvmm"), faults=FAULTS,
    )  # fmt: skip
    done = machine.run("bash", "-c", script, timeout=230).ok()
    console, log = done.stdout.decode(), (scratch / "proxy.log").read_text()
    assert hashlib.md5(data).hexdigest() in console and "unmounted" in console, repr(done)
    assert (shared / "out").read_bytes() == data
    assert all(f"fault {name}: " in log for name in ("delay", "reorder", "spurious_call")), log
    assert "replayed" in console, repr(done)
    lines = [json.loads(line) for line in (scratch / "record").read_text().splitlines()]
    assert sum(len(line.get("writable", ())) > 0 for line in lines) > 10
