# cython: language_level=3
"""The one process call that a VMM needs and the standard library lacks.

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
