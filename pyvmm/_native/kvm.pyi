"""Types of native/kvm.pyx."""

from collections.abc import Sequence
from typing import Final

from pyvmm._native.vcpu import CpuidLeaf, Vcpu

API_VERSION: Final = 12

KVM_CAP_IRQCHIP: Final[int]
KVM_CAP_USER_MEMORY: Final[int]
KVM_CAP_SET_TSS_ADDR: Final[int]
KVM_CAP_EXT_CPUID: Final[int]
KVM_CAP_NR_VCPUS: Final[int]
KVM_CAP_NR_MEMSLOTS: Final[int]
KVM_CAP_MP_STATE: Final[int]
KVM_CAP_IRQ_ROUTING: Final[int]
KVM_CAP_IRQFD: Final[int]
KVM_CAP_SET_IDENTITY_MAP_ADDR: Final[int]
KVM_CAP_IOEVENTFD: Final[int]
KVM_CAP_ADJUST_CLOCK: Final[int]
KVM_CAP_TSC_CONTROL: Final[int]
KVM_CAP_GET_TSC_KHZ: Final[int]
KVM_CAP_MAX_VCPUS: Final[int]
KVM_CAP_TSC_DEADLINE_TIMER: Final[int]
KVM_CAP_SIGNAL_MSI: Final[int]
KVM_CAP_READONLY_MEM: Final[int]
KVM_CAP_IRQFD_RESAMPLE: Final[int]
KVM_CAP_IOEVENTFD_NO_LENGTH: Final[int]
KVM_CAP_CHECK_EXTENSION_VM: Final[int]
KVM_CAP_IOEVENTFD_ANY_LENGTH: Final[int]
KVM_CAP_MAX_VCPU_ID: Final[int]
KVM_CAP_X2APIC_API: Final[int]
KVM_CAP_IMMEDIATE_EXIT: Final[int]
KVM_CAP_X86_DISABLE_EXITS: Final[int]
KVM_CAP_HALT_POLL: Final[int]
KVM_IRQ_ROUTING_IRQCHIP: Final[int]
KVM_IRQ_ROUTING_MSI: Final[int]

GsiRoute = tuple[int, int, int, int, int]

def hypervisor() -> bytes: ...

class Descriptor:
    @property
    def fd(self) -> int: ...
    def check_extension(self, capability: int) -> int: ...
    def close(self) -> None: ...

class Kvm(Descriptor):
    def __init__(self, path: str = "/dev/kvm") -> None: ...
    @property
    def api_version(self) -> int: ...
    @property
    def vcpu_mmap_size(self) -> int: ...
    def supported_cpuid(self) -> list[CpuidLeaf]: ...
    def msr_indices(self) -> list[int]: ...
    def create_vm(self) -> Vm: ...

class Vm(Descriptor):
    def __init__(self, fd: int, run_size: int) -> None: ...
    def create_irqchip(self) -> None: ...
    def set_tss_addr(self, guest_address: int) -> None: ...
    def set_identity_map_addr(self, guest_address: int) -> None: ...
    def enable_cap(self, capability: int, argument: int = 0) -> None: ...
    def set_memory_region(
        self, slot: int, guest_address: int, size: int, host_address: int, readonly: bool = False
    ) -> None: ...
    def ioeventfd(
        self,
        fd: int,
        address: int,
        length: int = 0,
        datamatch: int | None = None,
        pio: bool = False,
        assign: bool = True,
    ) -> None: ...
    def irqfd(self, fd: int, gsi: int, assign: bool = True, resample_fd: int | None = None) -> None: ...
    def set_gsi_routing(self, routes: Sequence[GsiRoute]) -> None: ...
    def irq_line(self, gsi: int, level: bool) -> None: ...
    def signal_msi(self, address: int, data: int) -> bool: ...
    def create_vcpu(self, number: int) -> Vcpu: ...
