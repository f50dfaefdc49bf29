# cython: language_level=3
"""Host memory that a guest or a peer shares with us: mappings with an address and a buffer.

It owns file descriptors and mappings and must not know what lies in them, nor about KVM:
`Vm.set_memory_region` takes the `address` that a region has.  A region refuses to close
while a memoryview of it lives, because a later access would hit whatever was mapped
there next.
"""

from libc.errno cimport EINVAL, errno
from libc.stdint cimport uint8_t, uintptr_t
from libc.string cimport memset
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_CheckSignals

import os
from fcntl import F_ADD_SEALS, F_DUPFD_CLOEXEC, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, fcntl
from mmap import PAGESIZE
from stat import S_ISREG

from pyvmm.errors import ConfigError

cimport c_sys as c

_AT_ONCE = 64 << 20  # bytes that are allocated before a signal is heard: tenths of a second


cdef class Region:
    """A shared mapping of `size` bytes of the file `fd`; a buffer of bytes.

    Attributes: `fd` (owned; -1 after close), `size` in bytes, `address` (host virtual, 0 after close).
    """

    cdef readonly int fd
    cdef readonly Py_ssize_t size
    cdef readonly bint writable
    cdef void *_mapping
    cdef size_t _mapped
    cdef size_t _lead
    cdef Py_ssize_t _exports

    def __cinit__(self, *args, **kwargs):
        self.fd = -1

    cdef int _map(self, long offset, int flags) except -1:
        """Map `size` bytes from `offset`, which need not lie on a page boundary."""
        cdef int protection = c.PROT_READ | (c.PROT_WRITE if self.writable else 0)
        cdef size_t lead = <size_t>(offset % PAGESIZE)
        cdef size_t length = <size_t>self.size + lead
        cdef void *mapping
        with nogil:
            mapping = c.mmap(NULL, length, protection, c.MAP_SHARED | flags, self.fd, offset - <long>lead)
        if mapping == c.MAP_FAILED:
            raise OSError(errno, f"mmap of {self.size:#x} bytes: {os.strerror(errno)}")
        self._mapping, self._mapped, self._lead = mapping, length, lead
        return 0

    @property
    def address(self):
        return <uintptr_t>self._mapping + self._lead if self._mapping != NULL else 0

    def __len__(self):
        return self.size

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self._mapping == NULL:
            raise ValueError(f"{type(self).__name__} is closed")
        PyBuffer_FillInfo(view, self, <uint8_t *>self._mapping + self._lead, self.size,
                          not self.writable, flags)
        self._exports += 1

    def __releasebuffer__(self, Py_buffer *view):
        self._exports -= 1

    def close(self):
        """Unmap and close; harmless when repeated.  BufferError while a memoryview lives."""
        if self._exports:
            raise BufferError(f"{type(self).__name__}: {self._exports} memoryviews are still in use")
        self._release()

    cdef void _release(self) noexcept:
        cdef int fd = self.fd
        cdef void *mapping = self._mapping
        self._mapping = NULL  # first: another thread may ask for a buffer while this one is at work
        if mapping != NULL:
            with nogil:
                c.munmap(mapping, self._mapped)
        if fd >= 0:
            self.fd = -1
            c.close(fd)

    def __dealloc__(self):
        self._release()


