"""`pyvmm devices`: the whole table, one kind in full, JSON, and what nobody has described."""

from __future__ import annotations

import json
import shlex

import pytest

from pyvmm import cli, config
from pyvmm.cli import boot, devices
from pyvmm.cli.parse import parse
from pyvmm.devices import find_kind, prepare
from pyvmm.virtio.kinds import KINDS
from pyvmm.virtio.served import SERVED

Capture = pytest.CaptureFixture[str]


def shown(capsys: Capture, *words: str) -> str:
    assert cli.main(["devices", *words]) == 0
    return capsys.readouterr().out


def test_a_line_for_each_kind(capsys: Capture) -> None:
    head, *lines = shown(capsys).splitlines()
    assert [column for column in devices.HEADS if column not in head] == []
    assert [line.split()[:2] for line in lines] == [[str(kind.device_id), kind.name] for kind in KINDS]
    scsi = next(line.split() for line in lines if " scsi " in line)
    assert scsi[2:] == ["3", "3", "any", "128", "36", "absorb", "SCSI_VIRTIO", "vhost-device-scsi"]


@pytest.mark.parametrize("word", ["input", "INPUT", "18"])
def test_one_kind_in_full(capsys: Capture, word: str) -> None:
    text = shown(capsys, word)
    assert text.startswith("18 input: input device\n")
    lines = [line.split() for line in text.splitlines()]
    assert [line for line in lines if line[-1:] == ["u"]] == [["8", "128", "u"]]
    assert "1af4:1052, class 0980" in text
    assert "what a driver writes: whole" in text
    assert "CONFIG_VIRTIO_INPUT" in text


def test_what_newer_kernels_have_is_marked(capsys: Capture) -> None:
    assert "CONFIG_VIRTIO_RTC (newer than Linux 6.1)" in shown(capsys, "rtc")
    assert "newer" not in shown(capsys, "rng")


def test_a_refused_kind_says_why_and_has_no_example(capsys: Capture) -> None:
    text = shown(capsys, "watchdog")
    assert "a backend has no way to reset the guest" in text and "examples" not in text


@pytest.mark.parametrize("word", [*(str(kind.device_id) for kind in KINDS if not kind.refused), "60", "63"])
def test_every_example_is_a_machine(capsys: Capture, word: str) -> None:
    """Its options are read, and the generic ones are devices of that very kind."""
    lines = [line.strip() for line in shown(capsys, word).splitlines() if "pyvmm --kernel" in line]
    assert lines
    for line in lines:
        machine = boot.machine(parse(boot.COMMAND, shlex.split(line)[1:]))
        for device in machine.devices:
            if isinstance(device, config.GenericDevice):
                assert prepare(device).kind.device_id == int(word)


def test_a_backend_that_numbers_its_sockets_is_found(capsys: Capture) -> None:
    text = shown(capsys, "rng")
    assert "socket=rng.sock0," in text and "socket=rng.sock," in text


def test_json_is_the_same(capsys: Capture) -> None:
    table = json.loads(shown(capsys, "--json"))
    assert [row["id"] for row in table] == [kind.device_id for kind in KINDS]
    vsock = json.loads(shown(capsys, "vsock", "--json"))
    assert vsock in table
    assert vsock["config"] == [{"name": "guest_cid", "offset": 0, "width": 8}]
    assert (vsock["min_queues"], vsock["usual_sizes"], vsock["max_size"]) == (3, [256] * 3, 1024)
    assert vsock["backends"] == ["vhost-device-vsock"] and vsock["write_policy"] == "forward"


@pytest.mark.parametrize(
    ("words", "message"),
    [(["vsok"], "did you mean 'vsock'"), (["a", "b"], "at most"), (["64"], "1 to 63"), (["-x"], "--help")],
)
def test_errors(capfd: Capture, words: list[str], message: str) -> None:
    assert cli.main(["devices", *words]) == 2
    assert message in capfd.readouterr().err


def test_backends_are_not_in_two_columns() -> None:
    for number, row in SERVED.items():
        assert not set(row.backends) & set(row.untested), find_kind("x", str(number)).name
