"""vCPU state in and out of KVM, by name."""

from __future__ import annotations

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.tiny_guest import CODE, LAPIC_SVR, MMIO, PML4, Code, Recorder

from pyvmm._native import vcpu as native
from pyvmm._native.kvm import Kvm
from pyvmm.boot import cpuid
from pyvmm.errors import KvmError

pytestmark = pytest.mark.kvm
IA32_TSC, EFER, TSC_AUX = 0x10, 0xC000_0080, 0xC000_0103


def test_registers_come_back_and_unnamed_ones_stay(guest):
    vcpu = guest.vcpu()
    names = [name for name in vcpu.get_regs() if name not in ("rip", "rflags")]
    values = {name: 0x8000_0000_0000_0000 + 17 * i for i, name in enumerate(names)}
    vcpu.set_regs(values)
    vcpu.set_regs({"rip": 0x1234})
    assert vcpu.get_regs() == {**values, "rip": 0x1234, "rflags": 2}
    assert len(values) == 16


def test_segments_and_control_registers_merge(guest):
    vcpu = guest.vcpu()
    before = vcpu.get_sregs()
    vcpu.set_sregs({"fs": {"base": 0x7F00_0000_1000}, "gdt": {"limit": 0x17}, "cr2": 0xABC})
    after = vcpu.get_sregs()
    assert after["fs"] == {**before["fs"], "base": 0x7F00_0000_1000}
    assert after["gdt"] == {"base": before["gdt"]["base"], "limit": 0x17}
    assert after["cr2"] == 0xABC
    assert (after["cr3"], after["cs"], after["apic_base"]) == (PML4, before["cs"], before["apic_base"])


@pytest.mark.parametrize("values", [{"nosuch": 1}, {"cs": {"nosuch": 1}}])
def test_unknown_names_are_refused(guest, values):
    vcpu = guest.vcpu()
    with pytest.raises(KeyError, match="nosuch"):
        vcpu.set_sregs(values)
    with pytest.raises(KeyError):
        vcpu.set_regs({"cs": 1})


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_values_that_do_not_fit_are_refused(guest, value):
    with pytest.raises(OverflowError):
        guest.vcpu().set_regs({"rax": value})


def test_msrs(guest):
    vcpu = guest.vcpu()
    vcpu.set_msrs([(TSC_AUX, 0x55), (EFER, 0x500)])
    assert vcpu.get_msrs([TSC_AUX, EFER]) == {TSC_AUX: 0x55, EFER: 0x500}
    assert vcpu.get_msrs([]) == {}


def test_unreadable_msrs_are_left_out_wherever_they_stand(guest):
    vcpu = guest.vcpu()
    bad = 0x4242_4242
    assert set(vcpu.get_msrs([bad, EFER, bad, bad, TSC_AUX, bad])) == {EFER, TSC_AUX}


def test_refused_msr_is_named(guest):
    with pytest.raises(KvmError, match="MSR 0x42424242 does not take 0x7"):
        guest.vcpu().set_msrs([(EFER, 0x500), (0x4242_4242, 7)])


def test_cpuid_is_what_the_guest_sees(guest):
    leaves = guest.kvm.supported_cpuid()
    edited = [leaf if leaf[0] else (*leaf[:4], 0x1234_5678, *leaf[5:]) for leaf in leaves]
    vcpu = guest.vcpu(b"\x0f\xa2" + Code.HLT)  # cpuid
    vcpu.set_cpuid(edited)
    vcpu.run(Recorder())
    assert vcpu.get_regs()["rbx"] == 0x1234_5678


def test_supported_cpuid_has_the_usual_leaves(guest):
    leaves = guest.kvm.supported_cpuid()
    assert all(len(leaf) == 7 for leaf in leaves)
    assert {0, 1, 0x8000_0000, 0x8000_0001, 0x4000_0000} <= {leaf[0] for leaf in leaves}


def test_msr_indices_name_known_msrs(guest):
    indices = guest.kvm.msr_indices()
    assert IA32_TSC in indices
    assert len(set(indices)) == len(indices) > 10


def test_local_apic_page(irq_guest):
    vcpu = irq_guest.vcpu()
    page = bytearray(vcpu.get_lapic())
    assert len(page) == 0x400
    page[LAPIC_SVR + 1] |= 1
    vcpu.set_lapic(bytes(page))
    assert vcpu.get_lapic()[LAPIC_SVR + 1] & 1
    with pytest.raises(ValueError, match="1024"):
        vcpu.set_lapic(b"short")


def test_mp_state(irq_guest):
    vcpu = irq_guest.vcpu()
    vcpu.set_mp_state(native.KVM_MP_STATE_HALTED)
    assert vcpu.get_mp_state() == native.KVM_MP_STATE_HALTED
    vcpu.set_mp_state(native.KVM_MP_STATE_RUNNABLE)
    assert vcpu.get_mp_state() == native.KVM_MP_STATE_RUNNABLE


def test_fpu_starts_masked(guest):
    """The MXCSR that `set_fpu_default` leaves, as the guest reads it."""
    code = bytes.fromhex("0fae1b") + Code.HLT  # stmxcsr [rbx]
    vcpu = guest.vcpu(code, rbx=CODE + 0x800)
    vcpu.set_fpu_default()
    reason, _ = vcpu.run(Recorder())
    if reason == native.KVM_EXIT_INTERNAL_ERROR:
        pytest.skip("this KVM emulates ring 0 and does not emulate stmxcsr")
    assert guest.read(CODE + 0x800, 4) == (0x1F80).to_bytes(4, "little")


def test_xsave_components_can_be_switched_on_if_cpuid_offers_them(guest):
    kvm = Kvm()
    leaves = kvm.supported_cpuid()
    offered = cpuid.xcr0(leaves)
    vcpu = guest.vcpu()
    vcpu.set_cpuid(leaves)
    if offered:
        vcpu.set_xcr0(offered)
    with pytest.raises(KvmError, match="KVM_SET_XCRS"):
        vcpu.set_xcr0(1 << 40 | 1)


def test_translate_walks_the_guests_tables(guest):
    vcpu = guest.vcpu()
    assert vcpu.translate(CODE + 5) == CODE + 5
    assert vcpu.translate(MMIO + 7) == MMIO + 7
    assert vcpu.translate(0x7FFF_0000_0000) is None


def test_tsc_frequency_is_plausible(guest):
    assert 100_000 < guest.vcpu().tsc_khz() < 10_000_000
