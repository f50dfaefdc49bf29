# cython: language_level=3
"""The KVM system and virtual machine ioctls, one method each.

It owns the two descriptors and converts arguments; it must not know why a caller wants
a slot, a route or an eventfd, and keeps no book about them.  Every method that KVM
refuses raises `KvmError` with its errno.  Source: Linux Documentation/virt/kvm/api.rst.
"""

from libc.errno cimport E2BIG, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from cpython.exc cimport PyErr_CheckSignals

import os

from pyvmm._native.refusal import refused, unusable
from pyvmm._native.vcpu import Vcpu

cimport c_kvm as k
cimport c_sys as c

API_VERSION = 12  # the only one there ever was (api.rst, KVM_GET_API_VERSION)

KVM_CAP_IRQCHIP = k.KVM_CAP_IRQCHIP
KVM_CAP_USER_MEMORY = k.KVM_CAP_USER_MEMORY
KVM_CAP_SET_TSS_ADDR = k.KVM_CAP_SET_TSS_ADDR
KVM_CAP_EXT_CPUID = k.KVM_CAP_EXT_CPUID
KVM_CAP_NR_VCPUS = k.KVM_CAP_NR_VCPUS
KVM_CAP_NR_MEMSLOTS = k.KVM_CAP_NR_MEMSLOTS
KVM_CAP_MP_STATE = k.KVM_CAP_MP_STATE
KVM_CAP_IRQ_ROUTING = k.KVM_CAP_IRQ_ROUTING
KVM_CAP_IRQFD = k.KVM_CAP_IRQFD
KVM_CAP_SET_IDENTITY_MAP_ADDR = k.KVM_CAP_SET_IDENTITY_MAP_ADDR
KVM_CAP_IOEVENTFD = k.KVM_CAP_IOEVENTFD
KVM_CAP_ADJUST_CLOCK = k.KVM_CAP_ADJUST_CLOCK
KVM_CAP_TSC_CONTROL = k.KVM_CAP_TSC_CONTROL
KVM_CAP_GET_TSC_KHZ = k.KVM_CAP_GET_TSC_KHZ
KVM_CAP_MAX_VCPUS = k.KVM_CAP_MAX_VCPUS
KVM_CAP_TSC_DEADLINE_TIMER = k.KVM_CAP_TSC_DEADLINE_TIMER
KVM_CAP_SIGNAL_MSI = k.KVM_CAP_SIGNAL_MSI
KVM_CAP_READONLY_MEM = k.KVM_CAP_READONLY_MEM
KVM_CAP_IRQFD_RESAMPLE = k.KVM_CAP_IRQFD_RESAMPLE
KVM_CAP_IOEVENTFD_NO_LENGTH = k.KVM_CAP_IOEVENTFD_NO_LENGTH
KVM_CAP_CHECK_EXTENSION_VM = k.KVM_CAP_CHECK_EXTENSION_VM
KVM_CAP_IOEVENTFD_ANY_LENGTH = k.KVM_CAP_IOEVENTFD_ANY_LENGTH
KVM_CAP_MAX_VCPU_ID = k.KVM_CAP_MAX_VCPU_ID
KVM_CAP_X2APIC_API = k.KVM_CAP_X2APIC_API
KVM_CAP_IMMEDIATE_EXIT = k.KVM_CAP_IMMEDIATE_EXIT
KVM_CAP_X86_DISABLE_EXITS = k.KVM_CAP_X86_DISABLE_EXITS
KVM_CAP_HALT_POLL = k.KVM_CAP_HALT_POLL

KVM_IRQ_ROUTING_IRQCHIP = k.KVM_IRQ_ROUTING_IRQCHIP
KVM_IRQ_ROUTING_MSI = k.KVM_IRQ_ROUTING_MSI


def hypervisor():
    """The twelve bytes with which the hypervisor under this host signs; of no meaning where there is none.

    Source: CPUID leaf 0x40000000 (Linux Documentation/virt/kvm/x86/cpuid.rst).
    """
    cdef unsigned int a = 0
    cdef unsigned int[3] signature
    c.__cpuid(0x40000000, a, signature[0], signature[1], signature[2])
    return (<char *>signature)[:sizeof(signature)]


cdef class Descriptor:
    """Owner of one KVM descriptor: `fd`, -1 after `close()`."""

    cdef readonly int fd

    def __cinit__(self, *args, **kwargs):
        self.fd = -1

    cdef int _plain(self, unsigned long request, unsigned long argument, str name) except -1:
        """An ioctl whose argument is a number."""
        cdef int result
        while True:
            with nogil:
                result = c.ioctl(self.fd, request, argument)
            if result >= 0:
                return result
            if errno != EINTR:
                raise refused(name, errno)
            PyErr_CheckSignals()  # KVM_CREATE_VM gives up when a signal comes

    cdef int _struct(self, unsigned long request, void *argument, str name) except -1:
        """An ioctl whose argument is a struct."""
        return self._plain(request, <unsigned long>argument, name)

    def check_extension(self, int capability):
        """What KVM_CHECK_EXTENSION answers for a KVM_CAP_*: 0 = absent, else 1 or a limit."""
        return self._plain(k.KVM_CHECK_EXTENSION, capability, "KVM_CHECK_EXTENSION")

    def close(self):
        """Close the descriptor; harmless when repeated."""
        cdef int fd = self.fd
        if fd >= 0:
            self.fd = -1
            with nogil:
                c.close(fd)

    def __dealloc__(self):
        if self.fd >= 0:
            c.close(self.fd)


