"""`pyvmm run` with real kernels and the real virtiofsd: streams, statuses, files, failures."""

from __future__ import annotations

import hashlib
import os
import re
import signal
from pathlib import Path

import pytest
from guest.machines import Machine, Result

from pyvmm.boot import bzimage, payload
from pyvmm.host.kernels import Kernel

pytestmark = pytest.mark.slow

KERNELS = ("own", "debian")


@pytest.mark.parametrize("kernel", KERNELS)
def test_streams_and_status_are_the_commands(machine: Machine, kernel: str) -> None:
    script = "uname -r; echo problem >&2; cat; exit 37"
    done = machine.pyvmm("run", "--kernel", kernel, "--", "sh", "-c", script, stdin=b"in\0put")
    assert done.status == 37, repr(done)
    release, rest = done.stdout.split(b"\n", 1)
    assert (b"cloud" in release) == (kernel == "debian")
    assert rest == b"in\0put"
    assert done.stderr == b"problem\n"


@pytest.mark.parametrize(("on_loss", "packed"), [("stop", b"1"), ("reconnect", b"0")])
def test_a_megabyte_each_way_over_rings_of_both_kinds(machine: Machine, on_loss: str, packed: bytes) -> None:
    """Rings are packed where nobody has to find out where a lost backend stopped."""
    data = os.urandom(1_000_000)
    script = "cut -c35 /sys/bus/virtio/devices/virtio0/features; cat"
    done = machine.pyvmm("run", "--on-backend-loss", on_loss, "--", "sh", "-c", script, stdin=data).ok()
    kind, back = done.stdout.split(b"\n", 1)
    assert kind == packed
    assert back == data


def test_the_guest_sees_this_hosts_files(machine: Machine) -> None:
    paths = ["/etc/debian_version", "/usr/bin/python3", "/usr/lib/qemu/virtiofsd"]
    done = machine.pyvmm("run", "--", "sha256sum", *paths).ok()
    for line, path in zip(done.stdout.decode().splitlines(), paths, strict=True):
        assert line.split()[0] == hashlib.sha256(Path(path).read_bytes()).hexdigest(), path


def test_a_change_stays_in_the_guest(machine: Machine) -> None:
    script = "echo changed >/etc/hostname; rm /etc/debian_version; cat /etc/hostname; ls /etc/debian_version"
    done = machine.pyvmm("run", "--", "sh", "-c", script)
    assert done.stdout == b"changed\n"
    assert done.status == 2, repr(done)
    assert machine.run("cat", "/etc/hostname").ok().stdout != b"changed\n"
    assert Path("/etc/debian_version").exists()


