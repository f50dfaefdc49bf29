"""Each vhost-user message as a line, for people or as JSON.

It owns how a message looks, which follows from the fields of its payload and the rows of the
tables; a new message needs nothing here.  It is the observer of a `Client` and of `Notices`,
which work without it, and hands its lines to a function.  It must not know where they go.
"""

from __future__ import annotations

from time import monotonic

from ..record import Record
from ..virtio import spec
from . import messages
from .messages import FRONTEND_REQUESTS, PROTOCOL_FEATURES, bit_names
from .payloads import U64
from .session import SETTLED_BY_REPLY, SETTLED_BY_REQUEST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

    from .client import Converse, Exchange
    from .codec import Message
    from .payloads import Payload

REQUEST, REPLY, ACK, ERROR = "request", "reply", "ack", "error"
FRONTEND, BACKEND = "frontend", "backend"
# Which channel the message is on (that is, who asked), and who sent it.
ARROWS = {
    (FRONTEND, FRONTEND): "->",
    (FRONTEND, BACKEND): "<-",
    (BACKEND, BACKEND): "<=",
    (BACKEND, FRONTEND): "=>",
}
LEGEND = "-> asks, <- answers; the backend: <= asks, => is answered"
VIRTIO_FEATURES = {
    name[2:]: mask
    for name, mask in {**vars(messages), **vars(spec)}.items()
    if name.startswith("F_") and isinstance(mask, int)
}
LARGE = 0x10000  # from here on a number is shown in hexadecimal
FEW = 32  # bytes shown of a string of bytes


class Event(Record):
    """One message, or the failure of one.  Times are in seconds, `at` since the trace began.

    `channel` says who asks on it, `sender` who sent this.  `took` is the time since the request, for what
    ends one.  `features` are the names of the bits in a payload that is a word of features.
    """

    at: float
    device: str
    channel: str
    sender: str
    kind: str
    message: str
    payload: Payload | None = None
    fds: int = 0
    need_reply: bool = False
    took: float | None = None
    features: tuple[str, ...] | None = None
    error: str = ""


def as_text(event: Event) -> str:
    """One line for people."""
    words = [f"{event.at:12.6f}", event.device.replace("\n", "\\n"), ARROWS[event.channel, event.sender]]
    words += [event.message, *_text_words(event)]
    took = "" if event.took is None else f", {event.took * 1e6:.0f} us"
    return " ".join(words) + took + "\n"


def _text_words(event: Event) -> Iterator[str]:
    if event.error:
        yield f"failed: {event.error}"
    elif event.kind == ACK and isinstance(event.payload, U64):
        yield f"ack {event.payload.value}"
    elif event.features is not None:
        yield "|".join(event.features) or "none"
    elif event.payload is not None:
        yield from _text_fields(event.payload)
    if event.fds:
        yield f"+{event.fds} fd{'s' if event.fds > 1 else ''}"
    if event.need_reply:
        yield "need_reply"


def _text_fields(record: Record) -> Iterator[str]:
    return (f"{name}={_text(value)}" for name, value in record._asdict().items())


def _text(value: object) -> str:
    if isinstance(value, Record):
        return f"({' '.join(_text_fields(value))})"
    if isinstance(value, tuple):
        return f"[{', '.join(_text(item) for item in _without_zeros(value))}]"
    if isinstance(value, bytes):
        return value[:FEW].hex() + (f"...({len(value)} bytes)" if len(value) > FEW else "")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:#x}" if isinstance(value, int) and value >= LARGE else str(value)


def as_json(event: Event) -> str:
    """One line of JSON: the fields of `Event`, the payload as an object, bytes in hexadecimal."""
    from json import dumps

    values = event._asdict()
    values["at"] = round(event.at, 6)
    values["took"] = None if event.took is None else round(event.took, 6)
    values["payload"] = {} if event.payload is None else _plain(event.payload)
    return dumps(values) + "\n"


def _plain(value: object) -> Any:
    if isinstance(value, Record):
        return {name: _plain(field) for name, field in value._asdict().items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in _without_zeros(value)]
    return value.hex() if isinstance(value, bytes) else value


def _without_zeros(values: tuple[object, ...]) -> tuple[object, ...]:
    """Without the zeros at the end: most of the 256 sizes of shared memory regions are."""
    end = len(values)
    while end and values[end - 1] == 0:
        end -= 1
    return values[:end]


FORMATS: Mapping[str, Callable[[Event], str]] = {"text": as_text, "json": as_json}


class Trace:
    """Turns the events of all devices into lines for `write`; time counts from its creation."""

    def __init__(
        self, write: Callable[[str], None], form: str = "text", clock: Callable[[], float] = monotonic
    ) -> None:
        self.clock = clock
        self._write = write
        self._form = FORMATS[form]
        self._begin = clock()

    def device(self, name: str) -> DeviceTrace:
        """The observer of one device."""
        return DeviceTrace(self, name)

    def add(self, device: str, asked: Asked, sender: str, kind: str, **more: Any) -> None:
        """Write an event of now; `took` is added to all but requests."""
        now = self.clock()
        if kind == REQUEST:
            asked.since = now
        else:
            more["took"] = now - asked.since
        event = Event(now - self._begin, device, asked.channel, sender, kind, asked.message, **more)
        self._write(self._form(event))


class Asked:
    """A request that was made: on which channel, its name, and when."""

    def __init__(self, channel: str, message: str) -> None:
        self.channel = channel
        self.message = message
        self.since = 0.0


class DeviceTrace:
    """What `Client.observe` and `Notices.observe` are for one device."""

    def __init__(self, trace: Trace, name: str) -> None:
        self._trace = trace
        self._name = name

    def exchange(self, converse: Converse, name: str, payload: Payload, fds: Sequence[int]) -> Exchange:
        """Do what `converse` does with a request of ours, and tell of both messages."""
        asked, features = Asked(FRONTEND, name), feature_names(SETTLED_BY_REQUEST.get(name), payload)
        self._trace.add(
            self._name, asked, FRONTEND, REQUEST, payload=payload, fds=len(fds), features=features
        )
        try:
            reply, message = converse(name, payload, fds)
        except Exception as error:
            self._trace.add(self._name, asked, BACKEND, ERROR, error=str(error))
            raise
        if message is not None:
            kind = REPLY if FRONTEND_REQUESTS.by_name[name].reply else ACK
            features = feature_names(SETTLED_BY_REPLY.get(name), reply)
            count = len(message.fds)
            self._trace.add(self._name, asked, BACKEND, kind, payload=reply, fds=count, features=features)
        return reply, message

    def notice(self, handle: Callable[[Message], int | None], message: Message) -> None:
        """Do what `handle` does with a request of the backend, and tell of both messages."""
        asked, count = Asked(BACKEND, message.request.name), len(message.fds)
        more = {"payload": message.payload, "fds": count, "need_reply": message.need_reply}
        self._trace.add(self._name, asked, BACKEND, REQUEST, **more)
        try:
            status = handle(message)
        except Exception as error:
            self._trace.add(self._name, asked, FRONTEND, ERROR, error=str(error))
            raise
        if status is not None:
            self._trace.add(self._name, asked, FRONTEND, ACK, payload=U64(status))


def feature_names(word: str | None, payload: Payload) -> tuple[str, ...] | None:
    """The names of the bits that `payload` settles, if that is what it does."""
    if word is None or not isinstance(payload, U64):
        return None
    return tuple(bit_names(payload.value, VIRTIO_FEATURES if "virtio" in word else PROTOCOL_FEATURES))
