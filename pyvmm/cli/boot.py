"""`pyvmm boot`: full control over one machine, in cloud-hypervisor's options."""

from __future__ import annotations

from .. import config, log
from ..ending import Signals
from ..errors import ConfigError, GuestCrash
from ..foreground import Resizes
from ..loop import EventLoop
from ..vm import CRASH, STOPPED, Vm
from .parse import Command, Option, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..record import Record
    from .parse import Arguments

COMMAND = Command(
    "boot",
    "Boot a kernel with the devices given, until the guest powers off.",
    "[boot] --kernel FILE [options]",
    (
        Option("--kernel", "FILE", "vmlinux (ELF) or bzImage"),
        Option("--initramfs", "FILE", "initial RAM file system"),
        Option("--cmdline", "TEXT", "kernel command line", empty=True),
        Option("--protocol", "NAME", "how to enter the kernel: auto (default), pvh, linux64 or bzimage"),
        Option("--cpus", "boot=N", f"virtual CPUs, 1 to {config.MAX_CPUS} (default 1)"),
        Option("--memory", "size=SIZE[,hugepages=on][,prefault=on]", "guest RAM (default 512M)"),
        Option("--disk", "path=FILE[,readonly=on][,direct=on][,num_queues=N]", "raw or qcow2 image", True),
        Option("--fs", "tag=TAG,dir=DIR[,readonly=on] or tag=TAG,socket=PATH", "virtio-fs", True),
        Option(
            "--generic-vhost-user",
            "device_type=NAME|ID,socket=PATH[,server=on]|exec=CMD|fd=N[,queue_sizes=[N,...]]"
            "[,config=HEX|@FILE|[FIELD=V,...]][,on_loss=POLICY]",
            "any vhost-user backend: one that listens at PATH, connects to PATH, is started by CMD, or is "
            "connected at descriptor N; virtio_id= is the same as device_type=",
            True,
        ),
        Option("--rng", "src=FILE", "virtio-rng with bytes from FILE (default /dev/urandom)", True),
        Option("--net", "tap=NAME|stream=PATH[,mac=MAC][,mtu=N]", "network: a TAP interface, or passt", True),
        Option("--console", "off|null|tty|pty|file=PATH|socket=PATH", "hvc0 (default tty)"),
        Option("--serial", "off|null|tty|pty|file=PATH|socket=PATH", "ttyS0 (default null)"),
        Option("--deadline", "SECONDS", "limit for each vhost-user request (default 10)"),
        Option("--connect-timeout", "SECONDS", "how long to wait for a backend's socket (default 10)"),
        Option(
            "--on-backend-loss",
            "reconnect|stop|fail",
            "when a backend is lost: look for it again (default), end, or go on without the device",
        ),
        Option("--reconnect-timeout", "SECONDS", "how long to look for it (default: for ever)"),
        Option("--control", "SOCKET", "tell at SOCKET where the virtqueues are (see pyvmm rings)"),
        Option("--no-reboot", "", "end when the guest restarts, with status 0"),
        Option("--force", "", "allow devices what the rules of their kind refuse, such as fewer queues"),
        Option("--trace", "vhost-user[=FILE][,format=json]", "show each message to and from backends"),
        Option("--verbose", "", "say more; twice: everything", short="-v"),
    ),
    examples=(
        (
            "a disk image and this directory",
            "pyvmm --kernel vmlinux --disk path=image.raw --fs tag=src,dir=. \\\n"
            '      --cmdline "console=hvc0 root=/dev/vda rw"',
        ),
        (
            "a backend that already listens",
            "pyvmm --memory size=1G,shared=on --kernel vmlinux --disk path=image.raw \\\n"
            '      --cmdline "console=hvc0 root=/dev/vda rw" \\\n'
            '      --generic-vhost-user "socket=/run/vfs.sock,virtio_id=26,queue_sizes=[512,512]"',
        ),
    ),
    details="A guest that powers off ends with status 0, one that restarts goes on with its devices;\n"
    "a crash of a virtual CPU ends with 126, a bad option with 2, a lost backend (with\n"
    "--on-backend-loss stop) with 70.\n\n"
    "Unless --console says otherwise, the terminal is the guest's console, and every key goes there,\n"
    "Ctrl-C too.  To leave, power the guest off, or kill pyvmm from another terminal.",
)
LOOK_SECONDS = 1.0  # after the start, which must not wait for what is measured then
DEVICES = (
    ("disk", config.disk),
    ("fs", config.fs),
    ("generic_vhost_user", config.generic),
    ("rng", config.rng),
    ("net", config.net),
)


def main(argv: Sequence[str]) -> int:
    """Boot what `argv` describes; returns the exit status."""
    given = parse(COMMAND, argv)
    log.level += given.count("verbose")
    return run(machine(given))


def machine(given: Arguments) -> config.VmConfig:
    """The configuration that the options describe; raises ConfigError."""
    kernel = given.text("kernel")
    if not kernel:
        raise ConfigError("--kernel is missing: name a vmlinux or bzImage (see pyvmm boot --help)")
    console = config.stream("--console", given.text("console", "tty"))
    serial = config.stream("--serial", given.text("serial", "null"))
    if console.mode == serial.mode == "tty":
        raise ConfigError("--serial tty: the terminal is --console's; give --console off or another place")
    protocol = config.protocol(given.text("protocol", "auto"))
    return config.VmConfig(
        payload=config.PayloadConfig(kernel, given.text("cmdline"), given.text("initramfs"), protocol),
        cpus=config.cpus(given.text("cpus")),
        memory=config.memory(given.text("memory")),
        serial=serial,
        devices=tuple(_devices(given, console)),
        deadline=config.seconds("--deadline", given.text("deadline", "10")),
        connect_timeout=config.seconds("--connect-timeout", given.text("connect_timeout", "10")),
        on_backend_loss=config.loss_policy("--on-backend-loss", given.text("on_backend_loss", "reconnect")),
        reconnect_timeout=_patience(given),
        control=given.text("control"),
        trace=config.trace(given.text("trace")),
        reboot=not given.count("no_reboot"),
    )


def _patience(given: Arguments) -> float:
    """0 is for ever."""
    text = given.text("reconnect_timeout")
    return config.seconds("--reconnect-timeout", text) if text else 0.0


def _devices(given: Arguments, console: config.StreamConfig) -> list[Record]:
    devices: list[Record] = []
    if console.mode != "off":
        devices.append(config.ConsoleDevice(console))
    for key, convert in DEVICES:
        devices += [convert(text) for text in given.texts(key)]
    if given.count("force"):
        devices = [d.replace(force=True) if isinstance(d, config.GenericDevice) else d for d in devices]
    return devices


def run(machine: config.VmConfig) -> int:
    """Build and run `machine` in the foreground; SIGTERM, SIGHUP and SIGINT end it."""
    with EventLoop() as loop:
        ended: list[int] = []

        def end(number: int) -> None:
            ended.append(number)
            loop.stop()

        with Signals(end), Vm(machine, loop) as vm, Resizes(vm.resize):
            loop.call_later(LOOK_SECONDS, _warn_of_emulation)
            outcome = vm.run()
    if outcome.kind == CRASH:
        raise GuestCrash(outcome.report)
    if outcome.kind == STOPPED and ended:
        return 128 + ended[0]
    return 0


def _warn_of_emulation() -> None:
    """Before the crash, which may take its time."""
    from ..host import accel

    reason = accel.why_not()
    if reason:
        log.warn(f"{reason}; a machine on which it can: pyvmm lab -- pyvmm ...")
