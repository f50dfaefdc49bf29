"""Our backends behind QEMU's own vhost-user frontends, driven by a real Linux.

Needs no KVM: QEMU translates.  QEMU 7.2 has no generic vhost-user device, but one for entropy.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from pyvmm.errors import ConfigError
from pyvmm.guest.initramfs import build
from pyvmm.host.kernels import find_kernel

INIT = r"""
#include <fcntl.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>
int main(void)
{
    unsigned char bytes[16] = {0};
    char name[64] = {0};
    long total = 0;
    mkdir("/dev", 0755), mount("d", "/dev", "devtmpfs", 0, 0);
    mkdir("/sys", 0755), mount("s", "/sys", "sysfs", 0, 0);
    dup2(open("/dev/console", O_RDWR), 1);
    read(open("/sys/class/misc/hw_random/rng_current", O_RDONLY), name, 63);
    for (int i = 0, fd = open("/dev/hwrng", O_RDONLY); i < 200; i++)
        total += read(fd, bytes, 16);
    printf("source %s%ld bytes, the last ", name, total);
    printf("%02x%02x%02x%02x\n", bytes[0], bytes[1], bytes[2], bytes[3]);
    fflush(stdout);
    reboot(RB_POWER_OFF);
}
"""


@pytest.fixture
def kernel():
    try:
        return find_kernel("own").path
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def initramfs(tmp_path):
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    (tmp_path / "init.c").write_text(INIT)
    command = ["gcc", "-static", "-O1", "-w", "-o", tmp_path / "init", tmp_path / "init.c"]
    subprocess.run(command, check=True)
    path = tmp_path / "initramfs"
    path.write_bytes(build([], (tmp_path / "init").read_bytes()))
    return path


@pytest.mark.lab
@pytest.mark.slow
def test_entropy_device(tmp_path, kernel, initramfs):
    qemu = shutil.which("qemu-system-x86_64") or pytest.skip("QEMU is not installed")
    source = tmp_path / "source"
    source.write_bytes(b"\xde\xad\xbe\xef" * (1 << 20))
    path = str(tmp_path / "rng.sock")
    options = ["--socket-path", path, "--source", str(source)]
    with subprocess.Popen([sys.executable, "-P", "-m", "pyvmm.backend.rng", *options]) as backend:
        while not os.path.exists(path):
            assert backend.poll() is None
            time.sleep(0.05)
        machine = subprocess.run(
            [qemu, "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "256", "-nodefaults"]
            + [
                "-no-reboot",
                "-object",
                "memory-backend-memfd,id=m,size=256M,share=on",
                "-numa",
                "node,memdev=m",
            ]
            + ["-display", "none", "-serial", "stdio", "-kernel", kernel, "-initrd", str(initramfs)]
            + ["-append", "console=ttyS0 panic=-1", "-chardev", f"socket,id=c,path={path}"]
            + ["-device", "vhost-user-rng-pci,chardev=c"],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        backend.terminate()
    assert backend.returncode == 0
    found = re.search(r"source (\S+)\s+(\d+) bytes, the last (\w+)", machine.stdout)
    assert found, machine.stdout[-2000:] + machine.stderr
    assert found.groups() == ("virtio_rng.0", "3200", "deadbeef")
