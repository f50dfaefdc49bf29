# <linux/kvm.h> as far as the native core uses it; nothing here is code.
#
# The structs "anonymous" below are members of unnamed unions in struct kvm_run.  They have
# no name in C, so they may be reached through kvm_run only, never declared.

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t

cdef extern from "<linux/types.h>" nogil:
    # Not uint64_t: the kernel's is long long, another type to the C compiler.
    ctypedef unsigned long long u64 "__u64"

cdef extern from "<linux/kvm.h>" nogil:
    # -- ioctl numbers ------------------------------------------------------------
    const unsigned long KVM_GET_API_VERSION
    const unsigned long KVM_CREATE_VM
    const unsigned long KVM_GET_MSR_INDEX_LIST
    const unsigned long KVM_CHECK_EXTENSION
    const unsigned long KVM_GET_VCPU_MMAP_SIZE
    const unsigned long KVM_GET_SUPPORTED_CPUID

    const unsigned long KVM_CREATE_VCPU
    const unsigned long KVM_SET_USER_MEMORY_REGION
    const unsigned long KVM_SET_TSS_ADDR
    const unsigned long KVM_SET_IDENTITY_MAP_ADDR
    const unsigned long KVM_CREATE_IRQCHIP
    const unsigned long KVM_IRQ_LINE
    const unsigned long KVM_SET_GSI_ROUTING
    const unsigned long KVM_IRQFD
    const unsigned long KVM_IOEVENTFD
    const unsigned long KVM_SIGNAL_MSI
    const unsigned long KVM_ENABLE_CAP

    const unsigned long KVM_RUN
    const unsigned long KVM_GET_REGS
    const unsigned long KVM_SET_REGS
    const unsigned long KVM_GET_SREGS
    const unsigned long KVM_SET_SREGS
    const unsigned long KVM_TRANSLATE
    const unsigned long KVM_GET_MSRS
    const unsigned long KVM_SET_MSRS
    const unsigned long KVM_SET_CPUID2
    const unsigned long KVM_SET_FPU
    const unsigned long KVM_GET_LAPIC
    const unsigned long KVM_SET_LAPIC
    const unsigned long KVM_SET_XCRS
    const unsigned long KVM_GET_MP_STATE
    const unsigned long KVM_SET_MP_STATE
    const unsigned long KVM_GET_TSC_KHZ

    # -- flags and constants ------------------------------------------------------
    enum:
        KVM_MEM_READONLY

        KVM_IOEVENTFD_FLAG_DATAMATCH
        KVM_IOEVENTFD_FLAG_PIO
        KVM_IOEVENTFD_FLAG_DEASSIGN
        KVM_IRQFD_FLAG_DEASSIGN
        KVM_IRQFD_FLAG_RESAMPLE
        KVM_IRQ_ROUTING_IRQCHIP
        KVM_IRQ_ROUTING_MSI
        KVM_APIC_REG_SIZE
        KVM_INTERNAL_ERROR_EMULATION
        KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES

        KVM_CAP_IRQCHIP
        KVM_CAP_USER_MEMORY
        KVM_CAP_SET_TSS_ADDR
        KVM_CAP_EXT_CPUID
        KVM_CAP_NR_VCPUS
        KVM_CAP_NR_MEMSLOTS
        KVM_CAP_MP_STATE
        KVM_CAP_IRQ_ROUTING
        KVM_CAP_IRQFD
        KVM_CAP_SET_IDENTITY_MAP_ADDR
        KVM_CAP_IOEVENTFD
        KVM_CAP_ADJUST_CLOCK
        KVM_CAP_TSC_CONTROL
        KVM_CAP_GET_TSC_KHZ
        KVM_CAP_MAX_VCPUS
        KVM_CAP_TSC_DEADLINE_TIMER
        KVM_CAP_SIGNAL_MSI
        KVM_CAP_READONLY_MEM
        KVM_CAP_IRQFD_RESAMPLE
        KVM_CAP_IOEVENTFD_NO_LENGTH
        KVM_CAP_CHECK_EXTENSION_VM
        KVM_CAP_IOEVENTFD_ANY_LENGTH
        KVM_CAP_MAX_VCPU_ID
        KVM_CAP_X2APIC_API
        KVM_CAP_IMMEDIATE_EXIT
        KVM_CAP_X86_DISABLE_EXITS
        KVM_CAP_HALT_POLL

        KVM_MP_STATE_RUNNABLE
        KVM_MP_STATE_UNINITIALIZED
        KVM_MP_STATE_HALTED

        KVM_EXIT_UNKNOWN
        KVM_EXIT_EXCEPTION
        KVM_EXIT_IO
        KVM_EXIT_IO_IN
        KVM_EXIT_DEBUG
        KVM_EXIT_HLT
        KVM_EXIT_MMIO
        KVM_EXIT_SHUTDOWN
        KVM_EXIT_FAIL_ENTRY
        KVM_EXIT_INTR
        KVM_EXIT_INTERNAL_ERROR
        KVM_EXIT_SYSTEM_EVENT

    # -- system and VM ------------------------------------------------------------
    struct kvm_cpuid_entry2:
        uint32_t function
        uint32_t index
        uint32_t flags
        uint32_t eax
        uint32_t ebx
        uint32_t ecx
        uint32_t edx

    struct kvm_cpuid2:
        uint32_t nent
        kvm_cpuid_entry2 *entries

    struct kvm_msr_list:
        uint32_t nmsrs
        uint32_t *indices

    struct kvm_userspace_memory_region:
        uint32_t slot
        uint32_t flags
        u64 guest_phys_addr
        u64 memory_size
        u64 userspace_addr

    struct kvm_ioeventfd:
        u64 datamatch
        u64 addr
        uint32_t len
        int32_t fd
        uint32_t flags

    struct kvm_irqfd:
        uint32_t fd
        uint32_t gsi
        uint32_t flags
        uint32_t resamplefd

    struct kvm_irq_level:
        uint32_t irq
        uint32_t level

    struct kvm_irq_routing_irqchip:
        uint32_t irqchip
        uint32_t pin

    struct kvm_irq_routing_msi:
        uint32_t address_lo
        uint32_t address_hi
        uint32_t data

    union kvm_irq_routing_u "anonymous":
        kvm_irq_routing_irqchip irqchip
        kvm_irq_routing_msi msi

    struct kvm_irq_routing_entry:
        uint32_t gsi
        uint32_t type
        uint32_t flags
        kvm_irq_routing_u u

    struct kvm_irq_routing:
        uint32_t nr
        kvm_irq_routing_entry *entries

    struct kvm_msi:
        uint32_t address_lo
        uint32_t address_hi
        uint32_t data

    struct kvm_enable_cap:
        uint32_t cap
        u64 args[4]

    # -- vCPU state ---------------------------------------------------------------
    struct kvm_regs:
        u64 rax
        u64 rbx
        u64 rcx
        u64 rdx
        u64 rsi
        u64 rdi
        u64 rsp
        u64 rbp
        u64 r8
        u64 r9
        u64 r10
        u64 r11
        u64 r12
        u64 r13
        u64 r14
        u64 r15
        u64 rip
        u64 rflags

    struct kvm_segment:
        u64 base
        uint32_t limit
        uint16_t selector
        uint8_t type
        uint8_t present
        uint8_t dpl
        uint8_t db
        uint8_t s
        uint8_t l
        uint8_t g
        uint8_t avl
        uint8_t unusable

    struct kvm_dtable:
        u64 base
        uint16_t limit

    struct kvm_sregs:
        kvm_segment cs
        kvm_segment ds
        kvm_segment es
        kvm_segment fs
        kvm_segment gs
        kvm_segment ss
        kvm_segment tr
        kvm_segment ldt
        kvm_dtable gdt
        kvm_dtable idt
        u64 cr0
        u64 cr2
        u64 cr3
        u64 cr4
        u64 cr8
        u64 efer
        u64 apic_base
        u64 interrupt_bitmap[4]

    struct kvm_fpu:
        uint16_t fcw
        uint32_t mxcsr

    struct kvm_xcr:
        uint32_t xcr
        u64 value

    struct kvm_xcrs:
        uint32_t nr_xcrs
        kvm_xcr *xcrs

    struct kvm_lapic_state:
        char *regs

    struct kvm_mp_state:
        uint32_t mp_state

    struct kvm_msr_entry:
        uint32_t index
        u64 data

    struct kvm_msrs:
        uint32_t nmsrs
        kvm_msr_entry *entries

    struct kvm_translation:
        u64 linear_address
        u64 physical_address
        uint8_t valid

    # -- struct kvm_run -----------------------------------------------------------
    struct kvm_run_hw "anonymous":
        u64 hardware_exit_reason

    struct kvm_run_fail_entry "anonymous":
        u64 hardware_entry_failure_reason
        uint32_t cpu

    struct kvm_run_io "anonymous":
        uint8_t direction
        uint8_t size
        uint16_t port
        uint32_t count
        u64 data_offset

    struct kvm_run_mmio "anonymous":
        u64 phys_addr
        uint8_t *data
        uint32_t len
        uint8_t is_write

    struct kvm_run_internal "anonymous":
        uint32_t suberror
        uint32_t ndata
        u64 *data

    struct kvm_run_emulation_failure "anonymous":
        u64 flags
        uint8_t insn_size
        uint8_t *insn_bytes

    struct kvm_run_system_event "anonymous":
        uint32_t type
        uint32_t ndata
        u64 *data

    struct kvm_run:
        uint8_t immediate_exit
        uint32_t exit_reason
        kvm_run_hw hw
        kvm_run_fail_entry fail_entry
        kvm_run_io io
        kvm_run_mmio mmio
        kvm_run_internal internal
        kvm_run_emulation_failure emulation_failure
        kvm_run_system_event system_event
