"""Who drives each kind of device and who serves it, for people who choose a backend.

It owns names: Linux configuration options of the drivers, and command lines of programs that
speak vhost-user.  Keyed by the ids of `kinds`; nothing that a running machine does depends on
it, and no module of a machine imports it.

Sources: Kconfig of Linux, the programs' `--help`.
"""

from __future__ import annotations

from ..record import Record


class Backend(Record):
    """A program that serves a device at `{socket}`, and what its `--generic-vhost-user` needs besides."""

    command: str
    keys: str = ""

    @property
    def program(self) -> str:
        """What runs; a module of ours by its name."""
        words = self.command.split()
        return words[2] if words[1:2] == ["-m"] else words[0]

    def listens_at(self, socket: str) -> str:
        """Where it listens when it is given `socket`: some append the number of the guest, from 0."""
        return f"{socket}0" if self.program in NUMBERED else socket


class Served(Record):
    """Drivers and backends of one kind.

    `drivers` are CONFIG names without the prefix, `newer` when Linux 6.1 does not have them.  `backends`
    are known to work, by tests that move data through them; `untested` are other programs.  `option` is
    the one of ours that starts a backend of its own.
    """

    drivers: tuple[str, ...] = ()
    backends: tuple[Backend, ...] = ()
    untested: tuple[Backend, ...] = ()
    newer: bool = False
    option: str = ""


NUMBERED = tuple(f"vhost-device-{name}" for name in ("can", "console", "gpio", "i2c", "input", "rng", "spi"))


def _ours(name: str, options: str = "") -> Backend:
    return Backend(f"python3 -m pyvmm.backend.{name} --socket-path {{socket}}{options}")


def _rust(name: str, options: str = "", path: str = "--socket-path") -> Backend:
    return Backend(f"vhost-device-{name} {path} {{socket}}{options}")


_QEMU_DISK = Backend(
    "qemu-storage-daemon --blockdev driver=file,node-name=disk,filename=disk.raw"
    " --export type=vhost-user-blk,id=disk,node-name=disk,writable=on,addr.type=unix,addr.path={socket}"
)
_QEMU_GPU = Backend("vhost-user-gpu --socket-path {socket}", "config=[num_scanouts=1],display=screen.png")
_TESTPMD = Backend(
    "dpdk-testpmd --no-pci --vdev net_vhost0,iface={socket},queues=1 --vdev net_tap0 -- --auto-start"
)
_PASST = Backend("passt --vhost-user --socket {socket}")
_VIRTIOFSD = Backend("virtiofsd --socket-path {socket} --shared-dir . --tag root")
_VSOCK = Backend("vhost-device-vsock --vm guest-cid=4,uds-path=/run/host,socket={socket}")

SERVED = {
    1: Served(("VIRTIO_NET",), (_TESTPMD, _ours("net", " --tap tap0")), (_PASST,)),
    2: Served(
        ("VIRTIO_BLK",), (_QEMU_DISK, _ours("blk", " --blk-file disk.raw")), option="--disk path=disk.raw"
    ),
    3: Served(
        ("VIRTIO_CONSOLE",), (_ours("console"), _rust("console", " --backend network --tcp-port 12345")),
        option="--console tty",
    ),
    4: Served(("HW_RANDOM_VIRTIO",), (_ours("rng"), _rust("rng")), option="--rng src=/dev/urandom"),
    5: Served(("VIRTIO_BALLOON",)),
    7: Served(("RPMSG_VIRTIO",)),
    8: Served(("SCSI_VIRTIO",), (_rust("scsi", " disk.raw"),)),
    9: Served(("NET_9P_VIRTIO",)),
    11: Served(("VIRTIO_CONSOLE",)),
    12: Served(("CAIF_VIRTIO",)),
    16: Served(("DRM_VIRTIO_GPU",), (_QEMU_GPU, _rust("gpu", " --gpu-mode null"))),
    17: Served(("VIRTIO_RTC",), (), (_rust("rtc", path="--socket"),), True),
    18: Served(("VIRTIO_INPUT",), (_rust("input", " --event-list /dev/input/event0"),)),
    19: Served(("VIRTIO_VSOCKETS",), (_VSOCK,)),
    20: Served(("CRYPTO_DEV_VIRTIO",)),
    23: Served(("VIRTIO_IOMMU",)),
    24: Served(("VIRTIO_MEM",)),
    25: Served(("SND_VIRTIO",), (_rust("sound", " --backend null", "--socket"),)),
    26: Served(("VIRTIO_FS",), (_VIRTIOFSD,), option="--fs tag=root,dir=."),
    27: Served(("VIRTIO_PMEM",)),
    29: Served(("MAC80211_HWSIM",)),
    32: Served(("ARM_SCMI_TRANSPORT_VIRTIO",), (), (_rust("scmi", " --device fake,name=a", "--socket"),)),
    33: Served(("NSM",), newer=True),
    34: Served(("I2C_VIRTIO",), (_rust("i2c", " --device-list 0:32"),)),
    36: Served(("CAN_VIRTIO_CAN",), (), (_rust("can", " --can-devices vcan0"),), True),
    40: Served(("BT_VIRTIO",)),
    41: Served(("GPIO_VIRTIO",), (_rust("gpio", " --device-list 0"),)),
    45: Served(("SPI_VIRTIO",), (), (_rust("spi", " --device /dev/spidev0.0"),), True),
    48: Served((), (), (_rust("media", " --backend null"),)),
    63: Served((), (_ours("echo"),)),
}  # fmt: skip
