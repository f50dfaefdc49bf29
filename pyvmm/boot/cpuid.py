"""What CPUID tells one virtual CPU: KVM's list, with topology and timing put in.

It owns the leaves that depend on the virtual machine (Intel SDM volume 2, CPUID; AMD APM
volume 3 appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst).  All other leaves stay as
KVM_GET_SUPPORTED_CPUID gave them, KVM's paravirtual ones included.  An entry is the tuple
(function, index, flags, eax, ebx, ecx, edx); everything here is a pure function on lists of it.

Leaf 0x15 is left alone on purpose: Linux multiplies crystal and ratio in 32 bits, so no exact
TSC frequency fits beside KVM's 1 GHz APIC timer.  Guests take both from kvmclock or leaf
0x40000010.
"""

from __future__ import annotations

from ..record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Entry = tuple[int, int, int, int, int, int, int]
    Editor = Callable[["Entry", "Topology", int], Entry]

SIGNIFICANT_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX, spelt as in linux/kvm.h
KVM_SIGNATURE = 0x4000_0000
KVM_FEATURES = 0x4000_0001
KVM_TIMING = 0x4000_0010
APIC_BUS_KHZ = 1_000_000  # KVM's APIC timer counts nanoseconds (APIC_BUS_CYCLE_NS = 1)
_SIGNATURE_REGISTERS = (0x4B4D_564B, 0x564B_4D56, 0x4D)  # "KVMKVMKVM\0\0\0" in ebx, ecx, edx

EMULATOR = b"TCGTCGTCGTCG"  # how QEMU's emulation signs, which is the CPU that the lab's KVM runs on
_PV_EOI = 1 << 6  # KVM_FEATURE_PV_EOI, leaf 0x40000001 eax
_HTT = 1 << 28  # leaf 1 edx
_TSC_DEADLINE, _HYPERVISOR = 1 << 24, 1 << 31  # leaf 1 ecx
_XSAVE = 0xD
_CMP_LEGACY = 1 << 1  # leaf 0x80000001 ecx
_EXTENDED_TOPOLOGY = (0xB, 0x1F)
_LEVEL_SMT, _LEVEL_CORE = 1, 2
_AMD_EXTENDED_TOPOLOGY = 0x8000_0026


class Topology(Record):
    """One socket of `cores` with `threads` each; the APIC id counts threads first, without gaps
    only when both are powers of two."""

    cores: int
    threads: int = 1

    @property
    def thread_bits(self) -> int:
        """Bits of the APIC id that number the threads of a core."""
        return (self.threads - 1).bit_length()

    @property
    def core_bits(self) -> int:
        """Bits of the APIC id that number the cores of the socket."""
        return (self.cores - 1).bit_length()

    @property
    def logical(self) -> int:
        """Virtual CPUs in all."""
        return self.cores * self.threads

    def apic_id(self, cpu: int) -> int:
        """APIC id of the virtual CPU number `cpu`, which is also its KVM id."""
        return cpu // self.threads << self.thread_bits | cpu % self.threads


def edit(
    supported: Iterable[Entry],
    topology: Topology,
    cpu: int,
    tsc_khz: int = 0,
    tsc_deadline: bool = False,
    hypervisor: bytes = b"",
) -> list[Entry]:
    """The list for KVM_SET_CPUID2 of virtual CPU number `cpu`, from what KVM supports.

    `tsc_khz` is KVM_GET_TSC_KHZ's answer, 0 for unknown; `tsc_deadline` is what
    KVM_CAP_TSC_DEADLINE_TIMER says, which KVM leaves to its user to announce; `hypervisor` signs the
    machine that KVM itself runs on.
    """
    apic_id = topology.apic_id(cpu)
    entries = []
    highest = 0
    for entry in supported:
        function = entry[0]
        if function in _REPLACED:
            continue
        if function == 0:
            highest = entry[3]
        editor = _EDITORS.get(function)
        entries.append(entry if editor is None else editor(entry, topology, apic_id))
    if tsc_deadline:
        entries = [_with_tsc_deadline(entry) for entry in entries]
    for function in _EXTENDED_TOPOLOGY:
        if function <= highest:
            entries += _extended_topology(function, topology, apic_id)
    if hypervisor == EMULATOR:
        entries = [_without_pv_eoi(entry) for entry in entries]
    return _with_timing(entries, tsc_khz) if tsc_khz else entries


def is_kvm(entries: Iterable[Entry]) -> bool:
    """Whether the list names KVM as the hypervisor, so that a guest uses its clock."""
    return any(entry[0] == KVM_SIGNATURE and entry[4:] == _SIGNATURE_REGISTERS for entry in entries)


def xcr0(entries: Iterable[Entry]) -> int:
    """XCR0 with all state components that leaf 0xD offers; 0 where there is no XSAVE."""
    return next((entry[6] << 32 | entry[3] for entry in entries if entry[:2] == (_XSAVE, 0)), 0)


def _basic(entry: Entry, topology: Topology, apic_id: int) -> Entry:
    """Leaf 1: initial APIC id, logical CPUs in the socket, hypervisor present."""
    function, index, flags, eax, ebx, ecx, edx = entry
    addressable = 1 << topology.core_bits + topology.thread_bits
    ebx = ebx & 0xFFFF | addressable << 16 | apic_id << 24
    edx = edx | _HTT if topology.logical > 1 else edx & ~_HTT
    return function, index, flags, eax, ebx, ecx | _HYPERVISOR, edx


