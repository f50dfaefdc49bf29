"""A dialogue with a backend as a file, to be looked at later or to be had again.

The file has a header and then one line of JSON a message, with the payload's bytes and the kind of each
descriptor; where a proxy sees them also a line for each connection of a frontend's, and for each chain
that was taken and given back, and for each fault on purpose.  It owns that format, versioned
in the header.  It must not know who records, nor what becomes of it.
"""

from __future__ import annotations

import json
import os
import stat
from time import monotonic

from .. import log
from ..errors import ConfigError
from ..files import open_file, open_output
from ..record import Record
from .messages import BACKEND_REQUESTS, FRONTEND_REQUESTS
from .session import SETTLED_BY_REPLY, SETTLED_BY_REQUEST
from .trace import ACK, BACKEND, ERROR, FRONTEND, REPLY, REQUEST, Event, as_text, feature_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any

    from .client import Converse, Exchange
    from .codec import Message
    from .payloads import Payload

MAGIC = "pyvmm-recording"
VERSION = 1
TABLES = {FRONTEND: FRONTEND_REQUESTS, BACKEND: BACKEND_REQUESTS}
CONNECT, CHAIN, USED, FAULT = "connect", "chain", "used", "fault"


class Line(Record):
    """One line.  Messages fill the first row of fields, what happens in a ring the second.

    `channel` says who asks on it, `sender` who sent this; `data` is the payload in hexadecimal.
    `readable` and `writable` are the sizes of a chain's parts, `length` the used length, before a fault.
    That has its name for a message, the number that names it in a plan, and no queue (-1) outside of rings.
    """

    at: float
    kind: str
    channel: str = ""
    sender: str = ""
    message: str = ""
    data: str = ""
    fds: tuple[str, ...] = ()
    need_reply: bool = False
    error: str = ""
    queue: int = 0
    head: int = 0
    readable: tuple[int, ...] = ()
    writable: tuple[int, ...] = ()
    length: int = 0
    number: int = 0
    detail: str = ""

    @property
    def payload(self) -> Payload:
        """The payload, decoded; ValueError when it is none of those that belong there."""
        row = TABLES[self.channel].by_name[self.message]
        data = bytes.fromhex(self.data)
        for kind in (row.payload,) if self.kind == REQUEST else row.replies:
            if kind.fits(len(data)):
                return kind.decode(data)
        raise ValueError(f"{self.message} with {len(data)} bytes")

    def as_text(self) -> str:
        """One line for people, as in a live trace."""
        text = TEXTS.get(self.kind)
        if text is not None:
            return f"{self.at:12.6f} {text(self)}\n"
        kinds = f"  ({', '.join(self.fds)})" if self.fds else ""
        return f"{as_text(self._event()).rstrip()}{kinds}\n"

    def _event(self) -> Event:
        if self.kind == ERROR:
            return Event(self.at, "", self.channel, self.sender, ERROR, self.message, error=self.error)
        settled = SETTLED_BY_REQUEST if self.kind == REQUEST else SETTLED_BY_REPLY
        names = feature_names(settled.get(self.message), self.payload)
        return Event(
            *(self.at, "", self.channel, self.sender, self.kind, self.message),
            *(self.payload, len(self.fds), self.need_reply),
            features=names,
        )


def _connect_text(line: Line) -> str:
    return "a frontend connected"


def _chain_text(line: Line) -> str:
    sizes = (f"{name} {_sizes(getattr(line, name))}" for name in ("readable", "writable"))
    return f"queue {line.queue} chain {line.head}: {', '.join(sizes)}"


def _used_text(line: Line) -> str:
    return f"queue {line.queue} chain {line.head} used, {line.length} bytes"


def _fault_text(line: Line) -> str:
    where = f"queue {line.queue} chain {line.head} " if line.queue >= 0 else ""
    number = f" (number {line.number})" if line.number >= 0 else ""
    detail = f": {line.detail}" if line.detail else ""
    return f"{where}fault {line.message}{number}{detail}"


def _sizes(sizes: Sequence[int]) -> str:
    return "+".join(str(size) for size in sizes) or "0"


