"""What this host can do for pyvmm: each fact looked at, and the cure for what is missing.

It owns the list of checks and the verdict, whether and how `pyvmm run` can work here.  A
check looks by itself, survives everything that it may find missing (the compiled core
included), and changes nothing but the cache, where the guest's init lands.  How findings are
shown is for the caller.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys

from .. import cache
from ..errors import ConfigError, PyvmmError
from ..guest import initramfs
from ..guest.modules import ModuleTree
from ..layout import MIB
from ..record import Record
from . import accel, backends, emulator, kernels, own_kernel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

OK, WARN, FAIL = "ok", "warn", "fail"
RUN_MEMORY, LAB_MEMORY = 1024 * MIB, 4096 * MIB  # what `pyvmm run` and `pyvmm lab` take by default
UDEV_RULE = 'KERNEL=="kvm", GROUP="kvm", MODE="0660"'
BUILD_TOOLS = ("make", "gcc", "bc", "bison", "flex", "xz", "tar", "strip")
BUILD_HEADERS = ("/usr/include/libelf.h", "/usr/include/openssl/ssl.h")
# Capabilities that every machine of ours uses, then those that only bound or speed it up.
NEEDED = {
    "irqchip": "KVM_CAP_IRQCHIP",
    "ioeventfd": "KVM_CAP_IOEVENTFD",
    "ioeventfd any length": "KVM_CAP_IOEVENTFD_ANY_LENGTH",
    "irqfd": "KVM_CAP_IRQFD",
    "irq routing": "KVM_CAP_IRQ_ROUTING",
    "immediate exit": "KVM_CAP_IMMEDIATE_EXIT",
}
LIMITS = {
    "memslots": "KVM_CAP_NR_MEMSLOTS",
    "vcpus recommended": "KVM_CAP_NR_VCPUS",
    "vcpus at most": "KVM_CAP_MAX_VCPUS",
}
OPTIONAL = {"tsc deadline timer": "KVM_CAP_TSC_DEADLINE_TIMER"}


class Finding(Record):
    """One fact: its `state` is OK, WARN (works, with a limit) or FAIL; `cure` says what mends it."""

    name: str
    state: str
    text: str
    cure: str = ""
    facts: dict[str, Any] = {}  # noqa: RUF012 - values are immutable by convention


class Host(Record):
    """Where to look; other places than a real host's are for tests."""

    kvm: str = "/dev/kvm"
    hugepages: str = "/sys/kernel/mm/hugepages"
    meminfo: str = "/proc/meminfo"


class Report(Record):
    """Every finding, and in which ways `pyvmm run` works: `kvm`, `lab`, both or none."""

    findings: tuple[Finding, ...]
    ways: tuple[str, ...]

    @property
    def works(self) -> bool:
        """Whether `pyvmm run` can work on this host at all."""
        return bool(self.ways)


def examine(host: Host | None = None) -> Report:
    """Look at everything; takes well under a second, or some when KVM emulates slowly."""
    place = host or Host()
    findings = [finding for check in CHECKS for finding in check(place)]
    ways = tuple(way for way, needs in WAYS.items() if _possible(findings, needs))
    return Report((*findings, _verdict(ways, findings)), ways)


# What each way to run needs of the findings by name, all of them not FAIL.
_COMMON = ("compiled core", "virtiofsd", "guest init", "kernels")
WAYS = {
    "kvm": (*_COMMON, "kvm", "ring 0", *NEEDED),
    "lab": (*_COMMON, "lab machine", "lab kernel"),
}


def _possible(findings: list[Finding], needs: tuple[str, ...]) -> bool:
    good = {finding.name for finding in findings if finding.state != FAIL}
    return all(name in good for name in needs)


def _verdict(ways: tuple[str, ...], findings: list[Finding]) -> Finding:
    texts = {
        "kvm": "pyvmm run uses this host's KVM",
        "lab": "pyvmm run uses an emulated machine (pyvmm lab), some fifty times slower",
    }
    if ways:
        return Finding("verdict", OK if ways[0] == "kvm" else WARN, texts[ways[0]])
    broken = [finding.name for finding in findings if finding.state == FAIL and finding.name in WAYS["lab"]]
    return Finding("verdict", FAIL, f"pyvmm run cannot work here: {', '.join(broken)}", "mend these first")


# -- the compiled core and KVM -----------------------------------------------------------


def _core(_: Host) -> Iterator[Finding]:
    python = f"Python {platform.python_version()} ({sys.executable})"
    reason = _core_fault()
    if reason:
        cure = "scripts/build-inplace in a checkout, or pip install pyvmm"
        yield Finding("compiled core", FAIL, f"{reason}; this is {python}", cure)
    else:
        yield Finding("compiled core", OK, f"built for {python}")


