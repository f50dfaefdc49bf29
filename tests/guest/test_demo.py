"""`scripts/demo` as its users run it a second time: nothing is installed, and there is no network."""

from __future__ import annotations

import re
import subprocess

import pytest
from fakes.source import ROOT

from pyvmm.host import accel
from pyvmm.host.kernels import Kernel

pytestmark = [pytest.mark.slow, pytest.mark.lab]

WITHOUT_NETWORK = ("unshare", "--net", "--")
DEADLINE = 240


@pytest.fixture(scope="module", autouse=True)
def need_set_up_checkout() -> None:
    if not (ROOT / ".venv" / ".pyvmm").exists():
        pytest.skip("scripts/demo or scripts/test has not set this checkout up")
    if subprocess.run([*WITHOUT_NETWORK, "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare is not permitted here; run as root with CAP_SYS_ADMIN")


def demo(*words: str) -> tuple[int, str, str]:
    """Exit status, standard output and error, but for the line that says why it is in the lab."""
    done = subprocess.run(
        [*WITHOUT_NETWORK, ROOT / "scripts" / "demo", *words],
        stdin=subprocess.DEVNULL, capture_output=True, timeout=DEADLINE, text=True, check=False,
    )  # fmt: skip
    reason = accel.why_not()
    stderr = done.stderr
    if reason:
        line, _, stderr = stderr.partition("\n")
        assert line.startswith(f"pyvmm: {reason}: using an emulated machine instead"), done.stderr
    return done.returncode, done.stdout, stderr


def test_the_status_and_the_streams_are_the_commands(debian_kernel: Kernel) -> None:
    script = "echo out; uname -nr; echo err >&2; exit 3"
    assert demo("--", "sh", "-c", script) == (3, f"out\npyvmm {debian_kernel.release}\n", "err\n")


STAGES = (
    "machine built",
    "kernel handed over to init",
    "modules loaded",
    "command channel open",
    "root mounted",
    "command started",
    "command ended",
)


def test_without_a_command_it_shows_the_guest(debian_kernel: Kernel) -> None:
    status, shown, stderr = demo()
    guest, _, times = shown.partition("times (of this process, then of the guest's clock):\n")
    assert guest.splitlines() == [
        f"kernel:  Linux {debian_kernel.release}",
        "root:    overlay (virtiofs:root)",
        "device:  virtio0: virtio id 3, driver virtio_console",
        "device:  virtio1: virtio id 26, driver virtiofs",
    ]
    assert tuple(re.findall(r"^ +\d+\.\d\d s  (.+)$", times, re.MULTILINE)) == STAGES
    assert (status, stderr) == (0, "")
