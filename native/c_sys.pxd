# C library declarations shared by the native core; nothing here is code.

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t length, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t length)
    int madvise(void *address, size_t length, int advice)
    void *MAP_FAILED
    enum:
        PROT_NONE
        PROT_READ
        PROT_WRITE
        MAP_SHARED
        MAP_PRIVATE
        MAP_ANONYMOUS
        MAP_NORESERVE
        MAP_FIXED
        MADV_HUGEPAGE
        MADV_POPULATE_READ
        MADV_POPULATE_WRITE
        MADV_REMOVE

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    pthread_t pthread_self()

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, ...)
    enum:
        PR_SET_PDEATHSIG

cdef extern from "<sched.h>" nogil:
    int unshare(int flags)
    enum:
        CLONE_NEWNS

cdef extern from "<fcntl.h>" nogil:
    enum:
        AT_FDCWD
        AT_RECURSIVE

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)

cdef extern from "<sys/syscall.h>" nogil:
    enum:
        SYS_mount_setattr

cdef extern from "<linux/mount.h>" nogil:
    struct mount_attr:
        unsigned long long attr_set
        unsigned long long attr_clr
        unsigned long long propagation
        unsigned long long userns_fd
    enum:
        MOUNT_ATTR_RDONLY
        MS_PRIVATE

cdef extern from "kick.h" nogil:
    int pyvmm_kick_install()
    int pyvmm_kick_admit()
    int pyvmm_kick_send(pthread_t thread)
    void pyvmm_store_byte(unsigned char *target, unsigned char value)

cdef extern from "<cpuid.h>" nogil:
    void __cpuid(unsigned int leaf, unsigned int a, unsigned int b, unsigned int c, unsigned int d)  # a macro
