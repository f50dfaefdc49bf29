"""The command protocol between the host and the guest's first process: a pure codec.

It owns the frame format, the frame types and the form of the command's description; the
other end is guest-images/init.  It knows no descriptors: `channel` moves the bytes.

A frame is u8 type, u8[3] zero, u32 length (little endian), payload.  The guest begins with
HELLO (after STAGE frames of what it did so far), the host answers SPEC, the guest runs the
command, ends with EXIT or ERROR, and powers off when it has seen BYE.  Standard input,
output and error have windows: a side sends no more than INPUT_WINDOW or OUTPUT_WINDOW bytes
of a stream plus what CREDIT frames added, so no stream holds up another one or a signal.
"""

from __future__ import annotations

import struct

from ..errors import RemoteProtocolError
from ..record import Record

VERSION = 1
PORT_NAME = "pyvmm.command"

SPEC, STDIN, SIGNAL, WINDOW, CLOSE, BYE = 1, 2, 3, 4, 5, 6
CREDIT = 8
HELLO, STAGE, STDOUT, STDERR, EXIT, ERROR, WARNING = 16, 17, 18, 19, 20, 21, 22

HEADER = struct.Struct("<B3xI")
PAIR = struct.Struct("<II")
U32 = struct.Struct("<I")
WINDOW_SIZE = struct.Struct("<HH")
STAGE_TIME = struct.Struct("<Q")
INPUT_WINDOW = 64 * 1024
OUTPUT_WINDOW = 256 * 1024
DATA_MAX = 32 * 1024 - HEADER.size
SPEC_MAX = 4 << 20
# what the guest sends, with the least payload; data frames are bounded by DATA_MAX
FROM_GUEST = {CREDIT: 8, HELLO: 4, STAGE: 8, STDOUT: 0, STDERR: 0, EXIT: 8, ERROR: 0, WARNING: 0}


class Mount(Record):
    """One mount in the guest; `options` as mount(8) writes them."""

    target: str
    source: str
    type: str = "virtiofs"
    options: str = ""


class Spec(Record):
    """The command and its surroundings.  `tty` is (rows, columns) of a terminal to give it.

    Without `root` the initramfs stays the root.  With `overlay` the root is mounted as its
    options say and gets a writable layer in the guest's memory.
    """

    argv: tuple[str, ...]
    env: tuple[str, ...] = ()
    cwd: str = "/"
    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    hostname: str = ""
    tty: tuple[int, int] | None = None
    root: Mount | None = None
    overlay: bool = False
    mounts: tuple[Mount, ...] = ()

    def encode(self) -> bytes:
        """Payload of a SPEC frame; ValueError when a text has a NUL or all is over 4 MiB."""
        records = [f"{key}={value}" for key, value in _records(self)]
        if any("\0" in record for record in records):
            raise ValueError("arguments and environment cannot contain NUL characters")
        payload = "".join(record + "\0" for record in records).encode("utf-8", "surrogateescape")
        if len(payload) > SPEC_MAX:
            raise ValueError(f"arguments and environment take {len(payload)} bytes, over {SPEC_MAX}")
        return payload


def _records(spec: Spec) -> list[tuple[str, object]]:
    records: list[tuple[str, object]] = [("arg", value) for value in spec.argv]
    records += [("env", value) for value in spec.env]
    records += [("cwd", spec.cwd), ("uid", spec.uid), ("gid", spec.gid)]
    records += [("group", value) for value in spec.groups]
    if spec.hostname:
        records.append(("hostname", spec.hostname))
    if spec.tty:
        records.append(("tty", f"{spec.tty[0]}x{spec.tty[1]}"))
    if spec.root:
        records += _mount_records("root-", spec.root)
        records.append(("overlay", int(spec.overlay)))
    for mount in spec.mounts:
        records += [("mount", mount.target), *_mount_records("mount-", mount)]
    return records


def _mount_records(prefix: str, mount: Mount) -> list[tuple[str, object]]:
    return [
        (prefix + "source", mount.source),
        (prefix + "type", mount.type),
        (prefix + "options", mount.options),
    ]


def frame(kind: int, payload: bytes | memoryview = b"") -> bytes:
    """One frame, ready to send."""
    return HEADER.pack(kind, len(payload)) + payload


class Decoder:
    """Cuts a byte stream from the guest into frames, whatever the pieces it comes in."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Frames completed by `data`, as (type, payload).

        Raises RemoteProtocolError for what no guest of ours sends.
        """
        self._pending += data
        frames: list[tuple[int, bytes]] = []
        start = 0
        while len(self._pending) - start >= HEADER.size:
            kind, length = HEADER.unpack_from(self._pending, start)
            _check(kind, length)
            end = start + HEADER.size + length
            if end > len(self._pending):
                break
            frames.append((kind, bytes(self._pending[start + HEADER.size : end])))
            start = end
        del self._pending[:start]
        return frames


def _check(kind: int, length: int) -> None:
    least = FROM_GUEST.get(kind)
    if least is None or not least <= length <= DATA_MAX:
        raise RemoteProtocolError(f"the guest's init sent frame type {kind} of {length} bytes")
