"""The command protocol's codec: any pieces, any bytes, and what no guest of ours sends."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import RemoteProtocolError
from pyvmm.guest import protocol as p

HEADER = Path(__file__).parents[3] / "guest-images" / "init" / "init.h"
frames = st.lists(
    st.tuples(st.sampled_from([p.STDOUT, p.STDERR, p.ERROR]), st.binary(max_size=200)), max_size=8
)


@given(frames, st.integers(1, 50))
def test_frames_arrive_whole_whatever_the_pieces(wanted: list[tuple[int, bytes]], step: int) -> None:
    stream = b"".join(p.frame(kind, payload) for kind, payload in wanted)
    decoder = p.Decoder()
    got = [item for i in range(0, len(stream), step) for item in decoder.feed(stream[i : i + step])]
    assert got == wanted


@given(st.binary(max_size=400))
def test_garbage_is_frames_or_a_protocol_error(data: bytes) -> None:
    try:
        for kind, payload in p.Decoder().feed(data):
            assert len(payload) >= p.FROM_GUEST[kind]
    except RemoteProtocolError:
        pass


@pytest.mark.parametrize(
    "data",
    [
        p.HEADER.pack(p.SPEC, 3),  # a frame of the host's
        p.HEADER.pack(99, 0),
        p.HEADER.pack(p.STDOUT, p.DATA_MAX + 1),
        p.HEADER.pack(p.EXIT, 7),
        p.HEADER.pack(p.STAGE, 4),
    ],
)
def test_refused_before_the_payload(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="frame type"):
        p.Decoder().feed(data)


def records(spec: p.Spec) -> list[str]:
    return spec.encode().decode("utf-8", "surrogateescape").split("\0")[:-1]


def test_spec_records_are_in_order() -> None:
    spec = p.Spec(
        argv=("sh", "-c", "a=b"),
        env=("A=1", "B="),
        cwd="/x y",
        uid=7,
        gid=8,
        groups=(9, 10),
        tty=(24, 80),
        root=p.Mount("/", "root", "virtiofs", "ro"),
        overlay=True,
        mounts=(p.Mount("/a", "t1"), p.Mount("/b", "/dev/vda", "ext4", "ro,noatime")),
    )
    assert records(spec) == [
        "arg=sh", "arg=-c", "arg=a=b", "env=A=1", "env=B=", "cwd=/x y", "uid=7", "gid=8",
        "group=9", "group=10", "tty=24x80",
        "root-source=root", "root-type=virtiofs", "root-options=ro", "overlay=1",
        "mount=/a", "mount-source=t1", "mount-type=virtiofs", "mount-options=",
        "mount=/b", "mount-source=/dev/vda", "mount-type=ext4", "mount-options=ro,noatime",
    ]  # fmt: skip


def test_spec_keeps_bytes_that_are_no_utf8() -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert b"arg=caf\xe9\0" in p.Spec(argv=(name,)).encode()


@pytest.mark.parametrize("spec", [p.Spec(argv=("a\0b",)), p.Spec(argv=("x" * p.SPEC_MAX,))])
def test_spec_that_cannot_be_sent(spec: p.Spec) -> None:
    with pytest.raises(ValueError, match="arguments and environment"):
        spec.encode()


def test_both_ends_agree_on_the_numbers() -> None:
    text = HEADER.read_text()
    for name, value in re.findall(r"FRAME_(\w+) = (\d+)", text):
        assert getattr(p, name) == int(value), name
    sizes = dict(re.findall(r"#define (\w+) (?:\()?(\d+)u", text))
    assert int(sizes["STDIN_WINDOW"]) * 1024 == p.INPUT_WINDOW
    assert int(sizes["OUTPUT_WINDOW"]) * 1024 == p.OUTPUT_WINDOW
    assert int(sizes["SPEC_MAX"]) << 20 == p.SPEC_MAX
    assert f'#define PORT_NAME "{p.PORT_NAME}"' in text
