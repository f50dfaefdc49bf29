"""Our backends behind QEMU's own vhost-user frontends, driven by a real Linux.

Needs no KVM: QEMU translates.  QEMU 7.2 has no generic vhost-user device, but one for entropy,
one for networks, and one for blocks, which reconnects.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
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
FRAMES, EXPERIMENT = 100, 0x88B5  # a number that IEEE 802 leaves to experiments
NET_INIT = r"""
    unsigned char frame[1514] = {0}, back[2000];
    struct ifreq request = {.ifr_name = "eth0"};
    int fd = socket(AF_PACKET, SOCK_RAW, htons(EXPERIMENT)), bad = 0;
    struct sockaddr_ll card = {.sll_family = AF_PACKET, .sll_protocol = htons(EXPERIMENT)};
    ioctl(fd, SIOCGIFHWADDR, &request), memcpy(frame + 6, request.ifr_hwaddr.sa_data, 6);
    ioctl(fd, SIOCGIFMTU, &request), printf("mtu %d\n", request.ifr_mtu);
    request.ifr_flags = IFF_UP, ioctl(fd, SIOCSIFFLAGS, &request);
    ioctl(fd, SIOCGIFINDEX, &request), card.sll_ifindex = request.ifr_ifindex;
    bind(fd, (struct sockaddr *)&card, sizeof card);
    frame[0] = 2, frame[12] = EXPERIMENT >> 8, frame[13] = EXPERIMENT & 0xff;
    for (int i = 0; i < FRAMES; i++) {
        int size = 60 + i * 13;
        memset(frame + 14, i + 1, size - 14);
        bad += write(fd, frame, size) != size;
        do {
            if (recv(fd, back, sizeof back, 0) < 14) bad++;
        } while (!memcmp(back + 6, frame + 6, 6));
        bad += back[14] != (unsigned char)~(i + 1) || back[size - 1] != (unsigned char)~(i + 1);
    }
    printf("card %02x:%02x, errors %d\n", frame[6], frame[11], bad);
"""
INIT = r"""
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
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
    """Start QEMU with the device of `words`, which name the socket `path` as `c`; /init does `body`."""
    qemu = shutil.which("qemu-system-x86_64") or pytest.skip("QEMU is not installed")
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    running = []

    def machine(body, path, *words, chardev=""):
        (tmp_path / "init.c").write_text(INIT.replace("BODY", body))
        numbers = {"ROUNDS": ROUNDS, "BLOCKS": BLOCKS, "FRAMES": FRAMES, "EXPERIMENT": EXPERIMENT}
        defines = [f"-D{name}={value}" for name, value in numbers.items()]
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
        options += ["-chardev", f"socket,id=c,path={path}{chardev}", *words]
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
    output, _ = machine(RNG_INIT, path, "-device", "vhost-user-rng-pci,chardev=c").communicate(timeout=200)
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
    device = f"vhost-user-blk-pci,num-queues=2,packed={packed},chardev=c"
    qemu = machine(BLK_INIT, path, "-device", device, chardev=",reconnect=1")
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


@pytest.mark.parametrize("packed", ["off", "on"])
def test_network_device(tmp_path, machine, backend, packed):
    """Frames of every size come back with their bytes turned over, from the other end of the stream."""
    path, stream = str(tmp_path / "net.sock"), str(tmp_path / "stream")
    with socket.create_server(stream, family=socket.AF_UNIX) as listener:
        mirror = threading.Thread(target=turn_over, args=(listener,))
        mirror.start()
        process = backend("net", path, "--stream", stream, "--mac", "52:54:00:12:34:56", "--mtu", "1400")
        netdev = ("-netdev", "vhost-user,id=n,chardev=c", "-device")
        card = f"virtio-net-pci,netdev=n,mac=52:54:00:12:34:56,host_mtu=1400,romfile=,packed={packed}"
        card += ",vectors=0"  # with vectors QEMU 7.2 itself crashes where KVM does not deliver them
        output, _ = machine(NET_INIT, path, *netdev, card).communicate(timeout=200)
        process.terminate()
        assert process.wait(10) == 0
        mirror.join()
    assert "mtu 1400" in output and "card 52:56, errors 0" in output, output[-2000:]


def turn_over(listener):
    """Send every frame of the experiment back, from another address, until the stream closes."""
    peer, _ = listener.accept()
    with peer, peer.makefile("rb") as frames:
        while length := frames.read(4):
            frame = frames.read(int.from_bytes(length, "big"))
            if frame[12:14] == EXPERIMENT.to_bytes(2, "big"):
                body = bytes(byte ^ 0xFF for byte in frame[14:])
                peer.sendall(length + frame[6:12] + frame[:6] + frame[12:14] + body)