def test_100_mb_each_way_over_a_share(machine: Machine, scratch: Path) -> None:
    size = 100_000_000
    block = os.urandom(1_000_000)
    with (scratch / "in").open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
    digest = hashlib.sha256(block * (size // len(block))).hexdigest()
    script = f"cd {scratch} && sha256sum <in && cp in out && sync && stat -c %s out"
    done = machine.pyvmm("run", "--share", scratch, "--", "sh", "-c", script, timeout=290).ok()
    assert done.stdout.decode().split() == [digest, "-", str(size)]
    assert hashlib.sha256((scratch / "out").read_bytes()).hexdigest() == digest


def test_names_sizes_modes_and_links_on_a_share(machine: Machine, scratch: Path) -> None:
    (scratch / "empty").touch()
    (scratch / "odd").write_bytes(b"x" * 4097)
    (scratch / "odd").chmod(0o640)
    (scratch / "link").symlink_to("odd")
    (scratch / "name with \u00e4 space").write_text("here")
    script = f"cd {scratch} && stat -c '%n %s %a' empty odd && readlink link && cat name* "
    script += "&& mkdir new && ls -a | wc -l"
    done = machine.pyvmm("run", "--share", scratch, "--", "sh", "-c", script).ok()
    assert done.stdout == b"empty 0 644\nodd 4097 640\nodd\nhere7\n"
    assert (scratch / "new").is_dir()


# All that Linux says of measuring time: the clock's, the loops' and the timer's frequencies are KVM's word.
# Others would be "Fast TSC calibration using PIT", "Refined TSC clocksource calibration" and loops counted.
CALIBRATION = "calibrat|deadline timer"
CALIBRATES_NOTHING = ("TSC deadline timer available", "Calibrating delay loop (skipped) preset value..")


@pytest.mark.parametrize(
    ("kernel", "cpus", "memory", "megabytes"), [("own", 1, "256M", 256), ("debian", 4, "5G", 5120)]
)
def test_cpus_memory_and_clocks(
    machine: Machine, kernel: str, cpus: int, memory: str, megabytes: int
) -> None:
    script = f"nproc; grep MemTotal /proc/meminfo; dmesg | grep -Ei '{CALIBRATION}'"
    options = ("--kernel", kernel, "--cpus", str(cpus), "--memory", memory)
    done = machine.pyvmm("run", *options, "--", "sh", "-c", script).ok()
    count, total, *calibration = done.stdout.decode().splitlines()
    assert int(count) == cpus
    assert 0.85 * megabytes < int(total.split()[1]) / 1024 <= megabytes
    for line, told in zip(calibration, CALIBRATES_NOTHING, strict=True):
        assert told in line, repr(done)


def unpacked(kernel: Kernel) -> str:
    """The kernel in a bzImage, in the cache, where no modules are beside it."""
    fd = os.open(kernel.path, os.O_RDONLY)
    try:
        target, path = payload.open_vmlinux(fd, bzimage.parse(fd, kernel.path), kernel.path)
    finally:
        os.close(fd)
    os.close(target)
    return path


def test_arguments_modules_and_the_log(machine: Machine, debian_kernel: Kernel) -> None:
    """Without its modules this kernel has neither files nor a command."""
    kernel = ("--kernel", unpacked(debian_kernel), "--modules", str(debian_kernel.modules))
    script = "cat /proc/cmdline; grep -c ^virtiofs /proc/modules"
    done = machine.pyvmm("run", *kernel, "--append", "one=1 two=2", "-v", "--", "sh", "-c", script).ok()
    assert re.fullmatch(r"console=ttyS0 .* one=1 two=2\n1\n", done.stdout.decode()), repr(done)
    assert f"Linux version {debian_kernel.release} " in done.stderr.decode(), repr(done)
    assert b"as init process" in done.stderr, repr(done)


def test_5_gib_lie_around_the_hole(machine: Machine) -> None:
    done = machine.pyvmm("run", "--memory", "5G", "--", "grep", "System RAM", "/proc/iomem").ok()
    ranges = [line.split(" ")[0] for line in done.stdout.decode().splitlines()]
    assert ranges == ["00001000-0009fbff", "00100000-bfffffff", "100000000-17fffffff"]


def test_a_guest_panic_has_its_own_status_and_name(machine: Machine) -> None:
    done = machine.pyvmm("run", "--", "sh", "-c", "echo c >/proc/sysrq-trigger; sleep 60")
    assert done.status == 125, repr(done)
    assert b"panicked: sysrq triggered crash" in done.stderr.lower().replace(b"kernel panicked", b"panicked")
    assert b"Call Trace" in done.stderr


def test_a_timeout_has_its_own_status_and_name(machine: Machine) -> None:
    done = machine.pyvmm("run", "--timeout", "45", "--", "sleep", "1000")
    assert done.status == 124, repr(done)
    assert re.search(rb"timeout: the command did not end within 45 s", done.stderr)


def signalled(machine: Machine, scratch: Path, script: str, number: int) -> Result:
    """`script` in a guest, whose VMM gets a signal once it has written the file `ready`."""
    words = ("run", "--share", scratch, "--", "sh", "-c", script)
    return machine.pyvmm(*words, env={"READY": f"{scratch}/ready"}, signal_when=(f"{scratch}/ready", number))


def test_ctrl_c_reaches_the_command(machine: Machine, scratch: Path) -> None:
    script = "trap 'echo caught; exit 5' INT; : >$READY; while :; do sleep 1; done"
    done = signalled(machine, scratch, script, signal.SIGINT)
    assert (done.status, done.stdout) == (5, b"caught\n"), repr(done)


def test_sigterm_leaves_nothing_behind(machine: Machine, scratch: Path) -> None:
    done = signalled(machine, scratch, ": >$READY; sleep 1000", signal.SIGTERM)
    assert done.status == 128 + signal.SIGTERM, repr(done)
    left = machine.run("sh", "-c", "pgrep -a 'virtiofsd|pyvmm' | grep -v agent; ls /tmp | grep -i sock; true")
    assert b"tag" not in left.stdout and b"virtiofsd" not in left.stdout.replace(b"cache=always", b""), repr(
        left
    )


def test_a_signalled_command_counts_as_in_a_shell(machine: Machine) -> None:
    assert machine.pyvmm("run", "--", "sh", "-c", "kill -9 $$").status == 128 + 9


def test_a_command_that_is_not_there(machine: Machine) -> None:
    done = machine.pyvmm("run", "--", "no-such-command")
    assert done.status == 127, repr(done)
    assert b"no-such-command" in done.stderr
