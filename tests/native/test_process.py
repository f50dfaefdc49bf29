"""The parent's death signal, in processes that really die."""

from __future__ import annotations

import os
import signal

import pytest

process = pytest.importorskip("pyvmm._native.process", reason="the compiled core is not built")


def test_child_dies_with_its_parent():
    reader, writer = os.pipe()
    parent = os.fork()
    if not parent:
        child = os.fork()
        if not child:
            process.set_parent_death_signal(signal.SIGKILL)
            os.write(writer, b"%d" % os.getpid())
            os.close(writer)
            signal.pause()
        os.close(writer)
        os.read(reader, 20)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(writer)
    os.waitpid(parent, 0)
    # The child holds the last write end: end of file means that it is gone or never wrote.
    while os.read(reader, 20):
        pass
    os.close(reader)


def test_unknown_signal_is_an_os_error():
    with pytest.raises(OSError, match="PR_SET_PDEATHSIG: Invalid argument"):
        process.set_parent_death_signal(5000)