def _cache(entry: Entry, topology: Topology, _: int) -> Entry:
    """Leaf 4 (Intel): who shares each cache: a core L1 and L2, the socket the rest."""
    function, index, flags, eax, ebx, ecx, edx = entry
    if not eax & 0x1F:
        return entry  # no further cache
    sharing = _sharing_bits(eax, topology)
    eax = eax & 0x3FFF | (1 << sharing) - 1 << 14 | (1 << topology.core_bits) - 1 << 26
    return function, index, flags, eax, ebx, ecx, edx


def _amd_cache(entry: Entry, topology: Topology, _: int) -> Entry:
    """Leaf 0x8000001D (AMD): as leaf 4, but a plain count and no cores per socket."""
    function, index, flags, eax, ebx, ecx, edx = entry
    if not eax & 0x1F:
        return entry
    count = topology.threads if eax >> 5 & 0x7 < 3 else topology.logical
    return function, index, flags, eax & 0x3FFF | count - 1 << 14, ebx, ecx, edx


def _sharing_bits(eax: int, topology: Topology) -> int:
    return topology.thread_bits + (topology.core_bits if eax >> 5 & 0x7 >= 3 else 0)


def _amd_features(entry: Entry, topology: Topology, _: int) -> Entry:
    """Leaf 0x80000001 ecx: CmpLegacy tells an AMD guest that the socket has several CPUs."""
    function, index, flags, eax, ebx, ecx, edx = entry
    ecx = ecx | _CMP_LEGACY if topology.logical > 1 else ecx & ~_CMP_LEGACY
    return function, index, flags, eax, ebx, ecx, edx


def _amd_size(entry: Entry, topology: Topology, _: int) -> Entry:
    """Leaf 0x80000008 ecx: number of CPUs less one, and the width of their part of the APIC id."""
    function, index, flags, eax, ebx, ecx, edx = entry
    bits = topology.core_bits + topology.thread_bits
    return function, index, flags, eax, ebx, ecx & ~0xF0FF | bits << 12 | topology.logical - 1, edx


def _amd_topology(entry: Entry, topology: Topology, apic_id: int) -> Entry:
    """Leaf 0x8000001E: extended APIC id, core id and threads per core, one node."""
    function, index, flags, *_ = entry
    core = apic_id >> topology.thread_bits
    return function, index, flags, apic_id, core | topology.threads - 1 << 8, 0, 0


def _extended_topology(function: int, topology: Topology, apic_id: int) -> list[Entry]:
    """Leaves 0xB and 0x1F: one sub-leaf a level, up to the first of type 0."""
    levels = (
        (topology.thread_bits, topology.threads, _LEVEL_SMT),
        (topology.thread_bits + topology.core_bits, topology.logical, _LEVEL_CORE),
        (0, 0, 0),
    )
    return [
        (function, index, SIGNIFICANT_INDEX, shift, count, index | kind << 8, apic_id)
        for index, (shift, count, kind) in enumerate(levels)
    ]


def _with_tsc_deadline(entry: Entry) -> Entry:
    if entry[0] != 1:
        return entry
    function, index, flags, eax, ebx, ecx, edx = entry
    return function, index, flags, eax, ebx, ecx | _TSC_DEADLINE, edx


def _without_pv_eoi(entry: Entry) -> Entry:
    """Let a guest on an emulated CPU end its interrupts by an exit.

    TCG forgets that VMRUN has injected an interrupt (svm_helper.c leaves exception_index set), and until
    the guest's next exit or exception may inject it again, into whatever runs then.  The exit for the end
    of the interrupt comes soon; without it the guest would often be open to this for whole milliseconds.
    """
    if entry[0] != KVM_FEATURES:
        return entry
    function, index, flags, eax, ebx, ecx, edx = entry
    return function, index, flags, eax & ~_PV_EOI, ebx, ecx, edx


def _with_timing(entries: list[Entry], tsc_khz: int) -> list[Entry]:
    """Add leaf 0x40000010: TSC and APIC timer frequencies in kHz, where VMware first put them."""
    if not is_kvm(entries):
        return entries
    timing = (KVM_TIMING, 0, 0, tsc_khz, APIC_BUS_KHZ, 0, 0)
    rest = []
    for entry in entries:
        if entry[0] == KVM_SIGNATURE:  # eax is the highest leaf; KVM may give 0 for its first two
            rest.append((*entry[:3], max(entry[3], KVM_TIMING), *entry[4:]))
        elif entry[0] != KVM_TIMING:
            rest.append(entry)
    return [*rest, timing]


# AMD's newer topology leaf would contradict the ones edited here; without it guests use those.
_REPLACED = frozenset((*_EXTENDED_TOPOLOGY, _AMD_EXTENDED_TOPOLOGY))
_EDITORS: dict[int, Editor] = {
    0x1: _basic,
    0x4: _cache,
    0x8000_0001: _amd_features,
    0x8000_0008: _amd_size,
    0x8000_001D: _amd_cache,
    0x8000_001E: _amd_topology,
}
