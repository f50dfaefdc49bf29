"""What a virtual machine is to be: plain values, read from option texts by key tables.

It owns the keys of every `--option key=value,...`, their defaults and the checks that
need nothing but the value itself.  It opens no file, starts nothing and does not know
which device kinds exist; names of kinds stay text until the machine is built.  In one file because
an option's record, keys and checks are read together, and a second file would cost every start.
"""

from __future__ import annotations

import os

from . import options
from .errors import ConfigError
from .layout import GIB, MIB, PAGE_SIZE
from .options import Key
from .record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_CPUS = 32
MIN_MEMORY = 16 * MIB
MAX_MEMORY = 512 * GIB
MAX_QUEUES = 256
IMAGE_TYPES = ("raw", "qcow2")
CACHES = ("auto", "always", "never", "metadata")
LOSS_POLICIES = ("reconnect", "stop", "fail")
PLACEHOLDERS = ("{fd}", "{socket}")  # in `exec`, one of them, for how the backend gets its socket
TRACE_FORMATS = ("text", "json")
PCI_SLOTS = range(1, 32)  # of the one bus; in slot 0 is its host bridge
MOST_SECONDS = 10**9  # more than thirty years
PROTOCOLS = ("auto", "pvh", "linux64", "bzimage")


class CpusConfig(Record):
    """`boot` virtual CPUs, all started by the guest at boot."""

    boot: int = 1


class MemoryConfig(Record):
    """Guest RAM of `size` bytes; always shared, since backends map it."""

    size: int = 512 * MIB
    hugepages: bool = False
    prefault: bool = False


class PayloadConfig(Record):
    """The kernel, its command line and initramfs; `protocol` is auto, pvh, linux64 or bzimage."""

    kernel: str
    cmdline: str = ""
    initramfs: str = ""
    protocol: str = "auto"


class StreamConfig(Record):
    """Where a console's bytes go: off, null, tty, pty, file (path), socket (path), or an open `fd`."""

    mode: str = "null"
    path: str = ""
    fd: int = -1


class GenericDevice(Record):
    """Any vhost-user backend that listens at `socket`, is connected at descriptor `fd`, or is started
    by `exec`; with `server` it is pyvmm that listens.  `on_loss` overrides the machine's, `display` is a
    PNG file for what a GPU shows.  Of every device, `id` is the name in messages and `pci_device_id` the
    slot on the bus, 0 for a free one."""

    device_type: str
    socket: str = ""
    queue_sizes: tuple[int, ...] = ()
    fd: int = -1
    config: str = ""
    id: str = ""
    pci_device_id: int = 0
    force: bool = False
    exec: tuple[str, ...] = ()
    server: bool = False
    on_loss: str = ""
    display: str = ""


class DiskDevice(Record):
    """An image that pyvmm serves with qemu-storage-daemon."""

    path: str
    readonly: bool = False
    direct: bool = False
    num_queues: int = 1
    queue_size: int = 128
    image_type: str = ""
    id: str = ""
    pci_device_id: int = 0


class FsDevice(Record):
    """A directory that pyvmm serves with virtiofsd, or a running virtiofsd's `socket`."""

    tag: str
    dir: str = ""
    socket: str = ""
    num_queues: int = 1
    queue_size: int = 1024
    readonly: bool = False
    cache: str = ""
    id: str = ""
    pci_device_id: int = 0


class RngDevice(Record):
    """Random bytes from the file `src`."""

    src: str = "/dev/urandom"
    id: str = ""
    pci_device_id: int = 0


class NetDevice(Record):
    """A network card at the TAP interface `tap`, or at a stream socket such as passt's; `mac` is six bytes,
    or nothing for one that the driver makes up, `mtu` 0 for the usual."""

    tap: str = ""
    stream: str = ""
    mac: bytes = b""
    mtu: int = 0
    id: str = ""
    pci_device_id: int = 0


