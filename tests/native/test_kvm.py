"""The system and VM descriptors: capabilities, refusals in words, and no leaks."""

from __future__ import annotations

import errno
import gc
import os
import signal

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.tiny_guest import DATA, MMIO, Code, Recorder, TinyGuest

from pyvmm._native import kvm
from pyvmm.errors import ConfigError, KvmError

pytestmark = pytest.mark.kvm
NEEDED = [
    kvm.KVM_CAP_IRQCHIP,
    kvm.KVM_CAP_USER_MEMORY,
    kvm.KVM_CAP_IRQFD,
    kvm.KVM_CAP_IOEVENTFD,
    kvm.KVM_CAP_IOEVENTFD_ANY_LENGTH,
    kvm.KVM_CAP_IRQ_ROUTING,
    kvm.KVM_CAP_SIGNAL_MSI,
    kvm.KVM_CAP_IMMEDIATE_EXIT,
    kvm.KVM_CAP_READONLY_MEM,
]


def open_count():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_system(guest):
    assert guest.kvm.api_version == 12
    assert guest.kvm.vcpu_mmap_size >= 4096
    assert [guest.kvm.check_extension(capability) > 0 for capability in NEEDED] == [True] * len(NEEDED)
    assert guest.kvm.check_extension(kvm.KVM_CAP_NR_MEMSLOTS) >= 32
    assert guest.vm.check_extension(kvm.KVM_CAP_IOEVENTFD) == 1
    assert guest.kvm.check_extension(99_999) == 0


def test_signals_do_not_keep_a_machine_from_being_made(guest):
    """KVM_CREATE_VM takes a lock that it gives up for any signal."""
    seen = []
    previous = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for _ in range(200):
            guest.kvm.create_vm().close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert seen


def test_whole_guest_leaks_no_descriptor_and_no_mapping(need_kvm):
    def once():
        with TinyGuest(irqchip=True) as guest:
            for number in range(3):
                guest.vcpu(Code.HLT, number=number)

    once()
    count = open_count()
    for _ in range(3):
        once()
    assert open_count() == count
    with open("/proc/self/maps") as lines:
        assert [line for line in lines if "kvm-vcpu" in line or "memfd:pyvmm-ram" in line] == []


def test_forgotten_objects_release_their_descriptors(need_kvm):
    count = open_count()
    vcpu = kvm.Kvm().create_vm().create_vcpu(0)
    assert open_count() == count + 1
    del vcpu
    assert open_count() == count


def test_descriptors_are_not_inherited(guest):
    vcpu = guest.vcpu()
    assert [os.get_inheritable(fd) for fd in (guest.kvm.fd, guest.vm.fd, vcpu.fd)] == [False] * 3


def test_close_is_repeatable_and_final(need_kvm):
    system = kvm.Kvm()
    system.close()
    system.close()
    assert system.fd == -1
    with pytest.raises(KvmError, match="KVM_CREATE_VM: Bad file descriptor|KVM_GET_VCPU_MMAP_SIZE: Bad"):
        system.create_vm()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nonexistent/kvm", "no such device; load kvm_intel"),
        ("/dev/null", "it is not KVM's device"),
        ("/dev", "Is a directory"),
    ],
)
def test_unusable_device_is_a_config_error(path, words):
    with pytest.raises(ConfigError, match=f"^{path}: .*{words}"):
        kvm.Kvm(path)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_forbidden_device_names_the_group(tmp_path):
    path = tmp_path / "kvm"
    path.touch(mode=0)
    os.chmod(tmp_path, 0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match="permission denied; add your user to the group kvm"):
            kvm.Kvm(str(path))
    finally:
        os.seteuid(0)


def test_kvm_error_carries_errno_request_and_hint(guest):
    guest.vm.set_memory_region(1, MMIO, 0x1000, guest.ram.address)
    with pytest.raises(KvmError) as caught:
        guest.vm.set_memory_region(2, MMIO, 0x1000, guest.ram.address)
    assert caught.value.errno == errno.EEXIST
    assert caught.value.strerror.startswith("KVM_SET_USER_MEMORY_REGION: File exists; it overlaps")


def test_same_vcpu_number_twice_is_refused(guest):
    guest.vcpu(number=3)
    with pytest.raises(KvmError, match="KVM_CREATE_VCPU: File exists; there is a vCPU of this number"):
        guest.vcpu(number=3)


def test_thirty_two_vcpus(irq_guest):
    vcpus = [irq_guest.vcpu(number=number) for number in range(32)]
    assert [vcpu.id for vcpu in vcpus] == list(range(32))


def test_irqchip_after_the_first_vcpu_is_refused(guest):
    guest.vcpu()
    with pytest.raises(KvmError, match="KVM_CREATE_IRQCHIP: .*before the first vCPU"):
        guest.vm.create_irqchip()


def test_two_slots_show_the_same_memory(guest):
    guest.vm.set_memory_region(1, MMIO, 0x1000, guest.ram.address + DATA)
    guest.vcpu(Code.store(4) + Code.HLT, rbx=MMIO + 8, rax=0x1234).run(Recorder())
    assert guest.read(DATA + 8, 2) == b"\x34\x12"


def test_identity_map_and_capabilities(need_kvm):
    with kvm_vm() as vm:
        vm.set_identity_map_addr(0xFFFB_C000)
        vm.set_tss_addr(0xFFFB_D000)
        with pytest.raises(KvmError, match="KVM_ENABLE_CAP"):
            vm.enable_cap(99_999)


class kvm_vm:
    """A bare VM."""

    def __enter__(self):
        self.kvm = kvm.Kvm()
        self.vm = self.kvm.create_vm()
        return self.vm

    def __exit__(self, *_):
        self.vm.close()
        self.kvm.close()
