"""Silence and death at every request that the frontend sends, as the table of messages has them.

A request that is added to the table is tried here, and has to be sent by the frontend, unless it is
listed as one that never is.  The backend offers everything, so that everything is said to it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes import backend as fake
from fakes.backend import FakeBackend
from fakes.census import leaves_nothing
from fakes.entropy import eventually, scenario
from fakes.hostile import SILENCE, Place, Stage, moves_a_vector, reads, resets, two_devices, writes

from pyvmm import config as cfg
from pyvmm.errors import ConfigError
from pyvmm.loop import EventLoop
from pyvmm.vhost_user.messages import FRONTEND_REQUESTS
from pyvmm.vhost_user.messages import ProtocolFeature as P
from pyvmm.vhost_user.payloads import MemRegion
from pyvmm.virtio import spec
from pyvmm.vm import Vm

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("need_kvm")]

QUEUES = 2
NEVER_SENT = {
    "RESET_OWNER", "SET_LOG_BASE", "SET_LOG_FD", "SET_VRING_ERR", "SEND_RARP", "NET_SET_MTU", "IOTLB_MSG",
    "SET_VRING_ENDIAN", "CREATE_CRYPTO_SESSION", "CLOSE_CRYPTO_SESSION", "POSTCOPY_ADVISE", "POSTCOPY_LISTEN",
    "POSTCOPY_END", "VRING_KICK", "GET_SHARED_OBJECT", "SET_DEVICE_STATE_FD", "CHECK_DEVICE_STATE",
}  # fmt: skip
EVERYTHING = (1 << 23) - 1 & ~P.GET_VRING_BASE_INFLIGHT & ~P.GPA_ADDRESSES
ELSEWHERE = MemRegion(1 << 40, 0x1000, 1 << 46, 0)


class Moment(NamedTuple):
    """The request `name`, when `before` such were sent already, to a backend that lacks some features."""

    name: str
    before: int = 0
    lacks: int = 0

    def __str__(self) -> str:
        return f"{self.name} {self.before}" if self.before else self.name


MOMENTS = [
    *(
        Moment(row.name, lacks=P.CONFIGURE_MEM_SLOTS if row.name == "SET_MEM_TABLE" else 0)
        for row in FRONTEND_REQUESTS
        if row.name not in NEVER_SENT
    ),
    Moment("GET_FEATURES", 1, P.REPLY_ACK),  # the barrier at the start
    Moment("SET_STATUS", 1),  # DRIVER_OK
    Moment("GET_CONFIG", 1),  # the driver's read
    Moment("SET_VRING_CALL", QUEUES),  # a vector that moves
    Moment("SET_VRING_ENABLE", QUEUES),  # the stop, here and below
    Moment("GET_VRING_BASE", 1),
    Moment("SET_STATUS", 2),
]


def mute(backend: FakeBackend, message: fake.Message) -> bytes:
    """Answer neither this nor anything after it: some requests want no answer."""
    backend.script = dict.fromkeys(FRONTEND_REQUESTS.by_name, fake.silence)
    return fake.silence(backend, message)


ACTS = {"silence": mute, "death": fake.hang_up}
TOLD = {"silence": "did not answer in time", "death": "connection (was closed|broke)|closed the connection"}


def options(moment: Moment, act: str = "") -> dict[str, Any]:
    """Of a graphics device's backend that does `act` at that moment."""
    return {
        "script": {(moment.name, moment.before): ACTS[act]} if act else {},
        "protocol": EVERYTHING & ~moment.lacks,
        "config": bytes(20),
        "shared_memory": {0: 1 << 20},
    }


def gpu(**where: Any) -> cfg.GenericDevice:
    return cfg.GenericDevice("gpu", queue_sizes=(8,) * QUEUES, **where)


def uses(stage: Stage) -> None:
    """Everything that makes a frontend talk to a backend that runs."""
    for deed in (reads, writes, moves_a_vector, forgets_memory, resets):
        deed(stage)


def forgets_memory(stage: Stage) -> None:
    """The memory of a machine never changes; this backend has been told of other memory."""
    link = stage.frontend._link
    if link is not None:
        link.client.regions = (ELSEWHERE,)


def said(backend: FakeBackend, moment: Moment) -> bool:
    """Whether the moment came and was the last: what wants no answer may be followed by one that does."""
    return backend.counts[moment.name] == moment.before + 1 and moment.name in backend.names[-2:]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with leaves_nothing():
        yield


def test_requests_that_are_never_sent_are_requests() -> None:
    assert NEVER_SENT.issubset(FRONTEND_REQUESTS.by_name)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_the_loss_is_final(tmp_path: Path, moment: Moment, act: str, capfd: Any) -> None:
    """The user is told when the machine opens, or the driver later."""
    with closing(FakeBackend(**options(moment, act))) as backend:
        victim = gpu(fd=os.dup(backend.frontend_end.fileno()))
        backend.frontend_end.close()
        wanted = two_devices(tmp_path, victim, deadline=SILENCE if act == "silence" else 10.0)
        text = text_of_the_loss(wanted, backend, capfd)
        assert re.search(TOLD[act], text)
        assert said(backend, moment)


def text_of_the_loss(wanted: cfg.VmConfig, backend: FakeBackend, capfd: Any) -> str:
    with EventLoop() as loop:
        try:
            built = Vm(wanted, loop)
        except ConfigError as error:
            return str(error)
        with built:
            scenario(built, loop, lambda: until_it_is_lost(Stage(built, backend)))
    return capfd.readouterr().err


def until_it_is_lost(stage: Stage) -> None:
    stage.other.start()
    stage.start()
    uses(stage)
    stage.await_wish()
    stage.machine_answers()
    stage.start()
    assert stage.driver.status & spec.NEEDS_RESET
    stage.other_device_works()


@pytest.mark.parametrize(
    ("moment", "act"),
    [*((moment, "death") for moment in MOMENTS), *((moment, "silence") for moment in MOMENTS[::4])],
    ids=str,
)
def test_another_one_is_found(tmp_path: Path, moment: Moment, act: str) -> None:
    """The second backend of three is hostile, when it is to go on where the first stopped or later."""
    each = (options(moment), options(moment, act), options(moment))
    with Place(tmp_path, *each) as place, EventLoop() as loop:
        with Vm(two_devices(tmp_path, gpu(socket=place.path)), loop) as built:
            stage = Stage(built, place[0], act == "silence")
            scenario(built, loop, lambda: until_the_third_works(stage, place))
        assert len(place.backends) == 3
        assert said(place[1], moment)
        assert not NEVER_SENT & {name for backend in place.backends for name in backend.names}


def until_the_third_works(stage: Stage, place: Place) -> None:
    stage.other.start()
    stage.start()
    place[0].channel.shutdown()
    eventually(lambda: len(place.backends) > 1 and stage.connected)
    uses(stage)
    stage.machine_answers()
    stage.start()
    eventually(lambda: len(place.backends) > 2 and stage.connected)
    stage.await_wish(False)
    uses(stage)
    assert not stage.driver.status & spec.NEEDS_RESET
    stage.other_device_works()
