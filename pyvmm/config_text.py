"""A configuration space that a user gives (`config=`), as bytes.

It owns the three forms of that text.  It must not know which device gets the bytes, or whether they fit.
"""

from __future__ import annotations

import os

from . import options
from .errors import ConfigError
from .files import open_file
from .virtio.kinds import CONFIG_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .virtio.kinds import Kind

CONFIG_CURE = "give hex, @FILE or [field=value,...]"


def config_bytes(option: str, text: str, kind: Kind) -> bytes:
    """Hexadecimal digits, `@FILE`, or `[field=value,...]` by the kind's layout.  Raises ConfigError."""
    subject = f"{option}: config={text}"
    try:
        data = _config_file(subject, text[1:]) if text[:1] == "@" else _config_text(text, kind)
    except (ValueError, options.OptionSyntaxError) as error:
        raise ConfigError(f"{subject}: {error}; {CONFIG_CURE}") from None
    if len(data) > CONFIG_MAX:
        raise ConfigError(f"{subject}: is longer than {CONFIG_MAX} bytes; give what the device has")
    return data


def _config_file(subject: str, path: str) -> bytes:
    fd = open_file(subject, path, CONFIG_CURE)
    try:
        return os.read(fd, CONFIG_MAX + 1)
    finally:
        os.close(fd)


def _config_text(text: str, kind: Kind) -> bytes:
    if text[:1] != "[":
        return bytes.fromhex(text)
    if text[-1] != "]":
        raise ValueError("']' is missing at the end")
    return _config_fields(text[1:-1], kind)


def _config_fields(text: str, kind: Kind) -> bytes:
    data = bytearray(kind.config_size)
    places = {name: (offset, width) for name, offset, width in kind.fields()}
    for item in options.split(text):
        name, _, value = item.strip().partition("=")
        if name not in places:
            raise ValueError(f"{kind.name} has no field {name!r}{options.nearest(name, places)}")
        offset, width = places[name]
        data[offset : offset + width] = _field(options.dequote(value), name, width)
    return bytes(data)


def _field(value: str, name: str, width: int) -> bytes:
    if width in (1, 2, 4, 8):
        try:
            return int(value, 0).to_bytes(width, "little")
        except (ValueError, OverflowError):
            raise ValueError(f"{name}={value} is no number of {width} bytes") from None
    raw = bytes.fromhex(value.replace(":", "")) if name == "mac" else value.encode()
    if len(raw) > width:
        raise ValueError(f"{name}={value} is longer than {width} bytes")
    return raw.ljust(width, b"\0")
