"""The option grammar, against the cases of the parser it follows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm import options
from pyvmm.options import Key, OptionSyntaxError

KEYS = (
    Key("socket", options.string, required=True),
    Key("queue_sizes", options.integers, ()),
    Key("readonly", options.toggle, False),
    Key("size", options.size, 7),
    Key("device_type", options.string),
    Key("virtio_id", options.string, alias_of="device_type"),
)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("a=1,b=2", ["a=1", "b=2"]),
        ('a="1,2",b=[3,4]', ['a="1,2"', "b=[3,4]"]),
        ("a=[1,[2,3]],b", ["a=[1,[2,3]]", "b"]),
        ('a="[",b', ['a="["', "b"]),
        ("", [""]),
    ],
)
def test_split(text: str, items: list[str]) -> None:
    assert options.split(text) == items


@pytest.mark.parametrize("text", ['a="', "a=[", "a=]", "a=[1]],b=["])
def test_split_refuses_what_is_not_closed(text: str) -> None:
    with pytest.raises(OptionSyntaxError):
        options.split(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [('"a""b"', 'a"b'), ('""""', '"'), ('a""b', "ab"), ('"a"b"c"', "abc"), ('""', ""), ("plain", "plain")],
)
def test_dequote(text: str, value: str) -> None:
    assert options.dequote(text) == value


@given(st.text(alphabet='ab",[]= ', max_size=12))
def test_a_doubled_quoted_text_survives(text: str) -> None:
    """What the documentation's shell line does to a path, we undo."""
    quoted = '"' + text.replace('"', '""') + '"'
    assert options.parse("--x", f"socket={quoted},queue_sizes=[1]", KEYS)["socket"] == text


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("4096", 4096), ("1K", 1024), ("512M", 512 << 20), ("5G", 5 << 30), ('"1G"', 1 << 30)],
)
def test_size(text: str, value: int) -> None:
    assert options.size(text) == value


@pytest.mark.parametrize("text", ["", "K", "1k", "1T", "1.5G", "-1", "16000000000000G", "1MK"])
def test_size_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        options.size(text)


@pytest.mark.parametrize(
    ("text", "value"), [("[512,512]", (512, 512)), ("1,2", (1, 2)), ("[1,4-6]", (1, 4, 5, 6)), ("[7]", (7,))]
)
def test_integers(text: str, value: tuple[int, ...]) -> None:
    assert options.integers(text) == value


@pytest.mark.parametrize("text", ["[]", "[1,]", "[5-5]", "[6-5]", "[a]", "[1, 2]", "[0-99999999]"])
def test_integers_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        options.integers(text)


def test_addresses_and_packets_of_networks() -> None:
    assert options.mac('"52:54:0:12:34:56"') == bytes.fromhex("525400123456")
    assert (options.mtu("68"), options.mtu("65535")) == (68, 65535)


@pytest.mark.parametrize(
    "text", ["", "1", "52:54:00:12:34", "53:54:00:12:34:56", "0:0:0:0:0:0", "1ff:0:0:0:0:0", "-2:0:0:0:0:0"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="such as 52:54:00:12:34:56"):
        options.mac(text)


@pytest.mark.parametrize("text", ["67", "65536", "-1", "x"])
def test_packets_that_cannot_be(text: str) -> None:
    with pytest.raises(ValueError, match="number"):
        options.mtu(text)


def test_parse_defaults_aliases_and_last_wins() -> None:
    values = options.parse("--x", "socket=a,virtio_id=26,socket=b,readonly=ON,size=", KEYS)
    assert values == {"socket": "b", "queue_sizes": (), "readonly": True, "size": 7, "device_type": "26"}


def test_only_the_first_equals_sign_counts() -> None:
    assert options.parse("--x", "socket=a=b=c", KEYS)["socket"] == "a=b=c"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("soket=a", r"--x: unknown key 'soket'; did you mean 'socket'\?"),
        ("socket=a, size=1", r"unknown key ' size'; did you mean 'size'"),
        ("socket=a,", r"unknown key ''"),
        ("size=1", r"--x: socket= is missing"),
        ("socket", r"socket needs a value"),
        ("socket=a,size=1X", r"--x: size=1X: a size is needed"),
        ("socket=a,readonly=maybe", r"on or off is needed"),
        ('socket="a', r"--x: .* quote is not closed"),
    ],
)
def test_errors_name_the_option_and_the_cure(text: str, message: str) -> None:
    with pytest.raises(OptionSyntaxError, match=message):
        options.parse("--x", text, KEYS)


@given(st.text(max_size=40))
def test_any_text_parses_or_is_a_syntax_error(text: str) -> None:
    try:
        options.parse("--x", text, KEYS)
    except OptionSyntaxError as error:
        assert str(error).startswith("--x: ")