class ConsolePort(Record):
    """One further port of the console device, `name`d, carried by a connected stream socket."""

    name: str
    fd: int


class ConsoleDevice(Record):
    """virtio-console: hvc0 goes to `stream`; `ports` follow it."""

    stream: StreamConfig
    ports: tuple[ConsolePort, ...] = ()
    id: str = ""
    pci_device_id: int = 0


class TraceConfig(Record):
    """Where vhost-user messages are shown: the file `path`, or standard error; `format` is text or json."""

    path: str = ""
    format: str = "text"


class VmConfig(Record):
    """A whole machine.  `deadline` bounds every vhost-user request, in seconds, and
    `reconnect_timeout` the search for another backend after a loss (0: it has no end); with `reboot` a guest
    that asks for a restart gets one, else its run ends there; `control` is a socket for `pyvmm rings`."""

    payload: PayloadConfig
    cpus: CpusConfig = CpusConfig()
    memory: MemoryConfig = MemoryConfig()
    serial: StreamConfig = StreamConfig("null")
    devices: tuple[Record, ...] = ()
    deadline: float = 10.0
    connect_timeout: float = 10.0
    on_backend_loss: str = "reconnect"
    reconnect_timeout: float = 0.0
    reboot: bool = False
    control: str = ""
    trace: TraceConfig | None = None


def _plain_path(text: str) -> str:
    return options.string(text)


def _segment(text: str) -> int:
    if options.integer(text):
        raise ValueError("there is one PCI segment, 0")
    return 0


def _slot(text: str) -> int:
    slot = options.integer(text)
    if slot not in PCI_SLOTS:
        raise ValueError(f"a slot from {PCI_SLOTS[0]} to {PCI_SLOTS[-1]} is needed")
    return slot


COMMON_KEYS = (  # of every device
    Key("id", options.string, ""),
    Key("pci_segment", _segment, 0),
    Key("pci_device_id", _slot, 0),
)
CPUS_KEYS = (
    Key("boot", options.integer, 1),
    Key("max", options.integer),
)
MEMORY_KEYS = (
    Key("size", options.size, 512 * MIB),
    Key("shared", options.toggle, True),
    Key("hugepages", options.toggle, False),
    Key("prefault", options.toggle, False),
)
GENERIC_KEYS = (
    Key("device_type", options.string, required=True),
    Key("virtio_id", options.string, alias_of="device_type"),
    Key("socket", _plain_path, ""),
    Key("fd", options.integer, -1),
    Key("exec", lambda text: tuple(options.string(text).split()), ()),
    Key("server", options.toggle, False),
    Key("on_loss", options.string, ""),
    Key("queue_sizes", options.integers, ()),
    Key("display", _plain_path, ""),
    Key("config", options.string, ""),
    Key("force", options.toggle, False),
    *COMMON_KEYS,
)
DISK_KEYS = (
    Key("path", _plain_path, required=True),
    Key("readonly", options.toggle, False),
    Key("direct", options.toggle, False),
    Key("num_queues", options.integer, 1),
    Key("queue_size", options.integer, 128),
    Key("image_type", options.string, ""),
    *COMMON_KEYS,
)
FS_KEYS = (
    Key("tag", options.string, required=True),
    Key("dir", _plain_path, ""),
    Key("socket", _plain_path, ""),
    Key("num_queues", options.integer, 1),
    Key("queue_size", options.integer, 1024),
    Key("readonly", options.toggle, False),
    Key("cache", options.string, ""),
    *COMMON_KEYS,
)
RNG_KEYS = (
    Key("src", _plain_path, "/dev/urandom"),
    *COMMON_KEYS,
)
NET_KEYS = (
    Key("tap", options.string, ""),
    Key("stream", _plain_path, ""),
    Key("mac", options.mac, b""),
    Key("mtu", options.mtu, 0),
    *COMMON_KEYS,
)
TRACE_KEYS = (
    Key("vhost-user", _plain_path, ""),
    Key("format", options.string, "text"),
)
_STREAM_MODES = ("off", "null", "tty", "pty")
_STREAM_PATHS = ("file", "socket")


