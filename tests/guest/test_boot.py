"""`pyvmm boot`: cloud-hypervisor's command line, kernel formats and protocols, devices, crashes."""

from __future__ import annotations

import hashlib
import shutil
import stat
import struct
import subprocess
from pathlib import Path

import pytest
from guest.machines import Machine

from pyvmm.guest import cpio
from pyvmm.host.backends import find_programs, is_c_virtiofsd
from pyvmm.host.kernels import Kernel

pytestmark = pytest.mark.slow

APPLETS = (
    *("cat", "dd", "echo", "grep", "head", "md5sum", "mount", "poweroff"),
    *("reboot", "sh", "sleep", "sync", "touch", "umount"),
)
SECTOR, FIRST, LINUX = 512, 2048, 0x83
INIT = """#!/bin/busybox sh
export PATH=/bin
mount -t devtmpfs dev /dev 2>/dev/null; mount -t proc proc /proc; mount -t sysfs sys /sys
{body}
sync
poweroff -f
"""


def disk_image(folder: Path, body: str) -> Path:
    """A partitioned raw disk with ext4 and busybox, whose init runs `body` and powers off."""
    tree = folder / "tree"
    for name in ("bin", "dev", "proc", "sys", "sbin", "mnt"):
        (tree / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin")
    for applet in APPLETS:
        (tree / "bin" / applet).symlink_to("busybox")
    init = tree / "sbin" / "init"
    init.write_text(INIT.format(body=body))
    init.chmod(0o755)
    part, image = folder / "part.ext4", folder / "image.raw"
    subprocess.run(["mkfs.ext4", "-q", "-d", tree, part, "24M"], check=True)
    with image.open("wb") as file:
        file.truncate(FIRST * SECTOR)
        file.seek(FIRST * SECTOR)
        file.write(part.read_bytes())
        file.truncate(file.tell() + 2048 * SECTOR)
    with image.open("r+b") as file:
        file.seek(446)
        file.write(struct.pack("<4xB3xII", LINUX, FIRST, part.stat().st_size // SECTOR))
        file.seek(510)
        file.write(b"\x55\xaa")
    return image


VIRTIOFSD = "/usr/lib/qemu/virtiofsd"
CONFIG = (b"myfs".ljust(36, b"\0") + b"\1\0\0\0").hex()
# QEMU's has no configuration space of its own; with the one in Rust the line is cloud-hypervisor's whole
SERVERS = {
    "c": (lambda path: path == VIRTIOFSD, "-o source={} -o sandbox=chroot", f",config={CONFIG}"),
    "rust": (lambda path: not is_c_virtiofsd(path), "--shared-dir={} --sandbox=chroot --tag=myfs", ""),
}


@pytest.mark.parametrize("server", SERVERS)
def test_cloud_hypervisors_command_line(machine: Machine, own: Kernel, scratch: Path, server: str) -> None:
    """The line of cloud-hypervisor's documentation: a disk, and virtiofsd on a socket with an odd name."""
    ours, arguments, more = SERVERS[server]
    program = next(filter(ours, find_programs("virtiofsd")), None)
    if program is None:
        pytest.skip(f"the {server} virtiofsd is not installed; scripts/backends")
    shared = scratch / "shared"
    shared.mkdir()
    (shared / "hello").write_text("from virtiofsd\n")
    body = "mount -t virtiofs myfs /mnt && cat /mnt/hello; echo back >/mnt/answer; "
    body += "mount | grep ' / '; umount /mnt"
    image = disk_image(scratch, body)
    script = f"""
        cd $(mktemp -d); sock="$PWD/a\\"b,c.sock"
        {program} --socket-path="$sock" {arguments.format(shared)} &
        while ! [ -S "$sock" ]; do sleep 0.1; done
        {machine.pyvmm_words} --cpus boot=1 --memory size=1G,shared=on \\
            --disk path={image} --kernel {own.path} \\
            --cmdline "console=hvc0 panic=-1 root=/dev/vda1 rw" \\
            --generic-vhost-user \\
                "socket=\\"${{sock//\\"/\\"\\"}}\\",virtio_id=26,queue_sizes=[512,512]{more}"
    """
    done = machine.run("bash", "-c", script, timeout=200).ok()
    console = done.stdout.decode()
    assert "from virtiofsd" in console, repr(done)
    assert "/dev/root on / type ext4 (rw" in console, repr(done)
    assert (shared / "answer").read_text() == "back\n"


@pytest.mark.parametrize("image_type", ["raw", "qcow2"])
def test_disks_keep_what_is_written(machine: Machine, own: Kernel, scratch: Path, image_type: str) -> None:
    body = (
        "cat /sys/block/vd?/size; dd if=/dev/urandom of=/data bs=1M count=8 2>/dev/null; md5sum </data;"
        "dd if=/data of=/dev/vdb bs=1M conv=fsync 2>/dev/null; "
        "dd if=/dev/vdb bs=1M count=8 2>/dev/null | md5sum"
    )
    root = disk_image(scratch, body)
    second = scratch / "second"
    subprocess.run(["qemu-img", "create", "-q", "-f", image_type, second, "16M"], check=True)
    done = machine.pyvmm(
        "--kernel", own.path, "--disk", f"path={root}", f"path={second},num_queues=2,image_type={image_type}",
        "--cpus", "boot=2", "--cmdline", "console=hvc0 panic=-1 root=/dev/vda1 rw quiet",
    ).ok()  # fmt: skip
    lines = done.stdout.decode().split()
    assert "32768" in lines, repr(done)
    sums = [word for word in lines if len(word) == 32]
    assert len(sums) == 2 and sums[0] == sums[1], repr(done)


def test_a_read_only_disk_cannot_be_written(machine: Machine, own: Kernel, scratch: Path) -> None:
    body = "mount | grep ' / '; cat /sys/block/vda/ro; mount -o remount,rw / || echo refused"
    image = disk_image(scratch, body)
    before = image.read_bytes()
    done = machine.pyvmm(
        "--kernel",
        own.path,
        "--disk",
        f"path={image},readonly=on",
        "--cmdline",
        "console=hvc0 panic=-1 root=/dev/vda1 quiet",
    ).ok()
    assert "refused" in done.stdout.decode(), repr(done)
    assert image.read_bytes() == before


@pytest.fixture(scope="session")
def tiny_initramfs(machine: Machine) -> Path:
    """busybox, and an init that says what it sees and powers off."""
    init = INIT.format(body="echo reached; grep -c . /proc/cmdline; head -c 20000 /bin/busybox | md5sum")
    entries = [cpio.directory(name) for name in ("bin", "dev", "proc", "sys")]
    entries += [cpio.character("dev/console", 5, 1), cpio.regular("init", init.encode(), 0o755)]
    entries.append(cpio.regular("bin/busybox", Path("/bin/busybox").read_bytes(), 0o755))
    entries += [cpio.Entry(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox") for name in APPLETS]
    path = machine.shared / "tiny.cpio"
    path.write_bytes(cpio.archive(entries))
    return path


@pytest.mark.parametrize(
    ("kernel", "protocol"), [("own", "pvh"), ("own", "linux64"), ("debian", "bzimage"), ("debian", "auto")]
)
def test_kernel_formats_and_entries(
    machine: Machine, own: Kernel, debian_kernel: Kernel, tiny_initramfs: Path, kernel: str, protocol: str
) -> None:
    """Each entry gets to the initramfs, whose contents are what was put in."""
    path = own.path if kernel == "own" else debian_kernel.path
    done = machine.pyvmm(
        "boot", "--kernel", path, "--initramfs", tiny_initramfs, "--protocol", protocol, "--console", "off",
        "--serial", "tty", "--cmdline", "console=ttyS0 panic=-1 quiet",
    ).ok()  # fmt: skip
    digest = hashlib.md5(Path("/bin/busybox").read_bytes()[:20000]).hexdigest()
    assert b"reached" in done.stdout and digest.encode() in done.stdout, repr(done)


def test_interrupts_without_msi_work(machine: Machine, own: Kernel, scratch: Path) -> None:
    """With pci=nomsi every device shares a level-triggered line, which must rise and fall right."""
    body = "dd if=/dev/vda of=/dev/null bs=64k count=64 2>/dev/null && grep virtio /proc/interrupts; "
    body += "echo finished"
    image = disk_image(scratch, body)
    done = machine.pyvmm(
        "--kernel", own.path, "--disk", f"path={image}",
        "--cmdline", "console=hvc0 panic=-1 root=/dev/vda1 ro quiet pci=nomsi",
    ).ok()  # fmt: skip
    assert "fasteoi" in done.stdout.decode() and "finished" in done.stdout.decode(), repr(done)


def test_random_bytes_come_from_the_file_given(machine: Machine, own: Kernel, scratch: Path) -> None:
    (scratch / "source").write_bytes(b"not random at all " * 100000)
    body = "head -c 64 /dev/hwrng >/tmp/x 2>/dev/null || head -c 64 /dev/hwrng; echo; echo finished"
    image = disk_image(scratch, body)
    done = machine.pyvmm(
        "--kernel", own.path, "--disk", f"path={image}", "--rng", f"src={scratch / 'source'}",
        "--cmdline", "console=hvc0 panic=-1 root=/dev/vda1 ro quiet",
    ).ok()  # fmt: skip
    assert b"not random at all" in done.stdout, repr(done)


def test_the_serial_port_goes_to_a_file(machine: Machine, own: Kernel, scratch: Path) -> None:
    image = disk_image(scratch, "echo over the wire >/dev/ttyS0; echo finished")
    done = machine.pyvmm(
        "--kernel", own.path, "--disk", f"path={image}", "--serial", f"file={scratch / 'serial'}",
        "--cmdline", "console=hvc0 panic=-1 root=/dev/vda1 ro quiet",
    ).ok()  # fmt: skip
    assert b"finished" in done.stdout, repr(done)
    assert b"over the wire" in (scratch / "serial").read_bytes()


def test_the_console_has_the_terminals_size(machine: Machine, own: Kernel, scratch: Path) -> None:
    """A lone console is there before the first process, which makes the size known by its first output."""
    body = "echo first; sleep 1; stty size </dev/console; cat /proc/consoles; "
    body += "until stty size </dev/console | grep '10 90'; do sleep 1; done"
    image = disk_image(scratch, body)
    typescript = scratch / "typescript"
    terminal = f"""
        stty rows 43 cols 132
        (until grep -q '^43 132' {typescript}; do sleep 0.5; done; stty rows 10 cols 90) </dev/tty &
        exec {machine.pyvmm_words} --kernel {own.path} --disk path={image} \\
            --cmdline 'console=hvc0 panic=-1 root=/dev/vda1 quiet'
    """
    done = machine.run("script", "-qfec", terminal, typescript, timeout=100).ok()
    lines = done.stdout.decode().split("\r\n")
    assert lines.index("first") < lines.index("43 132") < lines.index("10 90"), repr(done)
    assert any(row.startswith("hvc0") for row in lines), repr(done)


def test_a_triple_fault_is_reported(machine: Machine, own: Kernel, scratch: Path) -> None:
    """reboot=t makes Linux end by a triple fault."""
    image = disk_image(scratch, "reboot -f")
    done = machine.pyvmm(
        "--kernel",
        own.path,
        "--disk",
        f"path={image}",
        "--cmdline",
        "console=hvc0 panic=-1 root=/dev/vda1 ro quiet reboot=t",
        faults=True,
    )
    assert done.status == 126, repr(done)
    assert b"triple fault" in done.stderr, repr(done)


def test_a_lost_backend_costs_its_device_and_nothing_else(
    machine: Machine, own: Kernel, scratch: Path
) -> None:
    """The file server is killed under a running guest: its device fails, the disk goes on."""
    (scratch / "shared").mkdir()
    body = (
        "mount -t virtiofs myfs /mnt && touch /mnt/ready; sleep 4;"
        "dd if=/dev/vda of=/dev/null bs=64k count=64 2>/dev/null && echo disk lives;"
        "poweroff -n -f"  # sync would wait for the lost file system
    )
    image = disk_image(scratch, body)
    script = f"""
        cd $(mktemp -d)
        {VIRTIOFSD} --socket-path=fs.sock -o source={scratch}/shared -o sandbox=chroot & pid=$!
        while ! [ -S fs.sock ]; do sleep 0.1; done
        (while ! [ -e {scratch}/shared/ready ]; do sleep 0.1; done; pkill -9 -P $pid; kill -9 $pid) &
        {machine.pyvmm_words} --kernel {own.path} --disk path={image} \\
            --cmdline "console=hvc0 panic=-1 root=/dev/vda1 ro quiet" \\
            --generic-vhost-user "socket=fs.sock,device_type=fs,queue_sizes=[512,512],config={CONFIG}"
    """
    done = machine.run("bash", "-c", script, timeout=200).ok()
    assert b"disk lives" in done.stdout, repr(done)
    assert b"closed the connection" in done.stderr or b"lost" in done.stderr, repr(done)
