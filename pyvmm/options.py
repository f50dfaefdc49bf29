"""The `key=value,...` option grammar of cloud-hypervisor, so that its command lines work.

Commas separate items outside double quotes and square brackets; only the first `=` of
an item counts; quotes stay until a value is converted, and `""` inside quotes is one
quote.  Converters are plain functions, and a table of `Key` rows says which keys an
option has.  This module knows no option by name and nothing about virtual machines.

Source: cloud-hypervisor `option_parser/src/lib.rs`.
"""

from __future__ import annotations

from .errors import ConfigError
from .record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

_SIZE_UNITS = {"K": 10, "M": 20, "G": 30}
_TOGGLES = {"on": True, "true": True, "off": False, "false": False, "": False}
_U64 = 1 << 64
MAX_DIGITS = 20  # what 64 bits can need; Python refuses to convert some thousands


class OptionSyntaxError(ConfigError):
    """The text does not follow the grammar or holds an unknown key or a bad value."""


class Key(Record):
    """One key: its converter, the default, and a word for its value in help texts."""

    name: str
    convert: Callable[[str], Any]
    default: Any = None
    required: bool = False
    alias_of: str = ""


def split(text: str, separator: str = ",") -> list[str]:
    """Split at `separator` outside quotes and brackets; both stay in the items."""
    items, start, depth, quoted = [], 0, 0, False
    for index, char in enumerate(text):
        if char == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif char == "[":
            depth += 1
        elif char == "]":
            depth -= 1
            if depth < 0:
                raise OptionSyntaxError(f"{text!r}: ']' without '['")
        elif char == separator and depth == 0:
            items.append(text[start:index])
            start = index + 1
    if quoted or depth:
        raise OptionSyntaxError(f"{text!r}: {'quote' if quoted else 'bracket'} is not closed")
    items.append(text[start:])
    return items


def dequote(text: str) -> str:
    """Drop the quotes; a quote that directly follows a closing one is a literal quote."""
    out, quoted, just_closed = [], False, False
    for char in text:
        if char != '"':
            out.append(char)
            just_closed = False
            continue
        if not quoted and just_closed:
            out.append('"')
        just_closed = quoted
        quoted = not quoted
    return "".join(out)


def integer(text: str) -> int:
    """Decimal digits, optionally quoted."""
    digits = dequote(text)
    if not (digits.isascii() and digits.isdigit()) or len(digits) > MAX_DIGITS:
        raise ValueError("a number is needed, such as 2")
    return int(digits)


def size(text: str) -> int:
    """Bytes, or a number with one of K, M and G (binary units)."""
    value = dequote(text)
    shift = _SIZE_UNITS.get(value[-1:], 0)
    digits = value[:-1] if shift else value
    plain = digits.isascii() and digits.isdigit() and len(digits) <= MAX_DIGITS
    if not plain or int(digits) << shift >= _U64:
        raise ValueError("a size is needed: bytes, or a number with K, M or G, such as 512M")
    return int(digits) << shift


def toggle(text: str) -> bool:
    """`on`, `off`, `true` or `false` in any case; the empty text is off."""
    try:
        return _TOGGLES[text.lower()]
    except KeyError:
        raise ValueError("on or off is needed") from None


def string(text: str) -> str:
    """Any text; quotes are removed."""
    return dequote(text)


def integers(text: str) -> tuple[int, ...]:
    """`[1,2,8-10]`; the brackets may be missing, ranges ascend strictly."""
    out: list[int] = []
    for item in text.strip("[]").split(","):
        first, dash, last = item.partition("-")
        low = integer(first)
        high = integer(last) if dash else low
        if dash and high <= low:
            raise ValueError(f"the range {item} does not ascend")
        if high - low > 0xFFFF:
            raise ValueError(f"the range {item} is too long")
        out.extend(range(low, high + 1))
    return tuple(out)


def mac(text: str) -> bytes:
    """The address of one network card: six bytes in hexadecimal, not a group's."""
    try:
        address = bytes(int(part, 16) for part in dequote(text).split(":"))
    except ValueError:
        address = b""
    if len(address) != 6 or address[0] & 1 or not any(address):
        raise ValueError("the address of one card is needed, such as 52:54:00:12:34:56")
    return address


def mtu(text: str) -> int:
    """The largest packet of a network, as virtio allows it (1.3, section 5.1.4.1)."""
    value = integer(text)
    if not 68 <= value <= 65535:
        raise ValueError("a number from 68 to 65535 is needed")
    return value


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean X?` for the word most like `word`, or nothing."""
    from difflib import get_close_matches

    found = get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def parse(option: str, text: str, keys: Iterable[Key]) -> dict[str, Any]:
    """Read `text` by `keys`: a value (or the default) for each key that is no alias.

    Raises `OptionSyntaxError` naming `option`, the key and what would be right.
    """
    table = {key.name: key for key in keys}
    found: dict[str, Any] = {}
    if text.strip():
        try:
            items = split(text.strip())
        except OptionSyntaxError as error:
            raise OptionSyntaxError(f"{option}: {error}") from None
        for item in items:
            name, value = _convert(option, item, table)
            found[name] = value
    return _complete(option, found, table)


def _convert(option: str, item: str, table: Mapping[str, Key]) -> tuple[str, Any]:
    name, equals, text = item.partition("=")
    key = table.get(name)
    if key is None:
        cure = nearest(name.strip(), table) or f"; the keys are {', '.join(table)}"
        raise OptionSyntaxError(f"{option}: unknown key {name!r}{cure}")
    if not equals:
        raise OptionSyntaxError(f"{option}: {name} needs a value: {name}=...")
    text = text.strip()
    try:
        value = key.convert(text) if text else None
    except ValueError as error:
        raise OptionSyntaxError(f"{option}: {name}={text}: {error}") from None
    return key.alias_of or name, value


def _complete(option: str, found: Mapping[str, Any], table: Mapping[str, Key]) -> dict[str, Any]:
    out = {}
    for key in table.values():
        if key.alias_of:
            continue
        value = found.get(key.name)
        if value is None:
            if key.required:
                raise OptionSyntaxError(f"{option}: {key.name}= is missing")
            value = key.default
        out[key.name] = value
    return out