# What is no message; `used` is what the backend did, and a fault of the proxy's after it what became of that
TEXTS: dict[str, Callable[[Line], str]] = {
    CONNECT: _connect_text,
    CHAIN: _chain_text,
    USED: _used_text,
    FAULT: _fault_text,
}


class Recorder:
    """Writes a recording to `path`; `exchange` fits `Client.observe`.  Times count from its creation."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = open_output(f"--record: {path}", path, emptied=True)
        self._begin = monotonic()
        self._write({MAGIC: VERSION})

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, values: dict[str, Any]) -> None:
        """At once: a process that is killed on purpose has its recording, too."""
        data = f"{json.dumps(values)}\n".encode()
        try:
            while self._fd >= 0 and data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            log.warn(f"--record: {self._path}: {error.strerror}; the recording ends here")
            self.close()

    def add(self, kind: str, **fields: Any) -> None:
        """Write a line of now, without the fields that have their defaults."""
        line = Line(round(monotonic() - self._begin, 6), kind, **fields)
        values = {name: value for name, value in line._asdict().items() if value or name == "at"}
        self._write(values)

    def exchange(self, converse: Converse, name: str, payload: Payload, fds: Sequence[int]) -> Exchange:
        """Do what `converse` does, and record both messages."""
        about = {"channel": FRONTEND, "message": name}
        self.add(REQUEST, sender=FRONTEND, data=payload.encode().hex(), fds=kinds_of(fds), **about)
        try:
            reply, message = converse(name, payload, fds)
        except Exception as error:
            self.add(ERROR, sender=BACKEND, error=str(error), **about)
            raise
        if message is not None:
            kind = REPLY if message.request.reply else ACK
            self.add(kind, sender=BACKEND, data=reply.encode().hex(), fds=kinds_of(message.fds), **about)
        return reply, message

    def notice(self, message: Message) -> None:
        """Record a request of the backend's own."""
        self.add(
            REQUEST,
            channel=BACKEND,
            sender=BACKEND,
            message=message.request.name,
            data=message.payload.encode().hex(),
            fds=kinds_of(message.fds),
            need_reply=message.need_reply,
        )


def connections(lines: Iterable[Line]) -> list[list[Line]]:
    """The lines of each connection, in their order."""
    found: list[list[Line]] = []
    for line in lines:
        if line.kind == CONNECT or not found:
            found.append([])
        found[-1].append(line)
    return found


def read(path: str) -> Iterator[Line]:
    """The lines of a recording; ConfigError when the file is none, or of another version."""
    fd = open_file(path, path, "name a recording", stat.S_ISREG, stat.S_ISFIFO)
    with open(fd, encoding="utf-8", errors="replace") as file:
        head = _object(path, 1, file.readline())
        if MAGIC not in head:
            raise ConfigError(f"{path}: this is no recording of pyvmm's")
        if head[MAGIC] != VERSION:
            raise ConfigError(f"{path}: a recording of version {head[MAGIC]}; here it is {VERSION}")
        for number, text in enumerate(file, 2):
            yield _line(path, number, _object(path, number, text))


def _object(path: str, number: int, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: line {number} is no JSON object")
    return values


def _line(path: str, number: int, values: dict[str, Any]) -> Line:
    try:
        line = Line(**{name: _fixed(value) for name, value in values.items()})
        if line.kind in (REQUEST, REPLY, ACK):
            assert line.payload is not None
        line.as_text().encode()
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ConfigError(f"{path}: line {number} is no line of a recording: {error}") from None
    return line


def _fixed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def kinds_of(fds: Sequence[int]) -> tuple[str, ...]:
    """What each descriptor is: `eventfd`, `memfd`, `file`, `socket`, `pipe`."""
    return tuple(_kind_of(fd) for fd in fds)


def _kind_of(fd: int) -> str:
    mode = os.fstat(fd).st_mode
    for test, name in ((stat.S_ISSOCK, "socket"), (stat.S_ISFIFO, "pipe")):
        if test(mode):
            return name
    target = os.readlink(f"/proc/self/fd/{fd}")
    for start, name in (("anon_inode:[eventfd", "eventfd"), ("/memfd:", "memfd")):
        if target.startswith(start):
            return name
    return "file"
