"""Our backends behind QEMU's own vhost-user frontends, driven by a real Linux.

Needs no KVM: QEMU translates.  QEMU 7.2 has no generic vhost-user device, but one for entropy
and one for blocks, which reconnects.
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

RNG_INIT = r"""
    unsigned char bytes[16] = {0};
    char name[64] = {0};
    long total = 0;
    mkdir("/sys", 0755), mount("s", "/sys", "sysfs", 0, 0);
    read(open("/sys/class/misc/hw_random/rng_current", O_RDONLY), name, 63);
    for (int i = 0, fd = open("/dev/hwrng", O_RDONLY); i < 200; i++)
        total += read(fd, bytes, 16);
    printf("source %s%ld bytes, the last ", name, total);
    printf("%02x%02x%02x%02x\n", bytes[0], bytes[1], bytes[2], bytes[3]);
"""
ROUNDS, BLOCKS = 30, 64
BLK_INIT = r"""
    static unsigned int block[1024] __attribute__((aligned(4096)));
    int fd = open("/dev/vda", O_RDWR | O_DIRECT), bad = 0;
    for (unsigned round = 0; round < ROUNDS; round++) {
        for (unsigned i = 0; i < BLOCKS; i++) {
            for (unsigned j = 0; j < 1024; j++)
                block[j] = round * 1000003 + i * 1009 + j;
            bad += pwrite(fd, block, 4096, i * 4096) != 4096;
        }
        bad += fdatasync(fd);
        printf("round %u\n", round), fflush(stdout);
    }
    for (unsigned i = 0; i < BLOCKS; i++) {
        bad += pread(fd, block, 4096, i * 4096) != 4096;
        for (unsigned j = 0; j < 1024; j++)
            bad += block[j] != (ROUNDS - 1) * 1000003 + i * 1009 + j;
    }
    printf("errors %d\n", bad);
"""
INIT = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>
int main(void)
{
    mkdir("/dev", 0755), mount("d", "/dev", "devtmpfs", 0, 0);
    dup2(open("/dev/console", O_RDWR), 1);
    BODY
    fflush(stdout);
    reboot(RB_POWER_OFF);
}
"""

pytestmark = [pytest.mark.lab, pytest.mark.slow]


@pytest.fixture
def kernel():
    try:
        return find_kernel("own").path
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def machine(tmp_path, kernel):
    """Start QEMU with `device` behind the socket `path`, and a first process that does `body`."""
    qemu = shutil.which("qemu-system-x86_64") or pytest.skip("QEMU is not installed")
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    running = []

    def machine(body, path, device, chardev=""):
        (tmp_path / "init.c").write_text(INIT.replace("BODY", body))
        defines = [f"-DROUNDS={ROUNDS}", f"-DBLOCKS={BLOCKS}"]
        command = ["gcc", "-static", "-O1", "-w", *defines, "-o", tmp_path / "init", tmp_path / "init.c"]
        subprocess.run(command, check=True)
        initramfs = tmp_path / "initramfs"
        initramfs.write_bytes(build([], (tmp_path / "init").read_bytes()))
        options = [
            "-machine",
            "q35",
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-m",
            "256",
            "-nodefaults",
            "-no-reboot",
        ]
        options += ["-object", "memory-backend-memfd,id=m,size=256M,share=on", "-numa", "node,memdev=m"]
        options += ["-display", "none", "-serial", "stdio", "-kernel", kernel, "-initrd", str(initramfs)]
        options += ["-append", "console=ttyS0 panic=-1 quiet"]
        options += ["-chardev", f"socket,id=c,path={path}{chardev}", "-device", f"{device},chardev=c"]
        running.append(subprocess.Popen([qemu, *options], stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield machine
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def backend(tmp_path):
    """Start one of our programs at `path`; whatever runs is ended after the test."""
    running = []

    def backend(kind, path, *options):
        command = [sys.executable, "-P", "-m", f"pyvmm.backend.{kind}", "--socket-path", path, *options]
        running.append(subprocess.Popen(command))
        while not os.path.exists(path):
            assert running[-1].poll() is None
            time.sleep(0.05)
        return running[-1]

    yield backend
    for process in running:
        process.kill()
        process.wait()


def test_entropy_device(tmp_path, machine, backend):
    source, path = tmp_path / "source", str(tmp_path / "rng.sock")
    source.write_bytes(b"\xde\xad\xbe\xef" * (1 << 20))
    process = backend("rng", path, "--source", str(source))
    output, _ = machine(RNG_INIT, path, "vhost-user-rng-pci").communicate(timeout=200)
    process.terminate()
    assert process.wait(10) == 0
    found = re.search(r"source (\S+)\s+(\d+) bytes, the last (\w+)", output)
    assert found, output[-2000:]
    assert found.groups() == ("virtio_rng.0", "3200", "deadbeef")


@pytest.mark.parametrize("packed", ["off", "on"])
def test_block_device(tmp_path, machine, backend, packed):
    """With split rings the backend is killed and started again, time after time."""
    image, path = tmp_path / "image", str(tmp_path / "blk.sock")
    image.write_bytes(bytes(BLOCKS * 4096))
    process = backend("blk", path, "--blk-file", str(image), "--num-queues", "2")
    device = f"vhost-user-blk-pci,num-queues=2,packed={packed}"
    qemu = machine(BLK_INIT, path, device, ",reconnect=1")
    lines = []
    for line in qemu.stdout:
        lines.append(line)
        if packed == "off" and re.match(r"round \d*[05]$", line.strip()):
            process.kill()
            process.wait()
            os.unlink(path)
            process = backend("blk", path, "--blk-file", str(image), "--num-queues", "2")
    output = "".join(lines)
    assert f"round {ROUNDS - 1}" in output, output[-2000:]
    assert "errors 0" in output, output[-2000:]
    words = memoryview(image.read_bytes()).cast("I")
    last = (ROUNDS - 1) * 1000003
    assert all(words[1024 * i + j] == last + i * 1009 + j for i in range(BLOCKS) for j in range(1024))
