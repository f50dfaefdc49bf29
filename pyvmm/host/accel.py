"""Finds out whether this host's KVM runs kernels, or only interprets them.

Some cloud machines offer a /dev/kvm that runs guest user mode on the CPU and emulates
ring 0, a thousand times slower and incompletely: Linux dies there.  No capability tells;
only measuring does.  This module owns the measurement (a guest of ten bytes that counts
down) and remembers its result until the next boot of the host.
"""

from __future__ import annotations

import os
from struct import pack_into
from time import perf_counter

from .. import cache
from ..errors import ConfigError, KvmError
from ..record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LAB_MARK = "PYVMM_LAB"  # in the environment of everything inside the lab, whose KVM runs kernels
_RAM = 0x1_0000
_PML4, _PDPT, _PD, _CODE = 0x1000, 0x2000, 0x3000, 0x4000
_DOORBELL = 0x10_0000  # inside the mapped 2 MiB, outside RAM: a store there exits
_PRESENT_RW_USER, _HUGE = 7, 1 << 7
_COUNT_DOWN = bytes.fromhex("48ffc9 75fb 8807 ebfe")  # dec rcx; jnz; mov [rdi], al; jmp self
_PROBE, _LIMIT = 4000, 0.002  # iterations; seconds that separate native (4 to 30 us) from emulated (8 ms)
_MANY = 4_000_000  # enough to measure a rate where the guest runs natively


class Rates(Record):
    """Loop iterations a second of 64-bit guest code in ring 0 and in ring 3."""

    ring0: float
    ring3: float

    @property
    def native(self) -> bool:
        """Whether ring 0 runs on the CPU."""
        return self.ring0 > _PROBE / _LIMIT


class _Done(Exception):
    """The guest has counted down."""


class _Doorbell:
    """Ends the run at the first store; nothing else is expected of the guest."""

    def mmio_write(self, address: int, width: int, value: int) -> None:
        raise _Done

    def mmio_read(self, address: int, width: int) -> int:
        raise _Done

    io_read = mmio_read
    io_write = mmio_write


def runs_kernels(path: str = "/dev/kvm") -> bool:
    """Whether a kernel would run natively; measured once per boot of this host.

    Raises ConfigError or KvmError when KVM cannot be used at all.
    """
    memory = _memory_path(path)
    try:
        with open(memory) as file:
            return file.read() == "native"
    except OSError:
        native = best_rate(0, path) > _PROBE / _LIMIT
    _remember(memory, b"native" if native else b"emulated")
    return native


def why_not(path: str = "/dev/kvm") -> str:
    """The fact that keeps Linux from running under this host's KVM, or nothing."""
    if os.environ.get(LAB_MARK):
        return ""
    try:
        return "" if runs_kernels(path) else f"the KVM of {path} emulates ring 0, so Linux cannot run on it"
    except (ConfigError, OSError) as error:
        return str(error)


def measure(path: str = "/dev/kvm") -> Rates:
    """Both rates, freshly measured; takes some tens of milliseconds on a slow host."""
    return Rates(_fine_rate(0, path), _fine_rate(3, path))


def _fine_rate(ring: int, path: str) -> float:
    rate = best_rate(ring, path)
    return best_rate(ring, path, _MANY) if rate > _PROBE / _LIMIT else rate


def best_rate(ring: int, path: str = "/dev/kvm", iterations: int = _PROBE) -> float:
    """Iterations a second in `ring`, the best of three short runs (preemption only slows)."""
    return max(iterations / _count_down(ring, path, iterations) for _ in range(3))


def _count_down(ring: int, path: str, iterations: int) -> float:
    from .._native.kvm import Kvm
    from .._native.memory import GuestRegion

    ram = GuestRegion(_RAM, "pyvmm-probe")
    kvm = Kvm(path)
    try:
        vm = kvm.create_vm()
        try:
            _write_guest(memoryview(ram))
            vm.set_memory_region(0, 0, _RAM, ram.address)
            vcpu = vm.create_vcpu(0)
            try:
                vcpu.set_sregs(_long_mode(ring))
                _time(vcpu, 1)  # pays for faults and translation
                exits = _time(vcpu, 1)
                return max(_time(vcpu, iterations) - exits, 1e-6)
            finally:
                vcpu.close()
        finally:
            vm.close()
    finally:
        kvm.close()
        ram.close()


def _time(vcpu: Any, iterations: int) -> float:
    """Seconds that the guest needs to count down from `iterations`."""
    vcpu.set_regs({"rip": _CODE, "rcx": iterations, "rdi": _DOORBELL, "rflags": 2})
    begin = perf_counter()
    try:
        reason, details = vcpu.run(_Doorbell())
    except _Done:
        return perf_counter() - begin
    raise KvmError(0, f"the probe guest stopped, KVM exit reason {reason} {details}; this KVM is unusable")


def _write_guest(ram: memoryview) -> None:
    pack_into("<Q", ram, _PML4, _PDPT | _PRESENT_RW_USER)
    pack_into("<Q", ram, _PDPT, _PD | _PRESENT_RW_USER)
    pack_into("<Q", ram, _PD, _PRESENT_RW_USER | _HUGE)
    ram[_CODE : _CODE + len(_COUNT_DOWN)] = _COUNT_DOWN
    ram.release()


def _long_mode(ring: int) -> dict[str, Any]:
    code = {
        "base": 0, "limit": 0xFFFF_FFFF, "selector": 0x8 | ring, "type": 0xB, "present": 1,
        "dpl": ring, "db": 0, "s": 1, "l": 1, "g": 1, "avl": 0, "unusable": 0,
    }  # fmt: skip
    data = {**code, "selector": 0x10 | ring, "type": 3, "db": 1, "l": 0}
    return {
        "cr0": 0x8000_0011, "cr3": _PML4, "cr4": 0x20, "efer": 0x500,
        "cs": code, "ss": data, "ds": data, "es": data, "fs": data, "gs": data,
    }  # fmt: skip


def _memory_path(path: str) -> str:
    """Cache entry for this device and this boot of the host; empty where there is no telling."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        device = os.stat(path)
    except OSError:
        return ""
    return cache.directory("accel", f"{boot}-{device.st_rdev:x}-{device.st_ino:x}")


def _remember(path: str, text: bytes) -> None:
    """Store the answer; a host where that fails is measured again."""
    if not path:
        return
    try:
        for old in cache.entries("accel"):
            os.unlink(old.path)
        with cache.whole_file(path) as file:
            file.write(text)
    except OSError:
        return
