"""Command lines: values, lists, switches, `--`, help and errors."""

from __future__ import annotations

import pytest

from pyvmm.cli.parse import Arguments, Command, HelpRequested, Option, parse, unparse
from pyvmm.errors import ConfigError

COMMAND = Command(
    "boot",
    "Boot a machine.",
    "boot [options]",
    (
        Option("--kernel", "FILE", "the kernel"),
        Option("--disk", "path=FILE,...", "a disk", many=True),
        Option("--cmdline", "TEXT", "what the kernel is told", empty=True),
        Option("--verbose", "", "say more", short="-v"),
    ),
    examples=(("boot it", "pyvmm boot --kernel vmlinux"),),
)
RUN = Command("run", "Run.", "run [options] [-- CMD]", COMMAND.options, words=True, trailing=True)


def test_values_lists_and_switches() -> None:
    given = parse(COMMAND, ["--kernel", "k", "--disk", "a", "b", "-v", "--disk=c=d", "-vv"])
    assert given.text("kernel") == "k"
    assert given.texts("disk") == ["a", "b", "c=d"]
    assert given.count("verbose") == 3
    assert given == Arguments(given.values, [], None)


def test_a_text_may_be_empty() -> None:
    assert parse(COMMAND, ["--cmdline", ""]).values == {"cmdline": ""}


def test_an_empty_word_is_none() -> None:
    with pytest.raises(ConfigError, match="unexpected word ''"):
        parse(RUN, [""])


def test_what_follows_two_dashes_is_left_alone() -> None:
    given = parse(RUN, ["word", "--kernel", "k", "--", "ls", "--help", "--"])
    assert (given.words, given.trailing) == (["word"], ["ls", "--help", "--"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--kernle", "x"], "unknown option --kernle; did you mean '--kernel'"),
        (["--kernel"], "--kernel needs a value: --kernel FILE"),
        (["--kernel", "--verbose"], "--kernel needs a value"),
        (["--kernel", ""], "--kernel: an empty value; --kernel FILE is needed"),
        (["--disk", "path=a", ""], "--disk: an empty value"),
        (["--kernel", "a", "--kernel", "b"], "given twice"),
        (["--verbose=1"], "takes no value"),
        (["word"], "unexpected word 'word'"),
        (["--", "x"], "nothing can follow"),
        (["-x"], "unknown option -x"),
    ],
)
def test_errors(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(COMMAND, argv)
    assert str(caught.value).endswith("(see pyvmm boot --help)")


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["--kernel", "k", "-vv", "--", "ls", "--", "-v"],
        ["--disk", "a", "b", "--verbose", "word", "--kernel=--", "--disk=-x"],
        ["--"],
    ],
)
def test_what_was_given_is_a_command_line_again(line: list[str]) -> None:
    given = parse(RUN, line)
    assert parse(RUN, unparse(RUN, given)) == given


def test_help_lists_every_option_and_the_examples() -> None:
    with pytest.raises(HelpRequested) as caught:
        parse(COMMAND, ["--kernel", "x", "-h"])
    text = str(caught.value)
    for part in ("usage: pyvmm boot", "--disk path=FILE,... ...", "-v, --verbose", "# boot it", "-h, --help"):
        assert part in text


def test_a_value_may_look_negative_or_be_a_dash() -> None:
    assert parse(COMMAND, ["--kernel", "-"]).text("kernel") == "-"
    assert parse(COMMAND, ["--kernel=--odd"]).text("kernel") == "--odd"
