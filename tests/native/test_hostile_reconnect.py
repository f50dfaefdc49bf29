"""Everything of the table to a machine that looks for another backend, as it does by default.

A hostile backend takes the place of a good one, or is the first; the last is good.  Meanwhile the
machine answers and the other device works, in the end the victim does, and nothing is left of
any of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.census import leaves_nothing
from fakes.entropy import eventually, scenario
from fakes.hostile import Place, Stage, dies, two_devices
from fakes.hostile_table import TABLE, Case

from pyvmm import config as cfg
from pyvmm import log
from pyvmm.loop import EventLoop
from pyvmm.virtio import spec
from pyvmm.vm import Vm

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("need_kvm")]

FOR_EVER = ("GET_FEATURES: silence", "GET_FEATURES: the end", "GET_FEATURES: noise", "no queues")
Capture = pytest.CaptureFixture[str]


def rows(stage: str) -> Any:
    return pytest.mark.parametrize("case", TABLE[stage].values(), ids=TABLE[stage])


def hostile(case: Case) -> dict[str, Any]:
    return {"script": case.script, **case.options}


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Runs `steps` on a machine whose victim meets one backend after the other, of these options."""

    def play(case: Case, steps: Callable[[Stage, Place], None], *each: dict[str, Any]) -> None:
        with Place(tmp_path, *each) as place, EventLoop() as loop:
            victim = cfg.GenericDevice("vsock", socket=place.path, queue_sizes=(8, 8, 8))
            with Vm(two_devices(tmp_path, victim), loop) as built:
                stage = Stage(built, place[0], case.silent)
                scenario(built, loop, lambda: steps(stage, place))

    monkeypatch.setattr(log, "_said", set())
    with leaves_nothing():
        yield play


def works_again(stage: Stage, place: Place, backends: int) -> None:
    """The last of so many backends is there, and a driver that starts again finds a device."""
    eventually(lambda: len(place.backends) == backends and stage.connected)
    stage.await_wish(False)
    stage.machine_answers()
    stage.start()
    assert not stage.driver.status & spec.NEEDS_RESET
    stage.other_device_works()


@rows("opening")
def test_opening(case: Case, play: Callable[..., None], capfd: Capture) -> None:
    """One that cannot even be greeted comes after a good one: told of once, and the next one is tried."""
    bad = [hostile(case)] * (1 if case.silent else 2)

    def steps(stage: Stage, place: Place) -> None:
        stage.other.start()
        stage.start()
        dies(stage)
        place[1]
        stage.machine_answers()
        stage.start()
        stage.other_device_works()
        works_again(stage, place, len(bad) + 2)

    play(case, steps, {}, *bad, {})
    said = re.findall("a backend came and cannot be used: (.*)", capfd.readouterr().err)
    assert len(said) == 1 and re.search(case.told, said[0])


@pytest.mark.parametrize("name", FOR_EVER)
def test_opening_for_ever(name: str, play: Callable[..., None]) -> None:
    """The machine ends while it is still trying."""
    case = TABLE["opening"][name]

    def steps(stage: Stage, place: Place) -> None:
        stage.other.start()
        stage.start()
        dies(stage)
        place[2 if case.silent else 4]
        stage.machine_answers()
        stage.start()
        stage.other_device_works()

    play(case, steps, {}, hostile(case))


@rows("starting")
def test_starting(case: Case, play: Callable[..., None], capfd: Capture) -> None:
    """One is lost as the driver starts it, the next as it is to go on."""

    def steps(stage: Stage, place: Place) -> None:
        stage.other.start()
        stage.start()
        stage.other_device_works()
        works_again(stage, place, 3)

    good = {"script": {}, **case.options}
    play(case, steps, hostile(case), hostile(case), good)
    assert re.search(f"is lost: .*({case.told})", capfd.readouterr().err)


@rows("running")
def test_running(case: Case, play: Callable[..., None], capfd: Capture) -> None:
    """What does not cost the backend leaves it there."""
    lost = bool(case.told and not case.heals)

    def steps(stage: Stage, place: Place) -> None:
        stage.other.start()
        stage.start()
        if case.deed is not None:
            case.deed(stage)
        if lost:
            place[1]
            eventually(lambda: stage.connected)
        stage.machine_answers()
        stage.start()
        works_again(stage, place, 2 if lost else 1)

    play(case, steps, hostile(case), dict(case.options))
    assert re.search(case.told, capfd.readouterr().err)
