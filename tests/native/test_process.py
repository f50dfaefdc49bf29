"""The parent's death signal and read-only mounts, in processes that really have them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess

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


def in_a_child(act):
    """Exit status of a forked process that calls `act` and ends with the error number it hits."""
    pid = os.fork()
    if not pid:
        try:
            act()
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@needs_root
def test_read_only_mounts_are_so_for_this_process_alone(tmp_path):
    def write_after():
        (tmp_path / "before").mkdir()
        process.read_only_mounts()
        (tmp_path / "after").mkdir()

    assert in_a_child(write_after) == errno.EROFS
    assert [path.name for path in tmp_path.iterdir()] == ["before"]


@needs_root
def test_mounts_below_are_read_only_and_later_ones_invisible(tmp_path):
    """A recursive change, and no propagation of what the host mounts afterwards."""
    early, late = tmp_path / "early", tmp_path / "early" / "late"
    early.mkdir()
    ready, go = os.pipe(), os.pipe()

    def look():
        process.read_only_mounts()
        os.write(ready[1], b".")
        os.read(go[0], 1)
        if os.path.ismount(late):
            raise OSError(errno.EBUSY, "the later mount is here too")
        (early / "new").mkdir()

    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(early)], check=True)
    try:
        subprocess.run(["mount", "--make-shared", str(early)], check=True)
        late.mkdir()
        pid = os.fork()
        if not pid:
            os._exit(in_a_child(look))
        os.read(ready[0], 1)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(late)], check=True)
        os.write(go[1], b".")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == errno.EROFS
        (early / "new").mkdir()
    finally:
        subprocess.run(["umount", "--recursive", str(early)], check=True)
        for fd in (*ready, *go):
            os.close(fd)


@needs_root
def test_read_only_mounts_where_they_are_impossible(tmp_path):
    def as_nobody():
        os.setresuid(65534, 65534, 65534)
        process.read_only_mounts()

    def below_a_directory():
        os.chroot(tmp_path)
        process.read_only_mounts()

    assert in_a_child(as_nobody) == errno.EPERM
    assert in_a_child(below_a_directory) == errno.EINVAL


def test_a_child_that_cannot_be_prepared_is_not_started():
    from pyvmm.errors import ConfigError
    from pyvmm.host.children import Child

    def refuse():
        raise OSError(errno.EPERM, "this host forbids it")

    with pytest.raises(ConfigError, match="true cannot be started: this host forbids it"):
        Child(["true"], prepare=refuse)


def test_a_failure_to_make_read_only_names_the_cures(monkeypatch):
    from pyvmm.host import backends

    def refuse():
        raise OSError(errno.EPERM, "mount_setattr: Operation not permitted")

    monkeypatch.setattr(process, "read_only_mounts", refuse)
    with pytest.raises(OSError, match=r"CAP_SYS_ADMIN.*mount_setattr: .*cargo install virtiofsd"):
        backends.make_read_only()
