"""The guest's first process in real kernels: what it sets up, and what it says when it cannot.

The machine is QEMU without KVM, since nothing here depends on how the guest is run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.errors import GuestError
from pyvmm.guest import initramfs
from pyvmm.guest.protocol import Mount, Spec
from pyvmm.host import emulator, kernels, lab
from pyvmm.host.backends import find_virtiofsd

pytestmark = [pytest.mark.lab, pytest.mark.slow]

ROOT = Mount("/", "root", "virtiofs", "ro")
ENVIRONMENT = ("PATH=/usr/sbin:/usr/bin:/sbin:/bin",)


class Guest(lab.Lab):
    """A lab whose command and surroundings a test describes."""

    def __init__(self, spec: Spec) -> None:
        self._wanted = spec
        super().__init__(lab.LabConfig(argv=spec.argv, memory=512 << 20, timeout=100))

    def _spec(self) -> Spec:
        return self._wanted


class Result:
    """Exit status and both outputs of a command."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


Run = Callable[[Spec], Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a spec in a kernel of its own: the small one if it is there, else Debian's."""
    if not shutil.which(emulator.QEMU) or not find_virtiofsd():
        pytest.skip("QEMU or virtiofsd is missing (apt-get install qemu-system-x86 qemu-system-common)")
    found = kernels.find_kernels()
    if not found:
        pytest.skip("no kernel is cached (scripts/demo fetches one)")
    monkeypatch.setattr(emulator, "kernel", lambda progress: found[0])

    def start(spec: Spec) -> Result:
        paths = tmp_path / "out", tmp_path / "err"
        fds = [os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC) for path in paths]
        guest = Guest(spec.replace(env=ENVIRONMENT))
        try:
            status = guest.run(None, *fds)
        finally:
            guest.close()
            for fd in fds:
                os.close(fd)
        return Result(status, *(path.read_text() for path in paths))

    return start


@pytest.fixture
def debian(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """Makes `run` take Debian's kernel, whose drivers are modules."""
    found = [kernel for kernel in kernels.find_kernels() if kernel.modules is not None]
    if not found:
        pytest.skip("no kernel with modules is cached (scripts/demo fetches one)")
    monkeypatch.setattr(emulator, "kernel", lambda progress: found[0])


def test_the_surroundings(run: Run) -> None:
    script = """
    set -e
    for path in /dev/pts/ptmx /proc/self /sys/class /dev/fd/0 /dev/stdout; do test -e $path; done
    touch /tmp/x /run/x /dev/shm/x /usr/x
    grep -q 127.0.0.1 /proc/net/fib_trie
    awk '$2 == "/" {print $3}' /proc/mounts
    hostname
    umask
    ulimit -Hn
    tr '\\0' ' ' </proc/1/cmdline
    """
    result = run(Spec(("sh", "-c", script), root=ROOT, overlay=True, hostname="box"))
    assert result.err == ""
    assert result.out.split() == ["overlay", "box", "0022", "1048576", "/init"]
    assert result.status == 0
    assert not Path("/usr/x").exists()


def test_another_user(run: Run) -> None:
    spec = Spec(("sh", "-c", "id -u; id -g; id -G; pwd"), root=ROOT, overlay=True, cwd="/usr")
    result = run(spec.replace(uid=1234, gid=4321, groups=(4321, 77)))
    assert result.out.split() == ["1234", "4321", "4321", "77", "/usr"]


def test_without_overlay_the_root_is_what_it_is(run: Run) -> None:
    result = run(Spec(("touch", "/usr/x"), root=ROOT))
    assert result.status == 1
    assert "Read-only file system" in result.err


def test_without_a_root_the_initramfs_stays(run: Run) -> None:
    result = run(Spec(("/init",)))
    assert result.status == 2
    assert "first process of a guest" in result.err


def test_a_working_directory_that_is_not_there(run: Run) -> None:
    result = run(Spec(("true",), root=ROOT, overlay=True, cwd="/no/where"))
    assert (result.status, result.err) == (
        126,
        "pyvmm: cannot enter '/no/where' in the guest: No such file or directory\n",
    )


def test_a_mount_makes_its_directory(run: Run) -> None:
    mounts = (Mount("/new/place", "none", "tmpfs", "size=1m,noexec,mode=0700"),)
    script = (
        "stat -c %a /new/place; grep -o noexec /proc/mounts | head -1; df --output=size /new/place | tail -1"
    )
    result = run(Spec(("sh", "-c", script), root=ROOT, overlay=True, mounts=mounts))
    assert result.out.split() == ["700", "noexec", "1024"]


@pytest.mark.parametrize(
    ("root", "words"),
    [
        (
            Mount("/", "wrong", "virtiofs"),
            "cannot mount virtiofs 'wrong' on /: no virtio-fs device has this tag",
        ),
        (Mount("/", "/dev/vda", "ext4"), "cannot mount ext4 '/dev/vda' on /: no such device in the guest"),
        (Mount("/", "x", "zfs"), "cannot mount zfs 'x' on /: the guest's kernel has no such file system"),
    ],
)
def test_roots_that_cannot_be_mounted(run: Run, root: Mount, words: str) -> None:
    with pytest.raises(GuestError, match=words):
        run(Spec(("true",), root=root, overlay=True))


def test_without_overlay_in_the_kernel(
    run: Run, debian: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    modules = [name for name in initramfs.LAB_MODULES if name not in ("overlay", "kvm_amd")]
    monkeypatch.setattr(initramfs, "LAB_MODULES", tuple(modules))
    script = "touch /tmp/x /var/tmp/x /run/x && ! touch /usr/x"
    assert run(Spec(("sh", "-c", script), root=ROOT, overlay=True)).status == 0
    assert "the guest's kernel has no overlay file system" in capfd.readouterr().err


def test_without_virtio_console_the_console_says_so(
    run: Run, debian: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initramfs, "LAB_MODULES", ("virtio_pci", "virtiofs"))
    with pytest.raises(GuestError, match="its init said: the guest's kernel has no virtio_console"):
        run(Spec(("true",), root=ROOT))


def test_a_module_that_does_not_load_is_named(
    run: Run, debian: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def damaged(modules: list[tuple[str, bytes]], init: bytes) -> bytes:
        return build([*modules, ("broken", b"\x7fELF and no more")], init)

    build = initramfs.build
    monkeypatch.setattr(initramfs, "build", damaged)
    monkeypatch.setattr(
        initramfs, "LAB_MODULES", ("virtio_pci", "virtio_console", "virtiofs", "wanted_by_nobody")
    )
    archive = initramfs.for_kernel(emulator.kernel(print).modules, initramfs.LAB_MODULES)
    try:
        assert run(Spec(("true",), root=ROOT)).status == 0
    finally:
        os.unlink(archive)
    assert "module broken.ko: Exec format error" in capfd.readouterr().err
