"""Topology and timing leaves, decoded as Linux decodes them."""

from __future__ import annotations

import pytest

from pyvmm.boot.cpuid import EMULATOR, Topology, edit, is_kvm, xcr0

Entry = tuple[int, int, int, int, int, int, int]
KVM = (0x4000_0000, 0, 0, 0x4000_0001, 0x4B4D564B, 0x564B4D56, 0x4D)
PARAVIRTUAL = (0x4000_0001, 0, 0, 0x0100_7EFB, 0, 0, 0)
INTEL: list[Entry] = [
    (0, 0, 0, 0x1F, 0x756E6547, 0x6C65746E, 0x49656E69),
    (1, 0, 0, 0x906EA, 0x0310_0800, 0xFEDA_3203, 0x1F8B_FBFF),
    (4, 0, 1, 0x1C00_4121, 0x01C0_003F, 0x3F, 0),
    (4, 2, 1, 0x1C00_4143, 0x00C0_003F, 0x3FF, 0),
    (4, 3, 1, 0x1C03_C163, 0x02C0_003F, 0x2FFF, 6),
    (4, 4, 1, 0, 0, 0, 0),
    (7, 0, 1, 0, 0x29C6_FBF, 0, 0),
    (0xB, 0, 1, 1, 2, 0x100, 9),
    (0xB, 1, 1, 4, 16, 0x201, 9),
    (0x1F, 0, 1, 1, 2, 0x100, 9),
    KVM,
    PARAVIRTUAL,
    (0x8000_0008, 0, 0, 0x3027, 0, 0, 0),
]
AMD: list[Entry] = [
    (0, 0, 0, 0x10, 0x68747541, 0x444D4163, 0x69746E65),
    (1, 0, 0, 0xA20F10, 0x0510_0800, 0x7EF8_320B, 0x178B_FBFF),
    (0xB, 0, 1, 1, 2, 0x100, 5),
    KVM,
    PARAVIRTUAL,
    (0x8000_0001, 0, 0, 0xA20F10, 0, 0x0040_0001, 0),
    (0x8000_0008, 0, 0, 0x3030, 0x1000, 0x0000_701F, 0),
    (0x8000_001D, 0, 1, 0x0000_4121, 0x01C0_003F, 0x3F, 0),
    (0x8000_001D, 3, 1, 0x0003_C163, 0x03C0_003F, 0x3FFF, 1),
    (0x8000_001E, 0, 0, 0x1234, 0x101, 0x300, 0),
    (0x8000_0026, 0, 1, 1, 2, 0x100, 5),
]


def leaf(entries: list[Entry], function: int, index: int = 0) -> Entry:
    found = [entry for entry in entries if entry[:2] == (function, index)]
    assert len(found) == 1, (hex(function), index)
    return found[0]


@pytest.mark.parametrize("cpus", range(1, 33))
@pytest.mark.parametrize("supported", [INTEL, AMD], ids=["intel", "amd"])
def test_every_cpu_has_its_own_id_in_every_leaf(supported: list[Entry], cpus: int) -> None:
    topology = Topology(cpus)
    for cpu in range(cpus):
        entries = edit(supported, topology, cpu)
        assert leaf(entries, 1)[4] >> 24 == cpu
        for function in (0xB, 0x1F) if supported is INTEL else (0xB,):
            assert {leaf(entries, function, index)[6] for index in range(3)} == {cpu}
        if supported is AMD:
            assert leaf(entries, 0x8000_001E)[3] == cpu


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 1), (32, 1), (2, 2), (5, 2), (4, 4)])
def test_extended_topology(cores: int, threads: int) -> None:
    """parse_topology in arch/x86/kernel/cpu/topology.c: shifts give package and core ids."""
    topology = Topology(cores, threads)
    ids = set()
    for cpu in range(cores * threads):
        entries = edit(INTEL, topology, cpu)
        smt, core, end = (leaf(entries, 0xB, index) for index in range(3))
        assert (smt[5], core[5], end[5]) == (0x100, 0x201, 2)
        assert (smt[4], core[4], end[4]) == (threads, cores * threads, 0)
        apic_id = smt[6]
        assert apic_id >> core[3] == 0
        ids.add((apic_id >> smt[3], apic_id & (1 << smt[3]) - 1))
    assert ids == {(core, thread) for core in range(cores) for thread in range(threads)}


