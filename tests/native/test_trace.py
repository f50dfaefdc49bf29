"""A whole machine with `--trace`: every device's messages, in one file that is closed with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.backend import no_new_fds
from fakes.program import SPIN, pvh_elf

from pyvmm import config as cfg
from pyvmm.errors import ConfigError
from pyvmm.loop import EventLoop
from pyvmm.vm import Vm

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("need_kvm")]


def machine(folder: Path, trace: str) -> cfg.VmConfig:
    (folder / "vmlinux").write_bytes(pvh_elf(SPIN, base=0x40_0000))
    return cfg.VmConfig(
        cfg.PayloadConfig(str(folder / "vmlinux")),
        memory=cfg.MemoryConfig(64 << 20),
        devices=(cfg.RngDevice("/dev/zero", id="a"), cfg.RngDevice("/dev/zero", id="b")),
        trace=cfg.trace(trace),
    )


def test_the_messages_of_every_device(tmp_path: Path) -> None:
    with (
        no_new_fds(),
        EventLoop() as loop,
        Vm(machine(tmp_path, f"vhost-user={tmp_path}/t,format=json"), loop),
    ):
        pass
    events = [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()]
    for name in "ab":
        mine = [event for event in events if event["device"] == name]
        assert mine[0]["message"] == "SET_OWNER"
        assert {event["kind"] for event in mine} == {"request", "reply"}


def test_a_full_disk_does_not_matter(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with no_new_fds(), EventLoop() as loop, Vm(machine(tmp_path, "vhost-user=/dev/full"), loop) as built:
        assert len(built._frontends) == 2
    assert capfd.readouterr().err.count("the trace ends here") == 1


def test_a_bad_place_ends_it_before_it_begins(tmp_path: Path) -> None:
    with (
        no_new_fds(),
        EventLoop() as loop,
        pytest.raises(ConfigError, match=r"^--trace: /: Is a directory"),
        Vm(machine(tmp_path, "vhost-user=/"), loop),
    ):
        pass
