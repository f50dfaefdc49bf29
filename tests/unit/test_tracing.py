"""Where a trace goes, and that whoever reads it cannot disturb."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic

import pytest
from fakes.backend import no_new_fds
from fakes.program import environment

from pyvmm import config, tracing
from pyvmm.config import TraceConfig
from pyvmm.errors import ConfigError
from pyvmm.tracing import LineWriter, OpenTrace
from pyvmm.vhost_user.codec import Message
from pyvmm.vhost_user.messages import FRONTEND_REQUESTS
from pyvmm.vhost_user.payloads import U64, Empty

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("vhost-user", TraceConfig()),
        ("vhost-user=", TraceConfig()),
        ("vhost-user,format=json", TraceConfig("", "json")),
        ("vhost-user=/tmp/x", TraceConfig("/tmp/x")),
        ('vhost-user="a,b",format=text', TraceConfig("a,b")),
    ],
)
def test_the_option(text: str, expected: TraceConfig | None) -> None:
    assert config.trace(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vhost", "vhost-user or vhost-user=FILE is needed"),
        ("kvm=x", "vhost-user or vhost-user=FILE is needed"),
        ("vhost-user,format=xml", "--trace: format=xml: one of text, json"),
        ("vhost-user,fromat=json", "unknown key 'fromat'; did you mean 'format'"),
        ('vhost-user="a', "not closed"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config.trace(text)
    assert str(caught.value).startswith("--trace: ")


def exchange(trace: OpenTrace) -> None:
    """One request and its reply."""
    row = FRONTEND_REQUESTS.by_name["GET_FEATURES"]
    reply = Message(row, U64(1 << 32), [], False, os.close)
    trace.device("dev").exchange(lambda *_: (reply.payload, reply), "GET_FEATURES", Empty(), ())


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_file(tmp_path: Path, form: str) -> None:
    path = tmp_path / "trace"
    path.write_text("old")
    with no_new_fds():
        trace = OpenTrace(TraceConfig(str(path), form))
        exchange(trace)
        trace.close()
        exchange(trace)
        trace.close()
    lines = path.read_text().splitlines()
    if form == "json":
        assert [json.loads(line)["kind"] for line in lines] == ["request", "reply"]
    else:
        assert lines[0].startswith("#") and all(arrow in lines[0] for arrow in ("->", "<-", "<=", "=>"))
        assert [line.split()[1:4] for line in lines[1:]] == [
            ["dev", "->", "GET_FEATURES"],
            ["dev", "<-", "GET_FEATURES"],
        ]


def test_standard_error_stays_open(capfd: Capture) -> None:
    trace = OpenTrace(TraceConfig())
    exchange(trace)
    trace.close()
    os.fstat(2)
    assert capfd.readouterr().err.count("GET_FEATURES") == 2


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with no_new_fds(), pytest.raises(ConfigError, match=r"--trace: .*: Is a directory; a writable file"):
        OpenTrace(TraceConfig(str(tmp_path)))


def test_a_full_disk_ends_the_trace_with_one_warning(capfd: Capture) -> None:
    with no_new_fds():
        trace = OpenTrace(TraceConfig("/dev/full", "json"))
        for _ in range(3):
            exchange(trace)
        trace.close()
    said = capfd.readouterr().err
    assert said == "pyvmm: --trace: /dev/full: No space left on device; the trace ends here\n"


def test_a_reader_that_went_away(capfd: Capture) -> None:
    reader, fd = os.pipe()
    lines = LineWriter("x", fd)
    lines.write("one\n")
    assert os.read(reader, 99) == b"one\n"
    os.close(reader)
    lines.write("two\n")
    lines.write("three\n")
    lines.close()
    assert capfd.readouterr().err == "pyvmm: x: Broken pipe; the trace ends here\n"
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_a_reader_that_stands_still(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "STANDSTILL", 0.2)
    reader, fd = os.pipe()
    lines, begin, text = LineWriter("x", fd), monotonic(), "x" * 4095 + "\n"
    for _ in range(100):  # a pipe takes sixteen of these
        lines.write(text)
    assert 0.2 < monotonic() - begin < 10
    assert capfd.readouterr().err == "pyvmm: x: its reader stands still; the trace ends here\n"
    os.close(reader)


def test_lines_of_threads_do_not_mix(tmp_path: Path) -> None:
    lines = LineWriter("x", os.open(tmp_path / "f", os.O_WRONLY | os.O_CREAT))
    long = [letter * 9000 + "\n" for letter in "abcd"]  # more than one write each
    threads = [
        threading.Thread(target=lambda text=text: [lines.write(text) for _ in range(20)]) for text in long
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines.close()
    assert sorted((tmp_path / "f").read_text().splitlines(keepends=True)) == sorted(long * 20)


def test_without_the_option_nothing_of_it_is_loaded() -> None:
    script = (
        "import sys, pyvmm.cli.boot, pyvmm.cli.run, pyvmm.devices, pyvmm.vhost_user.frontend\n"
        "print([name for name in sys.modules if 'trac' in name])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout == "[]\n", done.stderr