def test_leaf_1() -> None:
    for cpus in (1, 2, 6):
        _, _, _, eax, ebx, ecx, edx = leaf(edit(INTEL, Topology(cpus), 0), 1)
        assert eax == 0x906EA
        assert ebx & 0xFFFF == 0x0800
        assert ebx >> 16 & 0xFF >= cpus
        assert edx >> 28 & 1 == (cpus > 1)
        assert ecx >> 31


def test_caches_are_shared_within_a_core_or_the_socket() -> None:
    entries = edit(INTEL, Topology(4, 2), 0)
    sharing = [(leaf(entries, 4, index)[3] >> 14 & 0xFFF) + 1 for index in (0, 2, 3)]
    assert sharing == [2, 2, 8]
    assert {(leaf(entries, 4, index)[3] >> 26) + 1 for index in (0, 2, 3)} == {4}
    assert leaf(entries, 4, 4)[3:] == (0, 0, 0, 0)
    entries = edit(AMD, Topology(4, 2), 0)
    assert [(leaf(entries, 0x8000_001D, index)[3] >> 14 & 0xFFF) + 1 for index in (0, 3)] == [2, 8]


def test_amd_leaves() -> None:
    entries = edit(AMD, Topology(6), 5)
    ecx = leaf(entries, 0x8000_0008)[5]
    assert (ecx & 0xFF) + 1 == 6
    assert 1 << (ecx >> 12 & 0xF) == 8
    assert leaf(entries, 0x8000_0001)[5] == 0x0040_0003
    assert leaf(entries, 0x8000_001E)[3:] == (5, 5, 0, 0)
    assert not any(entry[0] == 0x8000_0026 for entry in entries)
    assert leaf(edit(AMD, Topology(1), 0), 0x8000_0001)[5] == 0x0040_0001


def test_leaves_above_the_highest_are_not_added() -> None:
    entries = edit(AMD, Topology(2), 0)
    assert not any(entry[0] == 0x1F for entry in entries)


def test_paravirtual_leaves_and_the_rest_stay() -> None:
    entries = edit(INTEL, Topology(2), 1)
    assert leaf(entries, 0x4000_0001) == PARAVIRTUAL
    assert leaf(entries, 0x4000_0000) == KVM
    assert leaf(entries, 7) in INTEL
    assert is_kvm(entries)
    assert not is_kvm([PARAVIRTUAL])


def test_timing_leaf() -> None:
    entries = edit(INTEL, Topology(1), 0, tsc_khz=2_445_454)
    assert leaf(entries, 0x4000_0010) == (0x4000_0010, 0, 0, 2_445_454, 1_000_000, 0, 0)
    assert leaf(entries, 0x4000_0000)[3] == 0x4000_0010
    assert leaf(entries, 0x4000_0000)[4:] == KVM[4:]
    again = edit(entries, Topology(1), 0, tsc_khz=1000)
    assert leaf(again, 0x4000_0010)[3] == 1000
    bare = [entry for entry in INTEL if entry[0] >> 28 != 4]
    assert not any(entry[0] == 0x4000_0010 for entry in edit(bare, Topology(1), 0, tsc_khz=1000))


def test_tsc_deadline_timer_is_announced_when_kvm_has_it() -> None:
    base = [(*entry[:5], entry[5] & ~(1 << 24), entry[6]) for entry in INTEL]
    for has in (False, True):
        assert leaf(edit(base, Topology(1), 0, tsc_deadline=has), 1)[5] >> 24 & 1 == has


def test_the_list_given_is_not_changed() -> None:
    before = list(INTEL)
    edit(INTEL, Topology(3), 2, tsc_khz=1, tsc_deadline=True)
    assert before == INTEL


def test_the_xsave_components_are_those_of_leaf_0xd() -> None:
    assert xcr0([(0xD, 1, 1, 0xF, 0, 0, 0), (0xD, 0, 1, 0x207, 0, 0, 1)]) == 1 << 32 | 0x207
    assert xcr0([(1, 0, 0, 1, 2, 3, 4)]) == 0


@pytest.mark.parametrize("hypervisor", [b"", b"KVMKVMKVM\0\0\0", b"TCGTCGTCGTCG"])
def test_only_on_an_emulated_cpu_interrupts_end_by_an_exit(hypervisor: bytes) -> None:
    """TCG may inject an interrupt again until the guest exits, so there the end of one is an exit."""
    before = leaf(AMD, 0x4000_0001)
    after = leaf(edit(AMD, Topology(1), 0, hypervisor=hypervisor), 0x4000_0001)
    assert before[3] & 1 << 6
    assert after == ((*before[:3], before[3] & ~(1 << 6), *before[4:]) if hypervisor == EMULATOR else before)