cdef class Kvm(Descriptor):
    """The host's KVM.  ConfigError when it is absent, forbidden or of a foreign version."""

    def __init__(self, path="/dev/kvm"):
        if self.fd >= 0:
            raise RuntimeError("Kvm is open already")
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise unusable(path, error.errno) from error
        version = c.ioctl(self.fd, k.KVM_GET_API_VERSION, 0)
        if version != API_VERSION:
            number = errno if version < 0 else 0
            self.close()
            raise unusable(path, number)

    @property
    def api_version(self):
        return self._plain(k.KVM_GET_API_VERSION, 0, "KVM_GET_API_VERSION")

    @property
    def vcpu_mmap_size(self):
        """Size of struct kvm_run with its data pages, in bytes."""
        return self._plain(k.KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE")

    def supported_cpuid(self):
        """What KVM can give a guest: (function, index, flags, eax, ebx, ecx, edx) for each leaf."""
        cdef uint32_t count = 64
        cdef k.kvm_cpuid2 *table
        while True:
            table = <k.kvm_cpuid2 *>calloc(1, sizeof(k.kvm_cpuid2) + count * sizeof(k.kvm_cpuid_entry2))
            if table == NULL:
                raise MemoryError
            try:
                table.nent = count
                if c.ioctl(self.fd, k.KVM_GET_SUPPORTED_CPUID, table) == 0:
                    return [_leaf(&table.entries[i]) for i in range(table.nent)]
                if errno != E2BIG:
                    raise refused("KVM_GET_SUPPORTED_CPUID", errno)
            finally:
                free(table)
            count *= 2

    def msr_indices(self):
        """The MSRs that KVM_GET_MSRS and KVM_SET_MSRS know, as a list of indices."""
        cdef k.kvm_msr_list probe
        cdef k.kvm_msr_list *table
        probe.nmsrs = 0
        if c.ioctl(self.fd, k.KVM_GET_MSR_INDEX_LIST, &probe) < 0 and errno != E2BIG:
            raise refused("KVM_GET_MSR_INDEX_LIST", errno)
        table = <k.kvm_msr_list *>calloc(1, sizeof(k.kvm_msr_list) + probe.nmsrs * sizeof(uint32_t))
        if table == NULL:
            raise MemoryError
        try:
            table.nmsrs = probe.nmsrs
            self._struct(k.KVM_GET_MSR_INDEX_LIST, table, "KVM_GET_MSR_INDEX_LIST")
            return [table.indices[i] for i in range(table.nmsrs)]
        finally:
            free(table)

    def create_vm(self):
        """Make an empty virtual machine."""
        size = self.vcpu_mmap_size
        return Vm(self._plain(k.KVM_CREATE_VM, 0, "KVM_CREATE_VM"), size)


cdef tuple _leaf(k.kvm_cpuid_entry2 *entry):
    return (entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx)


cdef class Vm(Descriptor):
    """A virtual machine.  It takes over `fd`; vCPUs that it made keep it alive inside KVM."""

    cdef Py_ssize_t _run_size

    def __init__(self, int fd, Py_ssize_t run_size):
        if self.fd >= 0:
            raise RuntimeError("Vm is open already")
        self.fd = fd
        self._run_size = run_size

    def create_irqchip(self):
        """Make the local APICs, the IOAPIC and the PICs inside KVM; before the first vCPU."""
        self._plain(k.KVM_CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP")

    def set_tss_addr(self, unsigned long guest_address):
        """Three guest pages that Intel hosts need below 4 GiB."""
        self._plain(k.KVM_SET_TSS_ADDR, guest_address, "KVM_SET_TSS_ADDR")

    def set_identity_map_addr(self, uint64_t guest_address):
        """One guest page that Intel hosts need below 4 GiB; before the first vCPU."""
        self._struct(k.KVM_SET_IDENTITY_MAP_ADDR, &guest_address, "KVM_SET_IDENTITY_MAP_ADDR")

    def enable_cap(self, uint32_t capability, uint64_t argument=0):
        """Switch on a KVM_CAP_* that is off by default, with its first argument."""
        cdef k.kvm_enable_cap enable = _ZERO_CAP
        enable.cap = capability
        enable.args[0] = argument
        self._struct(k.KVM_ENABLE_CAP, &enable, "KVM_ENABLE_CAP")

    def set_memory_region(self, uint32_t slot, uint64_t guest_address, uint64_t size, uint64_t host_address,
                          bint readonly=False):
        """Put `size` bytes at `host_address` into guest memory; size 0 removes the slot.

        The host memory stays the caller's and must stay mapped as long as the slot is there.
        """
        cdef k.kvm_userspace_memory_region region
        region.slot = slot
        region.flags = k.KVM_MEM_READONLY if readonly else 0
        region.guest_phys_addr = guest_address
        region.memory_size = size
        region.userspace_addr = host_address
        self._struct(k.KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION")

    def ioeventfd(self, int fd, uint64_t address, uint32_t length=0, datamatch=None, bint pio=False,
                  bint assign=True):
        """Have guest writes to `address` signal the eventfd instead of leaving KVM_RUN.

        `length` 0 takes any width; `datamatch` takes only writes of that value and needs a length.
        To deassign, repeat all arguments.
        """
        cdef k.kvm_ioeventfd request = _ZERO_IOEVENTFD
        request.fd = fd
        request.addr = address
        request.len = length
        if datamatch is not None:
            request.datamatch = datamatch
            request.flags |= k.KVM_IOEVENTFD_FLAG_DATAMATCH
        if pio:
            request.flags |= k.KVM_IOEVENTFD_FLAG_PIO
        if not assign:
            request.flags |= k.KVM_IOEVENTFD_FLAG_DEASSIGN
        self._struct(k.KVM_IOEVENTFD, &request, "KVM_IOEVENTFD")

    def irqfd(self, int fd, uint32_t gsi, bint assign=True, resample_fd=None):
        """Have the eventfd raise `gsi` in the guest, without user space.

        An event that is pending on the eventfd when it is assigned is injected then.
        """
        cdef k.kvm_irqfd request = _ZERO_IRQFD
        request.fd = <uint32_t>fd
        request.gsi = gsi
        if not assign:
            request.flags |= k.KVM_IRQFD_FLAG_DEASSIGN
        if resample_fd is not None:
            request.resamplefd = resample_fd
            request.flags |= k.KVM_IRQFD_FLAG_RESAMPLE
        self._struct(k.KVM_IRQFD, &request, "KVM_IRQFD")

    def set_gsi_routing(self, routes):
        """Replace the whole routing table by (gsi, kind, a, b, c) tuples.

        kind KVM_IRQ_ROUTING_IRQCHIP: a = chip (0, 1 PIC, 2 IOAPIC), b = pin, c = 0; kind
        KVM_IRQ_ROUTING_MSI: a, b = low and high half of the address, c = data.
        """
        cdef uint32_t count = len(routes)
        cdef k.kvm_irq_routing *table = <k.kvm_irq_routing *>calloc(
            1, sizeof(k.kvm_irq_routing) + count * sizeof(k.kvm_irq_routing_entry))
        if table == NULL:
            raise MemoryError
        try:
            table.nr = count
            for i in range(count):
                _fill_route(&table.entries[i], routes[i])
            self._struct(k.KVM_SET_GSI_ROUTING, table, "KVM_SET_GSI_ROUTING")
        finally:
            free(table)

    def irq_line(self, uint32_t gsi, bint level):
        """Set the level of an interrupt line."""
        cdef k.kvm_irq_level line
        line.irq = gsi
        line.level = level
        self._struct(k.KVM_IRQ_LINE, &line, "KVM_IRQ_LINE")

    def signal_msi(self, uint64_t address, uint32_t data):
        """Deliver one MSI now; True when a guest CPU took it, False when the guest blocks it."""
        cdef k.kvm_msi message = _ZERO_MSI
        message.address_lo = <uint32_t>address
        message.address_hi = <uint32_t>(address >> 32)
        message.data = data
        return self._struct(k.KVM_SIGNAL_MSI, &message, "KVM_SIGNAL_MSI") > 0

    def create_vcpu(self, int number):
        """Make the virtual CPU whose APIC id is `number`."""
        return Vcpu(self._plain(k.KVM_CREATE_VCPU, number, "KVM_CREATE_VCPU"), number, self._run_size)


# Templates, because reserved members must be zero and Cython leaves locals as they are.
cdef k.kvm_enable_cap _ZERO_CAP
cdef k.kvm_ioeventfd _ZERO_IOEVENTFD
cdef k.kvm_irqfd _ZERO_IRQFD
cdef k.kvm_msi _ZERO_MSI


cdef int _fill_route(k.kvm_irq_routing_entry *entry, tuple route) except -1:
    gsi, kind, a, b, data = route
    entry.gsi = gsi
    entry.type = kind
    if kind == k.KVM_IRQ_ROUTING_IRQCHIP:
        entry.u.irqchip.irqchip = a
        entry.u.irqchip.pin = b
    else:
        entry.u.msi.address_lo = a
        entry.u.msi.address_hi = b
        entry.u.msi.data = data
    return 0