cdef class GuestRegion(Region):
    """Guest RAM: a memfd whose size can never change (seals SHRINK, GROW, SEAL).

    A peer that shares the memory could otherwise shrink the file and kill us with SIGBUS.
    With `hugepages` the file comes from the kernel's pool of its default huge page size.
    With `prefault` every page is allocated now, so that the guest never waits for one.
    ConfigError: the size is no multiple of the page size, or the host has not enough memory.
    """

    cdef bint _keeps

    def __init__(self, size, name="pyvmm-ram", *, hugepages=False, prefault=False):
        if self.fd >= 0:
            raise RuntimeError("GuestRegion is initialised already")
        page = huge_page_size() if hugepages else PAGESIZE
        if size <= 0 or size % page:
            raise ConfigError(f"memory size {size:#x} is not a multiple of the page size {page:#x}")
        self.size, self.writable = size, True
        self._keeps = hugepages or prefault
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        try:
            self.fd = os.memfd_create(name, flags | os.MFD_HUGETLB if hugepages else flags)
            os.ftruncate(self.fd, size)
            fcntl(self.fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
            self._map(0, c.MAP_NORESERVE if not hugepages else 0)
            if not hugepages:
                # Only a wish: /sys/kernel/mm/transparent_hugepage/shmem_enabled decides.
                c.madvise(self._mapping, self._mapped, c.MADV_HUGEPAGE)
            if prefault:
                self._populate(max(page, _AT_ONCE))
        except OSError as error:
            self._release()
            raise ConfigError(_no_memory(size, page, hugepages, error)) from error
        except BaseException:
            self._release()
            raise

    def _populate(self, size_t step):
        """Allocate every page; signals are handled after each `step` bytes."""
        cdef size_t offset = 0, length
        while offset < <size_t>self.size:
            length = min(step, <size_t>self.size - offset)
            # fallocate reports a lack of memory; touching pages would end in SIGBUS.
            os.posix_fallocate(self.fd, offset, length)
            with nogil:
                c.madvise(<uint8_t *>self._mapping + offset, length, c.MADV_POPULATE_WRITE)
            PyErr_CheckSignals()
            offset += length

    def clear(self):
        """Fill everything with zeros, for whoever has it mapped; nobody may be using it.

        Pages go back to the host, unless they were promised: prefaulted ones, and huge ones, whose
        reservation would be lost with them.
        """
        cdef int status = 0
        if self._mapping == NULL:
            raise ValueError("GuestRegion is closed")
        with nogil:
            if self._keeps:
                memset(self._mapping, 0, self._mapped)
            else:
                status = c.madvise(self._mapping, self._mapped, c.MADV_REMOVE)
        if status < 0:
            raise OSError(errno, f"MADV_REMOVE: {os.strerror(errno)}")


cdef class FileRegion(Region):
    """`size` bytes from `offset` of a file that a peer gave us.

    The descriptor is duplicated: the caller keeps and closes `fd`.  `offset` need not lie on a page
    boundary.  ValueError: the range is empty, negative or not within the file (its pages would
    raise SIGBUS).  OSError: the file cannot be mapped like this.
    """

    def __init__(self, fd, offset, size, writable=True):
        if self.fd >= 0:
            raise RuntimeError("FileRegion is initialised already")
        _check_range(fd, offset, size)
        self.size, self.writable = size, writable
        self.fd = fcntl(fd, F_DUPFD_CLOEXEC, 3)
        try:
            self._map(offset, c.MAP_NORESERVE)
        except OSError:
            self._release()
            raise


cdef class AddressSpace:
    """A reservation of `size` bytes of host addresses, into which files are mapped piecewise.

    Nothing is accessible at first.  A memory slot over a part without a file makes KVM_RUN fail
    (EFAULT) when the guest goes there, so give each mapping a slot of its own: accesses beside
    them are then ordinary MMIO exits.
    """

    cdef readonly Py_ssize_t size
    cdef void *_base

    def __init__(self, size):
        if self._base != NULL:
            raise RuntimeError("AddressSpace is initialised already")
        if size <= 0 or size % PAGESIZE:
            raise ValueError(f"size {size:#x} is not a multiple of the page size")
        self.size = size
        base = c.mmap(NULL, size, c.PROT_NONE, _RESERVE, -1, 0)
        if base == c.MAP_FAILED:
            raise OSError(errno, f"mmap of {size:#x} bytes: {os.strerror(errno)}")
        self._base = base

    @property
    def address(self):
        return <uintptr_t>self._base

    def map(self, offset, fd, fd_offset, length, writable):
        """Map `length` bytes from `fd_offset` of `fd` at `offset`, over what was there.

        All three in bytes, on page boundaries.  The descriptor stays the caller's and may be
        closed at once.  Raises ValueError like `FileRegion`, OSError from mmap.
        """
        self._check(offset, length)
        if fd_offset % PAGESIZE:
            raise ValueError(f"file offset {fd_offset:#x} is not on a page boundary")
        _check_range(fd, fd_offset, length)
        protection = c.PROT_READ | (c.PROT_WRITE if writable else 0)
        self._place(offset, length, protection, c.MAP_SHARED | c.MAP_NORESERVE, fd, fd_offset)

    def unmap(self, offset, length):
        """Take away whatever is mapped there; a part without a mapping is no error."""
        self._check(offset, length)
        self._place(offset, length, c.PROT_NONE, _RESERVE, -1, 0)

    def intact(self, offset, length):
        """Whether the end of a mapping of `length` bytes at `offset` still has memory behind it.

        A file loses its end when it is cut short.  True as well where the kernel cannot tell (before 5.14).
        """
        self._check(offset, length)
        cdef void *last = <uint8_t *>self._base + <size_t>(offset + length - PAGESIZE)
        cdef size_t page = PAGESIZE
        cdef int result
        with nogil:
            result = c.madvise(last, page, c.MADV_POPULATE_READ)
        return result == 0 or errno == EINVAL

    def close(self):
        """Give the addresses back; harmless when repeated."""
        if self._base != NULL:
            c.munmap(self._base, self.size)
            self._base = NULL

    def __dealloc__(self):
        if self._base != NULL:
            c.munmap(self._base, self.size)

    cdef int _place(self, size_t offset, size_t length, int protection, int flags, int fd,
                    long fd_offset) except -1:
        cdef uint8_t *target = <uint8_t *>self._base + offset
        if c.mmap(target, length, protection, flags | c.MAP_FIXED, fd, fd_offset) == c.MAP_FAILED:
            raise OSError(errno, f"mmap of {length:#x} bytes: {os.strerror(errno)}")
        return 0

    def _check(self, offset, length):
        if self._base == NULL:
            raise ValueError("AddressSpace is closed")
        if offset < 0 or length <= 0 or offset + length > self.size:
            raise ValueError(f"{offset:#x}+{length:#x} is not within {self.size:#x} bytes")
        if offset % PAGESIZE or length % PAGESIZE:
            raise ValueError(f"{offset:#x}+{length:#x} is not on page boundaries")


cdef int _RESERVE = c.MAP_PRIVATE | c.MAP_ANONYMOUS | c.MAP_NORESERVE


def _check_range(fd, offset, size):
    if offset < 0 or size <= 0:
        raise ValueError(f"no range: offset {offset:#x}, size {size:#x}")
    status = os.fstat(fd)
    if S_ISREG(status.st_mode) and offset + size > status.st_size:
        raise ValueError(f"{offset:#x}+{size:#x} is not within the file's {status.st_size:#x} bytes")


def huge_page_size():
    """The kernel's default huge page size in bytes; ConfigError when it has none."""
    sizes = _meminfo("Hugepagesize:")
    if not sizes:
        raise ConfigError("hugepages: this kernel has none (CONFIG_HUGETLBFS); leave the option out")
    return sizes


def _meminfo(key):
    """A field of /proc/meminfo in bytes, or its plain number; 0 when there is no such field."""
    with open("/proc/meminfo") as lines:
        for line in lines:
            fields = line.split()
            if fields[0] == key:
                return int(fields[1]) << (10 if len(fields) > 2 else 0)
    return 0


def _no_memory(size, page, hugepages, error):
    if not hugepages:
        return f"memory of {size >> 20} MiB: {error.strerror}; choose a smaller size"
    free = _meminfo("HugePages_Free:") - _meminfo("HugePages_Rsvd:")
    return (f"hugepages: {size // page} pages of {page >> 20} MiB are needed and {free} are free "
            f"({error.strerror}); write the number wanted to /proc/sys/vm/nr_hugepages")