def cpus(text: str) -> CpusConfig:
    """`boot=N[,max=N]`; both must agree, CPUs are not hot-plugged."""
    values = options.parse("--cpus", text, CPUS_KEYS)
    count = values["boot"]
    if not 1 <= count <= MAX_CPUS:
        raise ConfigError(f"--cpus: boot={count}: 1 to {MAX_CPUS} virtual CPUs are possible")
    if values["max"] not in (None, count):
        raise ConfigError(f"--cpus: max={values['max']}: CPUs are not hot-plugged; use max={count}")
    return CpusConfig(count)


def memory(text: str) -> MemoryConfig:
    """`size=SIZE[,shared=on][,hugepages=][,prefault=]`."""
    values = options.parse("--memory", text, MEMORY_KEYS)
    if not values["shared"]:
        raise ConfigError("--memory: shared=off: vhost-user backends need shared memory; use shared=on")
    return MemoryConfig(check_memory("--memory", values["size"]), values["hugepages"], values["prefault"])


def check_memory(option: str, size: int) -> int:
    """`size` if a guest can have that much RAM."""
    if size % PAGE_SIZE:
        raise ConfigError(f"{option}: {size} bytes is not a multiple of the page size, {PAGE_SIZE}")
    if not MIN_MEMORY <= size <= MAX_MEMORY:
        raise ConfigError(f"{option}: {size} bytes: {MIN_MEMORY >> 20}M to {MAX_MEMORY >> 30}G is possible")
    return size


def _device(option: str, text: str, keys: tuple[Key, ...]) -> dict[str, Any]:
    """The values of a device's record; that there is one segment is known."""
    values = options.parse(option, text, keys)
    del values["pci_segment"]
    return values


def generic(text: str) -> GenericDevice:
    """`device_type=NAME|ID,socket=PATH[,queue_sizes=[N,...]][,config=HEX|@FILE]...`."""
    values = _device("--generic-vhost-user", text, GENERIC_KEYS)
    if bool(values["socket"]) + (values["fd"] >= 0) + bool(values["exec"]) != 1:
        raise ConfigError("--generic-vhost-user: exactly one of socket=, fd= and exec= is needed")
    if values["server"] and not values["socket"]:
        raise ConfigError("--generic-vhost-user: server=on: socket= must say where to listen")
    if values["exec"]:
        _check_command(" ".join(values["exec"]))
    if values["on_loss"]:
        loss_policy("--generic-vhost-user: on_loss", values["on_loss"])
    for size in values["queue_sizes"]:
        check_queue_size("--generic-vhost-user", size)
    return GenericDevice(**values)


def _check_command(command: str) -> None:
    if sum(mark in command for mark in PLACEHOLDERS) != 1:
        raise ConfigError(
            f"--generic-vhost-user: exec={command}: one of {{fd}} (a listening socket is inherited) and "
            "{socket} (the path to listen at) must be in it"
        )


def loss_policy(option: str, text: str) -> str:
    """What is done when a backend is lost."""
    _one_of(option, text or '""', LOSS_POLICIES)
    return text


def check_queue_size(option: str, size: int) -> int:
    """`size` if the specification allows it for a split virtqueue (virtio 1.2, 2.7)."""
    if not 1 <= size <= 32768 or size & (size - 1):
        raise ConfigError(f"{option}: queue size {size}: a power of two from 1 to 32768 is needed")
    return size