def _core_fault() -> str:
    try:
        from .._native import kvm, memory, process, vcpu, vring  # noqa: F401
    except ImportError as error:
        folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "_native")
        built = [name for name in _listed(folder) if name.endswith(".so")]
        return f"{built[0]} does not fit ({error.__cause__ or error})" if built else "not built"
    return ""


def _kvm(host: Host) -> Iterator[Finding]:
    """The device, and with the compiled core everything that only an open KVM can tell."""
    try:
        os.close(os.open(host.kvm, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        yield Finding("kvm", FAIL, f"{host.kvm}: {error.strerror}", _kvm_cure(host.kvm, error))
        return
    if _core_fault():
        yield Finding("kvm", WARN, f"{host.kvm}: permitted; what it can do only the compiled core can tell")
        return
    from .._native.kvm import Kvm

    try:
        kvm = Kvm(host.kvm)
    except (PyvmmError, OSError) as error:
        yield Finding("kvm", FAIL, str(error), "look at the kernel's log: dmesg | grep -i kvm")
        return
    try:
        yield Finding("kvm", OK, f"{host.kvm}: permitted, API version {kvm.api_version}")
        yield from _capabilities(kvm)
    finally:
        kvm.close()
    yield from _ring0(host)


def _kvm_cure(path: str, error: OSError) -> str:
    if not isinstance(error, PermissionError):
        return "modprobe kvm_intel or kvm_amd; enable virtualisation in the firmware, or nested in the cloud"
    try:
        status = os.stat(path)
        import grp

        group = grp.getgrgid(status.st_gid).gr_name
    except (OSError, KeyError):
        return "allow the device in this container or sandbox"
    if status.st_mode & 0o060 == 0o060 and status.st_gid:
        return f"usermod -aG {group} USER as root, and log in again"
    return f"as root: chgrp kvm {path} && chmod 660 {path}; for good, a udev rule: {UDEV_RULE}"


def _capabilities(kvm: Any) -> Iterator[Finding]:
    from .._native import kvm as numbers

    def value(capability: str) -> int:
        answer: int = kvm.check_extension(getattr(numbers, capability))
        return answer

    for name, capability in NEEDED.items():
        if value(capability):
            yield Finding(name, OK, "yes")
        else:
            yield Finding(name, FAIL, f"this KVM lacks {capability}", "a Linux of 4.12 or newer has it")
    for name, capability in LIMITS.items():
        count = value(capability)
        yield Finding(name, OK, str(count), facts={"count": count})
    for name, capability in OPTIONAL.items():
        state, text = (OK, "yes") if value(capability) else (WARN, f"this KVM lacks {capability}")
        yield Finding(name, state, text, "" if state == OK else "nothing; guests use another timer")


def _ring0(host: Host) -> Iterator[Finding]:
    try:
        rates = accel.measure(host.kvm)
    except (PyvmmError, OSError) as error:
        yield Finding("ring 0", FAIL, str(error), "pyvmm run --accel lab")
        return
    text = f"{rates.ring0 / 1e6:.2f} M iterations/s, ring 3 {rates.ring3 / 1e6:.0f} M iterations/s"
    facts = {"ring0": round(rates.ring0), "ring3": round(rates.ring3), "native": rates.native}
    if rates.native:
        yield Finding("ring 0", OK, f"native ({text})", facts=facts)
    else:
        cure = "hardware, or nested virtualisation from the cloud; pyvmm run uses the lab until then"
        yield Finding("ring 0", FAIL, f"emulated, so Linux cannot run on it ({text})", cure, facts)


# -- memory ------------------------------------------------------------------------------


def _memory(host: Host) -> Iterator[Finding]:
    with open(host.meminfo) as file:
        lines = dict(line.split(":", 1) for line in file)
    size = int(lines["MemAvailable"].split()[0]) << 10
    text, facts = f"{size // MIB} MiB available", {"available": size}
    if size >= LAB_MEMORY:
        yield Finding("memory", OK, text, facts=facts)
    else:
        least = "pyvmm run" if size < RUN_MEMORY else "pyvmm lab"
        yield Finding("memory", WARN, f"{text}, less than {least} takes by default", "--memory SIZE", facts)


def _hugepages(host: Host) -> Iterator[Finding]:
    free = {}
    for folder in _listed(host.hugepages):
        with open(os.path.join(host.hugepages, folder, "free_hugepages")) as file:
            free[folder.removeprefix("hugepages-")] = int(file.read())
    text = ", ".join(f"{count} of {size}" for size, count in sorted(free.items())) or "not known here"
    if any(free.values()):
        yield Finding("hugepages", OK, f"free: {text}", facts=free)
    else:
        cure = "sysctl vm.nr_hugepages=N, if you want --memory hugepages=on"
        yield Finding("hugepages", WARN, f"free: {text}", cure, free)


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


# -- backends ----------------------------------------------------------------------------


def _backends(_: Host) -> Iterator[Finding]:
    yield from _virtiofsd()
    path = backends.find_program("qemu-storage-daemon")
    if path:
        yield Finding("qemu-storage-daemon", OK, path)
    else:
        yield Finding("qemu-storage-daemon", WARN, "none; --disk needs it", "apt install qemu-utils")
    for entry in backends.descriptions():
        text, facts = f"{entry.binary} ({entry.path})", {"type": entry.type, "binary": entry.binary}
        if os.access(entry.binary, os.X_OK):
            yield Finding(f"backend {entry.type}", OK, text, facts=facts)
        else:
            yield Finding(
                f"backend {entry.type}", WARN, f"announced, but gone: {text}", "reinstall it", facts
            )


def _virtiofsd() -> Iterator[Finding]:
    path = backends.find_virtiofsd()
    name = "virtiofsd"
    if path is None:
        yield Finding(name, FAIL, "none found", "apt install qemu-system-common, or cargo install virtiofsd")
    elif not backends.is_c_virtiofsd(path):
        yield Finding(name, OK, path, facts={"kind": "rust"})
    else:
        reason = "it needs root" if os.geteuid() else _read_only_fault()
        if reason:
            cure = "cargo install virtiofsd" + (", or run pyvmm as root" if os.geteuid() else "")
            yield Finding(name, FAIL, f"{path}: {reason}", cure, {"kind": "c"})
        else:
            yield Finding(name, OK, f"{path} (QEMU's own; read-only by the kernel)", facts={"kind": "c"})


def _read_only_fault() -> str:
    """Why a file server here cannot be kept from writing; tried in a child."""
    if _core_fault():
        return ""
    from .children import Child

    try:
        child = Child(["true"], prepare=backends.make_read_only)
    except ConfigError as error:
        return str(error).partition("started: ")[2]
    child.close()
    return ""


# -- kernels and what is built -------------------------------------------------------------


def _kernels(_: Host) -> Iterator[Finding]:
    found = kernels.find_kernels()
    if not found:
        yield Finding("kernels", FAIL, "none is cached or in /boot", kernels.HOW_TO_GET_ONE)
    else:
        names = ", ".join(f"{kernel.source} {kernel.release}" for kernel in found)
        facts = {"kernels": [kernel._asdict() for kernel in found]}
        yield Finding("kernels", OK, f"{names}; the first is the default", facts=facts)


def _packers(_: Host) -> Iterator[Finding]:
    from importlib.util import find_spec

    missing = [name for name in ("lz4", "zstandard") if find_spec(name) is None]
    if missing:
        text = f"{', '.join(missing)} missing; compressed kernels and modules may need it"
        yield Finding("unpackers", WARN, text, f"pip install {' '.join(missing)}")
    else:
        yield Finding("unpackers", OK, "lz4, zstandard")


def _init(_: Host) -> Iterator[Finding]:
    try:
        yield Finding("guest init", OK, initramfs.compiled_init())
    except cache.Unusable as error:
        text, cure = str(error).rsplit("; ", 1)
        yield Finding("guest init", FAIL, text, cure)
    except ConfigError as error:
        yield Finding("guest init", FAIL, str(error), "apt-get install gcc libc6-dev")


def _own_kernel(_: Host) -> Iterator[Finding]:
    missing = [tool for tool in BUILD_TOOLS if shutil.which(tool) is None]
    missing += [path for path in (own_kernel.SOURCE, *BUILD_HEADERS) if not os.path.exists(path)]
    if missing:
        text = f"pyvmm kernel build cannot work without {', '.join(missing)}"
        yield Finding("kernel build", WARN, text, f"apt-get install {own_kernel.PACKAGES}")
    else:
        yield Finding("kernel build", OK, "source and tools are there")


# -- the lab ---------------------------------------------------------------------------------


def _lab(_: Host) -> Iterator[Finding]:
    program = emulator.program()
    if os.environ.get(accel.LAB_MARK):
        yield Finding("lab machine", FAIL, "this is the lab already; one in the other is too slow", "none")
    elif program:
        hint = f"; it loses a busy guest now and then, the one of {emulator.BUILDER} does not"
        yield Finding("lab machine", OK, program + ("" if program == emulator.own_program() else hint))
    else:
        yield Finding("lab machine", FAIL, f"no {emulator.QEMU}", "apt-get install qemu-system-x86")
    able = next((kernel for kernel in kernels.find_kernels() if _has_kvm(kernel)), None)
    if able:
        yield Finding("lab kernel", OK, able.path)
    else:
        yield Finding("lab kernel", FAIL, "no kernel that has kvm_amd as a module", "pyvmm kernel fetch")


def _has_kvm(kernel: kernels.Kernel) -> bool:
    try:
        return kernel.modules is not None and ModuleTree(kernel.modules).has("kvm_amd")
    except (PyvmmError, OSError):
        return False


CHECKS: tuple[Callable[[Host], Iterator[Finding]], ...] = (
    _core, _kvm, _memory, _hugepages, _backends, _kernels, _packers, _init, _own_kernel, _lab,
)  # fmt: skip
