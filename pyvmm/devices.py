"""From device options to vhost-user backends: which kind, which queues, who serves it.

It owns the conveniences (`--disk`, `--fs`, `--console`, `--rng`, `--net` start a backend each) and
the checks that need the table of kinds.  Every one of them ends as the same thing, a
`Prepared` device that the generic frontend connects to; there is no second device model.
What only some of the options need is imported by their functions.
"""

from __future__ import annotations

import os
import stat

from . import config as cfg
from . import options
from .errors import ConfigError
from .files import check_apart, open_file
from .virtio import kinds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from .backend.device import Device
    from .backend.process import ConsoleProcess, DeviceProcess
    from .backend.wire import Wire
    from .loop import EventLoop
    from .record import Record
    from .streams import Stream
    from .vhost_user.client import Client
    from .vhost_user.endpoint import Endpoint
    from .vhost_user.frontend import Frontend
    from .vhost_user.gpu import Screen
    from .vhost_user.memory import GuestRam
    from .vhost_user.trace import Trace
    from .virtio.kinds import Kind

MAX_ID = 0x3F  # 0x1040 + id must stay below 0x1080 (virtio 1.2, 4.1.2.1)
GPU = 16


class Prepared:
    """A device whose backend is known, or started already, and not yet connected to."""

    def __init__(
        self,
        name: str,
        kind: Kind,
        queue_sizes: tuple[int, ...],
        where: Endpoint | str | int,
        *,
        config: bytes | None = None,
        backend: Any = None,
        force: bool = False,
        on_loss: str = "",
        display: str | None = None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.queue_sizes = queue_sizes
        self._where = where
        self._config = config
        self._backend = backend
        self._force = force
        self._on_loss = on_loss
        self._display = display
        self._screen: Screen | None = None
        self.stream: Stream | None = None
        self.resize: Callable[[], object] | None = None  # the stream has another size now
        self.before_waiting: Callable[[], object] | None = None  # see Endpoint

    def connect(
        self, ram: GuestRam, loop: EventLoop, config: cfg.VmConfig, trace: Trace | None = None
    ) -> Frontend:
        """The frontend, connected and negotiated; raises ConfigError."""
        from .vhost_user.endpoint import endpoint
        from .vhost_user.frontend import Frontend

        where = endpoint(self._where)
        where.before_waiting = self.before_waiting or where.before_waiting
        return Frontend(
            where,
            self.kind,
            self.queue_sizes,
            self._config,
            ram,
            loop,
            config.deadline,
            self.name,
            connect_timeout=config.connect_timeout,
            force=self._force,
            on_loss=self._on_loss or config.on_backend_loss,
            patience=config.reconnect_timeout,
            greet=self._greeting(loop),
            trace=trace.device(self.name) if trace is not None else None,
        )

    def _greeting(self, loop: EventLoop) -> Callable[[Client], object] | None:
        if self._display is None:
            return None
        from .vhost_user.gpu import Screen

        self._close_screen()
        self._screen = Screen(self.name, self._display, loop)
        return self._screen.attach

    def _close_screen(self) -> None:
        if self._screen is not None:
            self._screen.close()
            self._screen = None

    def start(self) -> None:
        """The guest runs from now on."""
        if self.stream is not None:
            self.stream.start()

    def close(self) -> None:
        """End the backend if it was started for this device."""
        self._close_screen()
        if self._backend is not None:
            self._backend.close()
        if self.stream is not None:
            self.stream.close()


def prepare(device: Record) -> Prepared:
    """Check one device of a `VmConfig` and start its backend if it has none.  Raises ConfigError."""
    return _MAKERS[type(device)](device)


def find_kind(option: str, text: str) -> Kind:
    """The kind for a number or a name; a number that nobody described gets a bare row."""
    if not text.isascii() or not text.isdigit():
        kind = kinds.by_name(text.lower())
        if kind is None:
            near = options.nearest(
                text, [name for kind in kinds.KINDS for name in (kind.name, *kind.aliases)]
            )
            raise ConfigError(f"{option}: unknown device type {text!r}{near}; pyvmm devices lists them")
        return kind
    number = int(text) if len(text) <= options.MAX_DIGITS else 0
    if not 1 <= number <= MAX_ID:
        raise ConfigError(f"{option}: device type {text}: 1 to {MAX_ID} are possible")
    return kinds.of(number)


def check_together(devices: Iterable[Record]) -> None:
    """Refuse devices that want what only one of them can have.  Raises ConfigError."""
    claimed = set()
    for claim in (claim for device in devices for claim in _claims(device)):
        if claim in claimed:
            raise ConfigError(f"{claim}: two devices cannot share it; choose another")
        claimed.add(claim)


def check_files(config: cfg.VmConfig) -> None:
    """Refuse to write over what the machine reads, and a trace over a console.  Raises ConfigError."""
    read = {config.payload.kernel: "--kernel", config.payload.initramfs: "--initramfs"}
    shown = {config.serial.path: "--serial"} if config.serial.mode == "file" else {}
    written = {config.trace.path: "--trace"} if config.trace is not None and config.trace.path else {}
    for device in config.devices:
        if isinstance(device, cfg.DiskDevice):
            read[device.path] = "--disk"
        elif isinstance(device, cfg.ConsoleDevice) and device.stream.mode == "file":
            shown[device.stream.path] = "--console"
        elif isinstance(device, cfg.GenericDevice) and device.display:
            written[device.display] = "display="
    check_apart(shown, read)
    check_apart(written, read | shown)


def check_vectors(prepared: Iterable[Prepared]) -> None:
    """Refuse more queues than KVM has interrupts for: each device has one more.  Raises ConfigError."""
    from .irq import MAX_VECTORS

    counts = [(len(device.queue_sizes) + 1, device.name) for device in prepared]
    total = sum(count for count, _ in counts)
    if total > MAX_VECTORS:
        most, name = max(counts)
        raise ConfigError(
            f"{total} interrupt vectors for all devices: KVM has {MAX_VECTORS}; "
            f"give fewer queues, {name} has {most - 1}"
        )


def _claims(device: Any) -> Iterator[str]:
    if getattr(device, "id", ""):
        yield f"id={device.id}"
    if getattr(device, "pci_device_id", 0):
        yield f"pci_device_id={device.pci_device_id}"
    if getattr(device, "socket", ""):
        yield f"socket {device.socket}"  # a backend serves one frontend at a time
    if getattr(device, "fd", -1) >= 0:
        yield f"fd {device.fd}"
    if isinstance(device, cfg.FsDevice):
        yield f"--fs: tag={device.tag}"
    if isinstance(device, cfg.NetDevice) and device.tap:
        yield f"--net: tap={device.tap}"
    if isinstance(device, cfg.DiskDevice) and not device.readonly:
        yield f"--disk: path={device.path}"


# -- one maker for each option -----------------------------------------------------------


def _generic(device: cfg.GenericDevice) -> Prepared:
    option = "--generic-vhost-user"
    kind = find_kind(option, device.device_type)
    if kind.refused:
        raise ConfigError(f"{option}: {kind.name} is impossible: {kind.refused}")
    if device.display and kind.device_id != GPU:
        raise ConfigError(f"{option}: display={device.display}: only device_type=gpu has one; leave it out")
    sizes = device.queue_sizes or kind.usual_sizes
    config = _config_space(option, device.config, kind)
    if not device.force:
        _check_kind(option, kind, sizes, config)
    where, backend = _place(option, device)
    return Prepared(
        device.id or kind.name, kind, sizes, where,
        config=config, backend=backend, force=device.force, on_loss=device.on_loss,
        display=device.display if kind.device_id == GPU else None,
    )  # fmt: skip


def _config_space(option: str, text: str, kind: Kind) -> bytes | None:
    if not text:
        return None
    from .config_text import config_bytes

    return config_bytes(option, text, kind)


def _place(option: str, device: cfg.GenericDevice) -> tuple[Endpoint | str | int, Any]:
    """Where the backend answers, and what is to be closed with the device."""
    if device.exec:
        from .host import backends

        try:
            process = backends.start_command(device.exec)
        except ConfigError as error:
            command = " ".join(device.exec)
            raise ConfigError(f"{option}: exec={command}: {error}; name one that can be run") from None
        return process.endpoint, process
    if device.server:
        from .vhost_user.endpoint import ListeningEndpoint

        listening = ListeningEndpoint(f"{option}: socket={device.socket}", device.socket)
        return listening, listening
    return (device.socket if device.fd < 0 else device.fd), None


def _check_kind(option: str, kind: Kind, sizes: tuple[int, ...], config: bytes | None) -> None:
    """Refuse what drivers or backends of this kind cannot do with."""
    fault = kind.queue_fault(len(sizes))
    if fault:
        raise ConfigError(f"{option}: {fault}; give so many queue_sizes=, or --force if you know the driver")
    fault = kind.size_fault(sizes)
    if fault:
        raise ConfigError(f"{option}: {fault}; give smaller queue_sizes=, or force=on if yours takes more")
    if config and kind.config and len(config) > kind.config_size:
        raise ConfigError(
            f"{option}: config= is {len(config)} bytes, {kind.name} has {kind.config_size}; "
            f"give at most those, or force=on for a newer driver"
        )


def _fs(device: cfg.FsDevice) -> Prepared:
    kind = _kind("fs")
    tag = os.fsencode(device.tag)
    config = tag.ljust(36, b"\0") + device.num_queues.to_bytes(4, "little")
    sizes = (device.queue_size,) * (1 + device.num_queues)  # the first is the high-priority queue
    name = device.id or f"fs {device.tag}"
    if device.socket:
        return Prepared(name, kind, sizes, device.socket, config=config)
    from .host import backends

    backend = backends.start_virtiofsd(device)
    return Prepared(name, kind, sizes, backend.endpoint, config=config, backend=backend)


def _disk(device: cfg.DiskDevice) -> Prepared:
    from .host import backends

    backend = backends.start_disk(device)
    sizes = (device.queue_size,) * device.num_queues
    name = device.id or f"disk {device.path}"
    return Prepared(name, _kind("block"), sizes, backend.endpoint, backend=backend)


def _rng(device: cfg.RngDevice) -> Prepared:
    from .backend import process

    def make() -> Device:
        from .backend.rng import Rng

        return Rng(device.src)

    cure, tests = "name a readable file or device", (stat.S_ISREG, stat.S_ISCHR, stat.S_ISBLK)
    os.close(open_file(f"--rng: src={device.src}", device.src, cure, *tests))
    return _python(device.id or "rng", "rng", (256,), lambda: process.spawn(make, name="rng"))


def _net(device: cfg.NetDevice) -> Prepared:
    from .backend import process
    from .backend.wire import plug

    def spawn() -> DeviceProcess:
        wire = _plugged(device)  # here, where it can be told what is wrong with it
        wires = [wire]

        def make() -> Device:
            from .backend.net import Net

            def connect() -> Wire:
                return wires.pop() if wires else plug(device.tap, device.stream)

            return Net(connect, mac=device.mac, mtu=device.mtu)

        try:
            return process.spawn(make, [wire.fileno()], name="net")
        finally:
            wire.close()

    return _python(device.id or f"net {device.tap or device.stream}", "net", (256, 256), spawn)


def _plugged(device: cfg.NetDevice) -> Wire:
    from .backend.wire import plug

    try:
        return plug(device.tap, device.stream)
    except ConfigError as error:
        raise ConfigError(f"--net: {error}") from None


def _console(device: cfg.ConsoleDevice) -> Prepared:
    from .backend import process
    from .backend.endpoints import PortConfig
    from .streams import ListeningStream, open_stream

    stream = open_stream("--console", device.stream)
    try:
        listener = stream.listener.fileno() if isinstance(stream, ListeningStream) else -1
        ports = [PortConfig("", True, stream.input_fd, stream.output_fd, listener)]
        ports += [PortConfig(port.name, False, port.fd, port.fd) for port in device.ports]
        queues = (128,) * (2 * len(ports) + 2)
        running: ConsoleProcess

        def spawn() -> ConsoleProcess:
            nonlocal running
            running = process.spawn_console(ports)
            resize()
            return running

        def resize() -> None:
            size = stream.size()
            if size is not None:
                running.resize(0, *size)

        prepared = _python(
            device.id or "console", "console", queues, spawn,
            final="the descriptors of its ports went with it" if device.ports else "",
        )  # fmt: skip
    except BaseException:
        stream.close()
        raise
    prepared.stream, prepared.resize = stream, resize
    return prepared


def _python(
    name: str, kind: str, queue_sizes: tuple[int, ...], spawn: Callable[[], DeviceProcess], final: str = ""
) -> Prepared:
    """A device of ours in a process of its own, which is connected already."""
    from .host.handover import ForkedEndpoint

    where = ForkedEndpoint(name, spawn)
    where.final = final
    return Prepared(name, _kind(kind), queue_sizes, where, backend=where)


def _kind(name: str) -> Kind:
    kind = kinds.by_name(name)
    assert kind is not None
    return kind


_MAKERS: dict[type, Callable[[Any], Prepared]] = {
    cfg.GenericDevice: _generic,
    cfg.FsDevice: _fs,
    cfg.DiskDevice: _disk,
    cfg.RngDevice: _rng,
    cfg.ConsoleDevice: _console,
    cfg.NetDevice: _net,
}