def disk(text: str) -> DiskDevice:
    """`path=FILE[,readonly=on][,direct=on][,num_queues=N][,queue_size=N][,image_type=raw|qcow2]`."""
    values = _device("--disk", text, DISK_KEYS)
    check_queue_size("--disk", values["queue_size"])
    if not 1 <= values["num_queues"] <= MAX_QUEUES:
        raise ConfigError(f"--disk: num_queues={values['num_queues']}: 1 to {MAX_QUEUES} is possible")
    values["image_type"] = values["image_type"].lower()
    _one_of("--disk: image_type", values["image_type"], IMAGE_TYPES)
    return DiskDevice(**values)


def fs(text: str) -> FsDevice:
    """`tag=TAG,dir=DIR` or `tag=TAG,socket=PATH`, and queue keys."""
    values = _device("--fs", text, FS_KEYS)
    if bool(values["dir"]) == bool(values["socket"]):
        raise ConfigError("--fs: one of dir= (pyvmm starts virtiofsd) and socket= (it runs) is needed")
    for key in ("readonly", "cache"):
        if values["socket"] and values[key]:
            raise ConfigError(f"--fs: {key}= needs dir=; the virtiofsd at socket= is told when you start it")
    if not 1 <= len(os.fsencode(values["tag"])) <= 36:
        raise ConfigError(f"--fs: tag={values['tag']}: 1 to 36 bytes are needed")
    if not 1 <= values["num_queues"] <= MAX_QUEUES - 1:  # one more is for what must not wait
        raise ConfigError(f"--fs: num_queues={values['num_queues']}: 1 to {MAX_QUEUES - 1} is possible")
    _one_of("--fs: cache", values["cache"], CACHES)
    check_queue_size("--fs", values["queue_size"])
    return FsDevice(**values)


def _one_of(option: str, value: str, values: tuple[str, ...]) -> None:
    if value and value not in values:
        raise ConfigError(f"{option}={value}: one of {', '.join(values)} is needed")


def rng(text: str) -> RngDevice:
    """`src=FILE`."""
    return RngDevice(**_device("--rng", text, RNG_KEYS))


def net(text: str) -> NetDevice:
    """`tap=NAME` or `stream=PATH`, and `mac=`, `mtu=`."""
    values = _device("--net", text, NET_KEYS)
    if bool(values["tap"]) == bool(values["stream"]):
        raise ConfigError("--net: one of tap= (an interface) and stream= (passt's socket) is needed")
    return NetDevice(**values)


def stream(option: str, text: str) -> StreamConfig:
    """`off`, `null`, `tty`, `pty`, `file=PATH` or `socket=PATH`."""
    mode, equals, path = text.partition("=")
    if mode in _STREAM_MODES and not equals:
        return StreamConfig(mode)
    if mode in _STREAM_PATHS and options.dequote(path):
        return StreamConfig(mode, options.dequote(path))
    raise ConfigError(f"{option}: {text!r}: off, null, tty, pty, file=PATH or socket=PATH is needed")


def trace(text: str) -> TraceConfig | None:
    """`vhost-user[=FILE][,format=text|json]`; nothing for nothing."""
    if not text:
        return None
    what, comma, rest = text.partition(",")
    if what == "vhost-user":
        text = f"{what}={comma}{rest}"
    elif not what.startswith("vhost-user="):
        raise ConfigError(f"--trace: {what!r}: vhost-user or vhost-user=FILE is needed")
    values = options.parse("--trace", text, TRACE_KEYS)
    _one_of("--trace: format", values["format"], TRACE_FORMATS)
    return TraceConfig(values["vhost-user"], values["format"])


def protocol(text: str) -> str:
    """How a kernel is entered."""
    if text not in PROTOCOLS:
        raise ConfigError(f"--protocol: {text!r}: one of {', '.join(PROTOCOLS)} is needed")
    return text


def seconds(option: str, text: str) -> float:
    """A positive number of seconds, as many as every clock can take."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MOST_SECONDS:
        raise ConfigError(
            f"{option}: {text!r}: a number of seconds above 0 is needed, such as 10 or 0.5, "
            f"and at most {MOST_SECONDS}"
        )
    return value
