"""Who drives each kind of device and who serves it, for people who choose a backend.

It owns names: Linux configuration options of the drivers, and command lines of programs that
speak vhost-user.  Keyed by the ids of `kinds`; nothing that a running machine does depends on
it, and no module of a machine imports it.

Sources: Kconfig of Linux, the programs' `--help`.
"""

from __future__ import annotations

from ..record import Record


class Served(Record):
    """Drivers and backends of one kind.

    `drivers` are CONFIG names without the prefix, `newer` when Linux 6.1 does not have them.  `backends`
    are known to work, by tests that move data through them; `untested` are other programs.  Both are
    command lines with `{socket}` where the socket's path belongs.  `option` is the one of ours that starts
    a backend of its own.
    """

    drivers: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    untested: tuple[str, ...] = ()
    newer: bool = False
    option: str = ""


# These append the number of the guest to the path that they are given, from 0.
NUMBERED = tuple(f"vhost-device-{name}" for name in ("can", "console", "gpio", "i2c", "input", "rng", "spi"))


def program(command: str) -> str:
    """What runs when `command` does; a module of ours by its name."""
    words = command.split()
    return words[2] if words[1:2] == ["-m"] else words[0]


def listens_at(command: str, socket: str) -> str:
    """Where `command` listens when it is given `socket`."""
    return f"{socket}0" if program(command) in NUMBERED else socket


_QEMU_DISK = (
    "qemu-storage-daemon --blockdev driver=file,node-name=disk,filename=disk.raw"
    " --export type=vhost-user-blk,id=disk,node-name=disk,writable=on,addr.type=unix,addr.path={socket}"
)
_VIRTIOFSD = "virtiofsd --socket-path {socket} --shared-dir . --tag root"
_CONSOLE = "python3 -m pyvmm.backend.console --socket-path {socket}"
_NETWORK_CONSOLE = "vhost-device-console --socket-path {socket} --backend network --tcp-port 12345"
_RNG = "python3 -m pyvmm.backend.rng --socket-path {socket}"
_VSOCK = "vhost-device-vsock --vm guest-cid=4,uds-path=/run/host,socket={socket}"

SERVED = {
    1: Served(("VIRTIO_NET",), (), ("passt --vhost-user --socket {socket}",)),
    2: Served(("VIRTIO_BLK",), (_QEMU_DISK,), option="--disk path=disk.raw"),
    3: Served(("VIRTIO_CONSOLE",), (_CONSOLE, _NETWORK_CONSOLE), option="--console tty"),
    4: Served(
        ("HW_RANDOM_VIRTIO",), (_RNG, "vhost-device-rng --socket-path {socket}"),
        option="--rng src=/dev/urandom",
    ),
    5: Served(("VIRTIO_BALLOON",)),
    7: Served(("RPMSG_VIRTIO",)),
    8: Served(("SCSI_VIRTIO",), ("vhost-device-scsi --socket-path {socket} disk.raw",)),
    9: Served(("NET_9P_VIRTIO",)),
    11: Served(("VIRTIO_CONSOLE",)),
    12: Served(("CAIF_VIRTIO",)),
    16: Served(("DRM_VIRTIO_GPU",), (), ("vhost-device-gpu --socket-path {socket} --gpu-mode null",)),
    17: Served(("VIRTIO_RTC",), (), ("vhost-device-rtc --socket {socket}",), True),
    18: Served(
        ("VIRTIO_INPUT",), (), ("vhost-device-input --socket-path {socket} --event-list /dev/input/event0",)
    ),
    19: Served(("VIRTIO_VSOCKETS",), (_VSOCK,)),
    20: Served(("CRYPTO_DEV_VIRTIO",)),
    23: Served(("VIRTIO_IOMMU",)),
    24: Served(("VIRTIO_MEM",)),
    25: Served(("SND_VIRTIO",), ("vhost-device-sound --socket {socket} --backend null",)),
    26: Served(("VIRTIO_FS",), (_VIRTIOFSD,), option="--fs tag=root,dir=."),
    27: Served(("VIRTIO_PMEM",)),
    29: Served(("MAC80211_HWSIM",)),
    32: Served(("ARM_SCMI_TRANSPORT_VIRTIO",), (), ("vhost-device-scmi --socket {socket} --device fake",)),
    33: Served(("NSM",), newer=True),
    34: Served(("I2C_VIRTIO",), (), ("vhost-device-i2c --socket-path {socket} --device-list 0:32",)),
    36: Served(
        ("CAN_VIRTIO_CAN",), (), ("vhost-device-can --socket-path {socket} --can-devices vcan0",), True
    ),
    40: Served(("BT_VIRTIO",)),
    41: Served(("GPIO_VIRTIO",), (), ("vhost-device-gpio --socket-path {socket} --device-list 0",)),
    45: Served(
        ("SPI_VIRTIO",), (), ("vhost-device-spi --socket-path {socket} --device /dev/spidev0.0",), True
    ),
    63: Served((), ("python3 -m pyvmm.backend.echo --socket-path {socket}",)),
    48: Served((), (), ("vhost-device-media --socket-path {socket} --backend null",)),
}  # fmt: skip
