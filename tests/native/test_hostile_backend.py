"""Everything of the table, each to a running machine with another device.

After each case the machine answers at every register of the victim, a driver resets the victim and
reads 0, the other device fetches real data, and when the machine is closed nothing of it is left.
The connection is an inherited one, so that its loss is final.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.backend import FakeBackend
from fakes.census import leaves_nothing
from fakes.entropy import scenario
from fakes.hostile import SILENCE, Stage, two_devices
from fakes.hostile_table import TABLE, Case

from pyvmm import config as cfg
from pyvmm import log
from pyvmm.errors import ConfigError
from pyvmm.loop import EventLoop
from pyvmm.virtio import spec
from pyvmm.vm import Vm

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("need_kvm")]


def rows(stage: str) -> Any:
    return pytest.mark.parametrize("case", TABLE[stage].values(), ids=TABLE[stage])


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., cfg.VmConfig]:
    """Makes the configuration of a machine at the other end of a backend's connection."""

    def make(backend: FakeBackend, **more: Any) -> cfg.VmConfig:
        victim = cfg.GenericDevice("vsock", fd=os.dup(backend.frontend_end.fileno()), queue_sizes=(8, 8, 8))
        backend.frontend_end.close()
        return two_devices(tmp_path, victim, **more)

    return make


@pytest.fixture
def backend(case: Case, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(log, "_said", set())
    with leaves_nothing():
        made = FakeBackend(script=case.script, **case.options)
        yield made
        made.close()


def test_the_table_is_long_enough() -> None:
    assert sum(len(cases) for cases in TABLE.values()) >= 40


@rows("opening")
def test_opening(case: Case, backend: FakeBackend, machine: Any) -> None:
    """The user is told in one line; nothing of the machine is left, the other backend included."""
    with EventLoop() as loop, pytest.raises(ConfigError, match=case.told) as caught:
        Vm(machine(backend, deadline=SILENCE if case.silent else 10.0), loop)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("vsock: ")


@rows("starting")
def test_starting(case: Case, backend: FakeBackend, machine: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """The device asks for a reset as soon as the driver has started it."""
    with EventLoop() as loop, Vm(machine(backend), loop) as built:
        stage = Stage(built, backend, case.silent)

        def steps() -> None:
            stage.other.start()
            stage.start()
            assert stage.driver.status & spec.NEEDS_RESET
            stage.machine_answers()
            stage.other_device_works()

        scenario(built, loop, steps)
    assert re.search(case.told, capfd.readouterr().err)


@rows("running")
def test_running(case: Case, backend: FakeBackend, machine: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """The device asks for a reset, or works on as if nothing had been."""
    with EventLoop() as loop, Vm(machine(backend), loop) as built:
        stage = Stage(built, backend, case.silent)

        def steps() -> None:
            stage.other.start()
            stage.start()
            assert not stage.driver.status & spec.NEEDS_RESET
            if case.deed is not None:
                case.deed(stage)
            if case.told:
                stage.await_wish()
            stage.machine_answers()
            stage.start()
            assert bool(stage.driver.status & spec.NEEDS_RESET) == bool(case.told and not case.heals)
            stage.other_device_works()

        scenario(built, loop, steps)
    assert re.search(case.told, capfd.readouterr().err)
