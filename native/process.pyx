# cython: language_level=3
"""The process calls that a VMM needs and the standard library lacks.

It knows nothing about KVM; `pyvmm.backend.process` and `pyvmm.host` use it in the
children that they start.
"""

from libc.errno cimport errno

import os

cimport c_sys as c


def set_parent_death_signal(int signal):
    """Have the kernel send `signal` to this process when the thread that made it ends (prctl(2)).

    The setting is cleared in forked children and kept over exec.  A parent that died before the
    call sends nothing: compare `os.getppid()` afterwards.  Raises OSError.
    """
    if c.prctl(c.PR_SET_PDEATHSIG, <unsigned long>signal, 0, 0, 0) < 0:
        raise OSError(errno, f"PR_SET_PDEATHSIG: {os.strerror(errno)}")


def read_only_mounts():
    """Give this process mounts of its own, the same as before, that nothing can be written through.

    For a child that is about to become a file server: whatever it is asked for, the kernel answers
    EROFS, and no mount that the host makes later shows up.  Descriptors that are open already are
    not affected.  Needs CAP_SYS_ADMIN, Linux 5.12, and a root directory that is a mount point
    (mount_setattr(2)); raises OSError.
    """
    cdef c.mount_attr change
    change.attr_set = c.MOUNT_ATTR_RDONLY
    change.attr_clr = 0
    change.propagation = c.MS_PRIVATE
    change.userns_fd = 0
    if c.unshare(c.CLONE_NEWNS) < 0:
        raise OSError(errno, f"a mount namespace: {os.strerror(errno)}")
    # By number: C libraries before glibc 2.36 lack the wrapper.
    if c.syscall(c.SYS_mount_setattr, <int>c.AT_FDCWD, b"/", <unsigned int>c.AT_RECURSIVE, &change,
                 sizeof(change)) < 0:
        raise OSError(errno, f"mount_setattr: {os.strerror(errno)}")
