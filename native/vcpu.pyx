# cython: language_level=3
"""One virtual CPU: its state, the run loop and the kick.

It owns the vCPU descriptor and the mapping of struct kvm_run.  It must not know which
devices there are: guest accesses go to a handler as plain integers, and every exit that is
no access is the caller's to judge.  KVM_RUN runs without the GIL.  Every method that KVM
refuses raises `KvmError` with its errno.  Source: Linux Documentation/virt/kvm/api.rst.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.long cimport PyLong_AsUnsignedLongLongMask

from pyvmm._native.refusal import refused

cimport c_kvm as k
cimport c_sys as c

KVM_EXIT_UNKNOWN = k.KVM_EXIT_UNKNOWN
KVM_EXIT_EXCEPTION = k.KVM_EXIT_EXCEPTION
KVM_EXIT_DEBUG = k.KVM_EXIT_DEBUG
KVM_EXIT_HLT = k.KVM_EXIT_HLT
KVM_EXIT_SHUTDOWN = k.KVM_EXIT_SHUTDOWN
KVM_EXIT_FAIL_ENTRY = k.KVM_EXIT_FAIL_ENTRY
KVM_EXIT_INTR = k.KVM_EXIT_INTR
KVM_EXIT_INTERNAL_ERROR = k.KVM_EXIT_INTERNAL_ERROR
KVM_EXIT_SYSTEM_EVENT = k.KVM_EXIT_SYSTEM_EVENT

KVM_MP_STATE_RUNNABLE = k.KVM_MP_STATE_RUNNABLE
KVM_MP_STATE_UNINITIALIZED = k.KVM_MP_STATE_UNINITIALIZED
KVM_MP_STATE_HALTED = k.KVM_MP_STATE_HALTED

if c.pyvmm_kick_install() < 0:
    raise OSError(errno, "sigaction for the vCPU kick")


cdef class Vcpu:
    """A virtual CPU.  It takes over `fd`; `run_size` is the system's vcpu_mmap_size."""

    cdef readonly int fd
    cdef readonly int id
    cdef k.kvm_run *_run
    cdef size_t _run_size
    cdef c.pthread_t _thread
    cdef bint _running
    cdef bint _kicked

    def __cinit__(self, int fd, int id, size_t run_size):
        cdef void *mapping
        self.fd = fd
        self.id = id
        mapping = c.mmap(NULL, run_size, c.PROT_READ | c.PROT_WRITE, c.MAP_SHARED, fd, 0)
        if mapping == c.MAP_FAILED:
            raise refused("mmap of kvm_run", errno)
        self._run = <k.kvm_run *>mapping
        self._run_size = run_size

    def close(self):
        """Unmap and close; harmless when repeated.  RuntimeError while a thread is in `run`."""
        if self._running:
            raise RuntimeError(f"vCPU {self.id} is running; kick it and join its thread first")
        self._release()

    cdef void _release(self) noexcept:
        cdef int fd = self.fd
        if self._run != NULL:
            c.munmap(self._run, self._run_size)
            self._run = NULL
        if fd >= 0:
            self.fd = -1
            with nogil:
                c.close(fd)

    def __dealloc__(self):
        self._release()

    cdef int _ioctl(self, unsigned long request, void *argument, str name) except -1:
        cdef int result
        with nogil:
            result = c.ioctl(self.fd, request, argument)
        if result < 0:
            raise refused(name, errno)
        return result

    # -- state ---------------------------------------------------------------------

    def get_regs(self):
        """rax .. r15, rip, rflags by name."""
        cdef k.kvm_regs regs
        self._ioctl(k.KVM_GET_REGS, &regs, "KVM_GET_REGS")
        return regs

    def set_regs(self, values):
        """Set the registers named in `values`; the others stay.  KeyError for an unknown name."""
        cdef k.kvm_regs regs = _merged(self.get_regs(), values)
        self._ioctl(k.KVM_SET_REGS, &regs, "KVM_SET_REGS")

    def get_sregs(self):
        """Segments and descriptor tables as dicts, control registers, efer, apic_base, by name."""
        cdef k.kvm_sregs sregs
        self._ioctl(k.KVM_GET_SREGS, &sregs, "KVM_GET_SREGS")
        return sregs

    def set_sregs(self, values):
        """Set what `values` names, within segments too; the rest stays.  KeyError for an unknown name."""
        cdef k.kvm_sregs sregs = _merged(self.get_sregs(), values)
        self._ioctl(k.KVM_SET_SREGS, &sregs, "KVM_SET_SREGS")

    def set_fpu_default(self):
        """The state after FNINIT, with all SSE exceptions masked."""
        cdef k.kvm_fpu fpu
        memset(&fpu, 0, sizeof(fpu))
        fpu.fcw = 0x37F
        fpu.mxcsr = 0x1F80
        self._ioctl(k.KVM_SET_FPU, &fpu, "KVM_SET_FPU")

    def set_xcr0(self, uint64_t value):
        """Switch on these state components of XSAVE (SDM volume 1, section 13.3)."""
        cdef k.kvm_xcrs registers
        memset(&registers, 0, sizeof(registers))
        registers.nr_xcrs = 1
        registers.xcrs[0].value = value
        self._ioctl(k.KVM_SET_XCRS, &registers, "KVM_SET_XCRS")

    def set_cpuid(self, leaves):
        """Give the guest these (function, index, flags, eax, ebx, ecx, edx) leaves."""
        cdef uint32_t count = len(leaves)
        cdef k.kvm_cpuid2 *table = <k.kvm_cpuid2 *>calloc(
            1, sizeof(k.kvm_cpuid2) + count * sizeof(k.kvm_cpuid_entry2))
        if table == NULL:
            raise MemoryError
        try:
            table.nent = count
            for i in range(count):
                _fill_leaf(&table.entries[i], leaves[i])
            self._ioctl(k.KVM_SET_CPUID2, table, "KVM_SET_CPUID2")
        finally:
            free(table)

    def get_msrs(self, indices):
        """Values by index; an MSR that KVM does not let be read is left out."""
        values = {}
        rest = list(indices)
        while rest:
            found = self._read_msrs(rest)
            values.update(found)
            rest = rest[len(found) + 1:]  # KVM stops at the first that it refuses
        return values

    cdef list _read_msrs(self, list indices):
        cdef k.kvm_msrs *table = _msr_table(len(indices))
        try:
            for i, index in enumerate(indices):
                table.entries[i].index = index
            count = self._ioctl(k.KVM_GET_MSRS, table, "KVM_GET_MSRS")
            return [(table.entries[i].index, table.entries[i].data) for i in range(count)]
        finally:
            free(table)

    def set_msrs(self, values):
        """Set (index, value) pairs in order; KvmError names the first that KVM refuses."""
        cdef k.kvm_msrs *table = _msr_table(len(values))
        try:
            for i, (index, value) in enumerate(values):
                table.entries[i].index = index
                table.entries[i].data = value
            count = self._ioctl(k.KVM_SET_MSRS, table, "KVM_SET_MSRS")
            if count != len(values):
                index, value = values[count]
                raise refused("KVM_SET_MSRS", 0, f"MSR {index:#x} does not take {value:#x}")
        finally:
            free(table)

    def get_lapic(self):
        """The local APIC's register page: 1 KiB, one 32-bit register every 16 bytes."""
        cdef k.kvm_lapic_state state
        self._ioctl(k.KVM_GET_LAPIC, &state, "KVM_GET_LAPIC")
        return PyBytes_FromStringAndSize(state.regs, k.KVM_APIC_REG_SIZE)

    def set_lapic(self, bytes registers):
        """Replace the local APIC's register page by what `get_lapic` gave, edited."""
        cdef k.kvm_lapic_state state
        if len(registers) != k.KVM_APIC_REG_SIZE:
            raise ValueError(f"a local APIC has {k.KVM_APIC_REG_SIZE} bytes, not {len(registers)}")
        memcpy(state.regs, <const char *>registers, k.KVM_APIC_REG_SIZE)
        self._ioctl(k.KVM_SET_LAPIC, &state, "KVM_SET_LAPIC")

    def get_mp_state(self):
        """A KVM_MP_STATE_*."""
        cdef k.kvm_mp_state state
        self._ioctl(k.KVM_GET_MP_STATE, &state, "KVM_GET_MP_STATE")
        return state.mp_state

    def set_mp_state(self, uint32_t value):
        """Set a KVM_MP_STATE_*."""
        cdef k.kvm_mp_state state
        state.mp_state = value
        self._ioctl(k.KVM_SET_MP_STATE, &state, "KVM_SET_MP_STATE")

    def tsc_khz(self):
        """The guest's time stamp counter frequency in kHz."""
        return self._ioctl(k.KVM_GET_TSC_KHZ, NULL, "KVM_GET_TSC_KHZ")

    def translate(self, uint64_t address):
        """The guest-physical address behind a linear one, as this vCPU sees it, or None."""
        cdef k.kvm_translation translation
        translation.linear_address = address
        self._ioctl(k.KVM_TRANSLATE, &translation, "KVM_TRANSLATE")
        return translation.physical_address if translation.valid else None

    # -- running -------------------------------------------------------------------

    def kick(self):
        """Make `run` return KVM_EXIT_INTR: the one in progress, or else the next one.

        May be called from any thread.  Kicks that no `run` has answered yet count as one.
        """
        if self._run == NULL:
            return
        self._kicked = True
        c.pyvmm_store_byte(&self._run.immediate_exit, 1)
        # The GIL is held here and where `_running` changes, so the thread is alive.
        if self._running:
            c.pyvmm_kick_send(self._thread)

    def run(self, handler):
        """Run the guest until something other than an access happens; (reason, details).

        `handler` serves accesses, with widths 1, 2, 4 or 8 in bytes (KVM may split an access that
        crosses pages into other widths below 8) and values as unsigned little-endian integers:
        mmio_read(address, width) -> int, mmio_write(address, width, value),
        io_read(port, width) -> int, io_write(port, width, value).  Results are cut to the width.  An
        exception in it ends the run and is raised; the access counts as done.

        `details` for KVM_EXIT_INTERNAL_ERROR: suberror, data (tuple), instruction (bytes, as far as
        KVM knows them); FAIL_ENTRY: hardware_entry_failure_reason, cpu; SYSTEM_EVENT: type, data;
        UNKNOWN: hardware_exit_reason; {} else.
        """
        if self._running:
            raise RuntimeError(f"vCPU {self.id} is running already")
        if self._run == NULL:
            raise ValueError(f"vCPU {self.id} is closed")
        c.pyvmm_kick_admit()
        self._thread = c.pthread_self()
        self._running = True
        try:
            return self._loop(handler.mmio_read, handler.mmio_write, handler.io_read, handler.io_write)
        finally:
            self._running = False

    cdef tuple _loop(self, mmio_read, mmio_write, io_read, io_write):
        cdef k.kvm_run *run = self._run
        while True:
            if not self._enter():
                return k.KVM_EXIT_INTR, {}
            if run.exit_reason == k.KVM_EXIT_MMIO:
                self._access_memory(mmio_read, mmio_write)
            elif run.exit_reason == k.KVM_EXIT_IO:
                self._access_ports(io_read, io_write)
            else:
                return run.exit_reason, self._details()

    cdef bint _enter(self) except -1:
        """KVM_RUN until it has something to say; False when a kick was answered instead."""
        cdef int status, number
        while True:
            with nogil:
                status = c.ioctl(self.fd, k.KVM_RUN, 0)
                number = errno
            if status == 0:
                return True
            if number == EINTR:
                if self._kicked:
                    self._kicked = False
                    c.pyvmm_store_byte(&self._run.immediate_exit, 0)
                    return False
                PyErr_CheckSignals()
            elif number != EAGAIN:  # a secondary vCPU that just left wait-for-SIPI
                raise refused("KVM_RUN", number)

    cdef int _access_memory(self, mmio_read, mmio_write) except -1:
        cdef k.kvm_run *run = self._run
        cdef uint32_t width = run.mmio.len
        cdef uint64_t value = 0
        if run.mmio.is_write:
            memcpy(&value, run.mmio.data, width)
            mmio_write(run.mmio.phys_addr, width, value)
        else:
            value = PyLong_AsUnsignedLongLongMask(mmio_read(run.mmio.phys_addr, width))
            memcpy(run.mmio.data, &value, width)
        return 0

    cdef int _access_ports(self, io_read, io_write) except -1:
        """One exit carries all elements that a string instruction could move at once."""
        cdef k.kvm_run *run = self._run
        cdef uint8_t *data = <uint8_t *>run + run.io.data_offset
        cdef uint32_t width = run.io.size
        cdef uint32_t port = run.io.port
        cdef uint32_t count = run.io.count
        cdef bint reading = run.io.direction == k.KVM_EXIT_IO_IN
        cdef uint64_t value
        for _ in range(count):
            if reading:
                value = PyLong_AsUnsignedLongLongMask(io_read(port, width))
                memcpy(data, &value, width)
            else:
                value = 0
                memcpy(&value, data, width)
                io_write(port, width, value)
            data += width
        return 0

    cdef dict _details(self):
        cdef k.kvm_run *run = self._run
        reason = run.exit_reason
        if reason == k.KVM_EXIT_INTERNAL_ERROR:
            return {
                "suberror": run.internal.suberror,
                "data": _words(run.internal.data, run.internal.ndata),
                "instruction": self._failed_instruction(),
            }
        if reason == k.KVM_EXIT_FAIL_ENTRY:
            return {
                "hardware_entry_failure_reason": run.fail_entry.hardware_entry_failure_reason,
                "cpu": run.fail_entry.cpu,
            }
        if reason == k.KVM_EXIT_SYSTEM_EVENT:
            return {
                "type": run.system_event.type,
                "data": _words(run.system_event.data, run.system_event.ndata),
            }
        if reason == k.KVM_EXIT_UNKNOWN:
            return {"hardware_exit_reason": run.hw.hardware_exit_reason}
        return {}

    cdef bytes _failed_instruction(self):
        """The bytes that KVM could not emulate, when it says so (struct emulation_failure)."""
        cdef k.kvm_run *run = self._run
        cdef uint8_t size
        if run.internal.suberror != k.KVM_INTERNAL_ERROR_EMULATION or run.internal.ndata < 3:
            return b""
        if not run.emulation_failure.flags & k.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES:
            return b""
        size = min(run.emulation_failure.insn_size, 15)
        return PyBytes_FromStringAndSize(<const char *>run.emulation_failure.insn_bytes, size)


cdef tuple _words(k.u64 *data, uint32_t count):
    return tuple([data[i] for i in range(min(count, 16))])


cdef int _fill_leaf(k.kvm_cpuid_entry2 *entry, tuple leaf) except -1:
    (entry.function, entry.index, entry.flags, entry.eax, entry.ebx, entry.ecx, entry.edx) = leaf
    return 0


cdef k.kvm_msrs *_msr_table(uint32_t count) except NULL:
    cdef k.kvm_msrs *table = <k.kvm_msrs *>calloc(
        1, sizeof(k.kvm_msrs) + count * sizeof(k.kvm_msr_entry))
    if table == NULL:
        raise MemoryError
    table.nmsrs = count
    return table


cdef dict _merged(dict current, values):
    """`current` with `values` put in, one level down too; KeyError for a name that it lacks."""
    for name, value in values.items():
        old = current[name]
        current[name] = _merged(old, value) if isinstance(old, dict) else value
    return current
