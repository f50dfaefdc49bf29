"""The table of devices that are proven against real backends: one row each.

Three programs read it: the tests, the host's side (next to the KVM that runs guests) and the
guest's side.  It holds facts only and imports nothing that is slow to load in a guest.

`{sock}` is the row's socket, `{dir}` its directory on the host, `{image}` its disk image,
`{python}` the interpreter.  Rows with the same `boot` share a guest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

MIB = 1 << 20


class Row(NamedTuple):
    """One device: how it comes to be, and which proof is run with it.

    `proof` names a function in `guest_side` and one or more in `host_side`.  What both ends
    report under the same key must be equal, and `expect` is what the guest must report.
    """

    name: str
    kind: str
    boot: str
    proof: str
    backend: tuple[str, ...] = ()  # program and arguments; empty: pyvmm starts its own
    option: str = ""  # keys of --generic-vhost-user besides socket=
    words: tuple[str, ...] = ()  # or whole options of pyvmm's
    args: dict[str, Any] = {}  # noqa: RUF012 (a row is never changed)
    expect: dict[str, Any] = {}  # noqa: RUF012
    suffix: str = ""  # what the backend appends to the socket's path
    modules: tuple[str, ...] = ()  # of the host's kernel
    polls: bool = False  # without end, so that everything else must go first
    ahead: bool = False  # on the guest's one CPU and before it: what the guest sees is over
    absent: str = ""  # why it cannot be tried anywhere yet
    env: tuple[tuple[str, str], ...] = ()


FS_TAG = "device_type=fs,queue_sizes=[512,512],config=[tag={name},num_request_queues=1]"
FS_ARGS = {"megabytes": 1024, "files": 60}
FIO_OK = {"fio": 0}

ROWS = (
    Row(
        "fs-c", "fs", "files-c", "fs",
        ("/usr/lib/qemu/virtiofsd", "--socket-path={sock}", "-o", "source={dir}/fs", "-o", "sandbox=chroot",
         "-o", "xattr"),
        FS_TAG, args=FS_ARGS, expect=FIO_OK, modules=("loop",),
    ),
    Row(
        "fs-rust", "fs", "files-rust", "fs",
        ("rust-virtiofsd", "--socket-path={sock}", "--shared-dir={dir}/fs", "--sandbox=chroot", "--xattr",
         "--tag=fs-rust"),
        "device_type=fs,queue_sizes=[512,512]", args=FS_ARGS, expect=FIO_OK, modules=("loop",),
    ),
    Row(
        "blk-raw", "block", "disks", "disk",
        words=("--disk", "path={image},image_type=raw"),
        args={"size": 33 * MIB, "queues": 1}, expect=FIO_OK,
    ),
    Row(
        "blk-qcow2", "block", "queues", "disk",
        words=("--disk", "path={image},image_type=qcow2,num_queues=4"),
        args={"size": 34 * MIB, "format": "qcow2", "queues": 4}, expect=FIO_OK,
    ),
    Row(
        "blk-readonly", "block", "disks", "readonly_disk",
        words=("--disk", "path={image},readonly=on"),
        args={"size": 35 * MIB}, expect={"read_only": 1, "open": "EROFS"},
    ),
    Row(
        "scsi", "scsi", "disks", "disk",
        ("vhost-device-scsi", "--socket-path={sock}", "{image}"),
        "device_type=scsi,queue_sizes=[128,128,128]",
        args={"size": 36 * MIB}, expect=FIO_OK,
    ),
    Row(
        "rng", "rng", "talk", "rng",
        ("vhost-device-rng", "--socket-path={sock}", "--rng-source={dir}/source"),
        "device_type=rng,queue_sizes=[1024]", suffix="0",
    ),
    Row(
        "console", "console", "talk", "console",
        ("vhost-device-console", "--socket-path={sock}", "--backend=network", "--tcp-port=12345"),
        "device_type=console,queue_sizes=[128,128,128,128]", suffix="0", args={"bytes": 20_000, "keys": 100},
        ahead=True,
    ),
    Row(
        "ports", "console", "talk", "ports",
        ("{python}", "-P", "-m", "pyvmm.backend.console", "--socket-path={sock}",
         "--port", "name=first,to=socket={dir}/first", "--port", "name=second,to=socket={dir}/second"),
        "device_type=console,queue_sizes=[128,128,128,128,128,128]", args={"bytes": MIB},
    ),
    Row(
        "sound", "sound", "talk", "sound",
        ("vhost-device-sound", "--socket", "{sock}", "--backend=null"),
        "device_type=sound,queue_sizes=[64,64,64,64]", expect={"aplay": 0},
    ),
    Row(
        "echo", "63", "talk", "echo",
        ("{python}", "-P", "-m", "pyvmm.backend.echo", "--socket-path={sock}"),
        "device_type=63,queue_sizes=[256]", args={"rounds": 200}, expect={"echoed": 200},
    ),
    Row(
        "i2c", "i2c", "input", "i2c",
        ("vhost-device-i2c", "--socket-path={sock}", "--device-list=stand-in:32"),
        "device_type=i2c,queue_sizes=[1024]", suffix="0",
        env=(("LD_PRELOAD", "{dir}/preload.so"), ("I2C_ROOT", "{dir}")),
    ),
    Row(
        "gpio", "gpio", "input", "gpio",
        ("vhost-device-gpio", "--socket-path={sock}", "--device-list=0"),
        "device_type=gpio,queue_sizes=[256,256]", suffix="0",
        env=(("LD_PRELOAD", "{dir}/preload.so"), ("GPIO_ROOT", "{dir}")),
        args={"lines": 8, "levels": ["1010", "0101", "1100"]},
    ),
    Row(
        "input", "input", "input", "keyboard",
        ("vhost-device-input", "--socket-path={sock}", "--event-list={dir}/event"),
        "device_type=input,queue_sizes=[64,64]", suffix="0",
        args={"keyboard": "pyvmm test keyboard", "keys": 8},
        modules=("uhid", "hid-generic", "evdev"),
    ),
    Row(
        "vsock", "vsock", "vsock", "vsock",
        ("vhost-device-vsock", "--vm", "guest-cid=4,uds-path={dir}/host,socket={sock}"),
        "device_type=vsock,queue_sizes=[1024,1024,1024]", args={"megabytes": 100},
    ),
    Row(
        "net", "net", "net", "net",
        ("dpdk-testpmd", "--no-huge", "-m", "128", "--no-pci", "--file-prefix=pyvmm", "--lcores=0@0,1@0",
         "--vdev=net_vhost0,iface={sock},queues=1", "--vdev=net_tap0,iface=dtap0",
         "--", "--auto-start", "--forward-mode=io", "--total-num-mbufs=4096"),
        "device_type=net,queue_sizes=[256,256]", args={"megabytes": 16, "tap": "dtap0", "offloads": False},
        expect={"ping": 0}, modules=("tun",), polls=True,
    ),
    Row(
        "net-tap", "net", "tap", "net",
        ("{python}", "-P", "-m", "pyvmm.backend.net", "--socket-path={sock}", "--tap=ptap0"),
        "device_type=net", args={"megabytes": 16, "tap": "ptap0", "offloads": True},
        expect={"ping": 0}, modules=("tun",),
    ),
    Row(
        "gpu-qemu", "gpu", "gpu", "gpu",
        ("/usr/lib/qemu/vhost-user-gpu", "--socket-path={sock}"),
        "device_type=gpu,queue_sizes=[256,16],config=[num_scanouts=1],display={dir}/screen.png",
        args={"size": [1024, 768], "card": 0},
    ),
    Row(
        "gpu-null", "gpu", "gpu", "frame",
        ("vhost-device-gpu", "--socket-path={sock}", "--gpu-mode=null"),
        "device_type=gpu,queue_sizes=[256,16]", args={"card": 1}, expect={"frame": True},
    ),
    Row(
        "blk-flush", "block", "talk", "flush",
        words=("--disk", "path={image},image_type=raw"), args={"size": 37 * MIB, "queues": 1},
    ),
    Row(
        "can", "can", "", "",
        absent="Linux 6.1 has no driver, nor has 6.12 of Debian's backports, and the lab's kernel no vcan",
    ),
)  # fmt: skip
