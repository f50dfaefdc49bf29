"""Configuration spaces that users give: three forms, and what is none of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes.backend import no_new_fds

from pyvmm.config_text import config_bytes
from pyvmm.errors import ConfigError
from pyvmm.virtio import kinds

FS = kinds.of(26)
VSOCK = kinds.of(19)
NET = kinds.of(1)


@pytest.mark.parametrize(
    ("kind", "text", "data"),
    [
        (FS, "", b""),
        (FS, "0011ff", b"\0\x11\xff"),
        (FS, "00 11 FF", b"\0\x11\xff"),
        (FS, "[tag=root]", b"root"),
        (FS, "[tag=root,num_request_queues=3]", b"root".ljust(36, b"\0") + b"\3"),
        (FS, '[tag="a,b"]', b"a,b"),
        (VSOCK, "[guest_cid=0x123]", b"\x23\x01"),
        (NET, "[mac=02:00:00:00:00:01, mtu=1500]", b"\2\0\0\0\0\1" + bytes(4) + b"\xdc\x05"),
    ],
)
def test_config_bytes(kind: kinds.Kind, text: str, data: bytes) -> None:
    if text.startswith("["):
        data = data.ljust(kind.config_size, b"\0")
    assert config_bytes("--x", text, kind) == data


def test_config_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "config").write_bytes(b"abc")
    with no_new_fds():
        assert config_bytes("--x", f"@{tmp_path}/config", FS) == b"abc"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "non-hexadecimal"),
        ("xyz", "non-hexadecimal"),
        ("@/nowhere", "No such file"),
        ("@", "No such file"),
        ("[tag=x", "']' is missing"),
        ("[tag=x]]", "']' without '\\['"),
        ("[]", "fs has no field ''"),
        ("[tga=x]", "fs has no field 'tga'; did you mean 'tag'"),
        (f"[tag={'x' * 37}]", "longer than 36 bytes"),
        ("[num_request_queues=-1]", "no number of 4 bytes"),
        ("[num_request_queues=4294967296]", "no number of 4 bytes"),
        ("[num_request_queues]", "no number of 4 bytes"),
        ("00" * 4097, "longer than 4096 bytes"),
    ],
)
def test_config_errors(text: str, message: str) -> None:
    with no_new_fds(), pytest.raises(ConfigError, match=message) as caught:
        config_bytes("--x", text, FS)
    assert str(caught.value).startswith("--x: config=")
