"""Command lines as tables: `Option` rows in, a dict of values or one clear error out.

It owns what every subcommand shares: `--name value`, `--name=value`, flags that repeat
or take several values, `--`, `--help` with examples, and the nearest name for a typo.
It does not know what any option means.  `argparse` costs a third of the time in which
a guest should be running, and cannot take several values without eating positionals.
"""

from __future__ import annotations

from ..errors import ConfigError
from ..options import nearest
from ..record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Option(Record):
    """One option: `metavar` is empty for a switch; `many` collects values in a list.

    A value must be something, unless `empty` says otherwise: mostly it comes of a variable without one.
    """

    name: str
    metavar: str
    help: str
    many: bool = False
    short: str = ""
    empty: bool = False

    @property
    def key(self) -> str:
        """The name under which the value is found."""
        return self.name.lstrip("-").replace("-", "_")


class Command(Record):
    """A subcommand: one line, its options, examples, and whether words may follow."""

    name: str
    summary: str
    usage: str
    options: tuple[Option, ...]
    examples: tuple[tuple[str, str], ...] = ()
    details: str = ""
    words: bool = False  # positional words are accepted
    trailing: bool = False  # `-- CMD ...` is accepted


class Arguments(Record):
    """What was given: values by option key, positional words, and what followed `--`."""

    values: dict[str, str | list[str] | int]
    words: list[str]
    trailing: list[str] | None

    def text(self, key: str, default: str = "") -> str:
        """The value of a plain option."""
        value = self.values.get(key, default)
        return value if isinstance(value, str) else default

    def texts(self, key: str) -> list[str]:
        """The values of an option that may repeat."""
        value = self.values.get(key, [])
        return value if isinstance(value, list) else []

    def count(self, key: str) -> int:
        """How often a switch was given."""
        value = self.values.get(key, 0)
        return value if isinstance(value, int) else 0


class HelpRequested(Exception):
    """`--help` was given; carries the text."""


HELP = Option("--help", "", "show this text", short="-h")


class _Parser:
    def __init__(self, command: Command) -> None:
        self.command = command
        self.names: dict[str, Option] = {}
        for option in (*command.options, HELP):
            self.names[option.name] = option
            if option.short:
                self.names[option.short] = option
        self.values: dict[str, str | list[str] | int] = {}
        self.words: list[str] = []
        self.trailing: list[str] | None = None

    def error(self, text: str) -> ConfigError:
        return ConfigError(f"{text} (see pyvmm {self.command.name} --help)")

    def parse(self, argv: Sequence[str]) -> Arguments:
        index = 0
        while index < len(argv):
            word = argv[index]
            index += 1
            if word == "--":
                self._trail(argv[index:])
                break
            if word.startswith("-") and len(word) > 1:
                index = self._option(word, argv, index)
            elif self.command.words and word:
                self.words.append(word)
            else:
                cure = f"; a command follows two dashes: -- {word}" if self.command.trailing else ""
                raise self.error(f"unexpected word {word!r}{cure}")
        return Arguments(self.values, self.words, self.trailing)

    def _trail(self, words: Sequence[str]) -> None:
        if not self.command.trailing:
            raise self.error("nothing can follow '--' here")
        self.trailing = list(words)

    def _option(self, word: str, argv: Sequence[str], index: int) -> int:
        name, equals, inline = word.partition("=")
        option = self.names.get(name)
        if option is None and self._cluster(word):
            return index
        if option is None:
            raise self.error(f"unknown option {name}{nearest(name, self.names)}")
        if option is HELP:
            raise HelpRequested(render(self.command))
        if not option.metavar:
            return self._switch(option, equals, index)
        values = [inline] if equals else self._values(option, argv, index)
        index += 0 if equals else len(values)
        if not values:
            raise self.error(f"{name} needs a value: {name} {option.metavar}")
        if "" in values and not option.empty:
            raise self.error(f"{name}: an empty value; {name} {option.metavar} is needed")
        self._store(option, values)
        return index

    def _cluster(self, word: str) -> bool:
        """`-vv` is `-v -v`."""
        option = self.names.get(word[:2])
        if word.startswith("--") or option is None or option.metavar or set(word[1:]) != {word[1]}:
            return False
        self.values[option.key] = self._count(option) + len(word) - 1
        return True

    def _count(self, option: Option) -> int:
        value = self.values.get(option.key, 0)
        return value if isinstance(value, int) else 0

    def _switch(self, option: Option, equals: str, index: int) -> int:
        if equals:
            raise self.error(f"{option.name} takes no value")
        self.values[option.key] = self._count(option) + 1
        return index

    def _values(self, option: Option, argv: Sequence[str], index: int) -> list[str]:
        values: list[str] = []
        for word in argv[index:]:
            if values and (not option.many or self.command.words):
                break
            if word == "--" or (word.startswith("-") and (values or word.partition("=")[0] in self.names)):
                break
            values.append(word)
        return values

    def _store(self, option: Option, values: list[str]) -> None:
        if option.many:
            known = self.values.setdefault(option.key, [])
            assert isinstance(known, list)
            known.extend(values)
        elif option.key in self.values:
            raise self.error(f"{option.name} is given twice")
        else:
            self.values[option.key] = values[0]


def parse(command: Command, argv: Sequence[str]) -> Arguments:
    """Read `argv` by `command`; raises `ConfigError` or `HelpRequested`."""
    return _Parser(command).parse(argv)


def unparse(command: Command, given: Arguments) -> list[str]:
    """A command line that `parse` reads as `given`."""
    words = [word for option in command.options for word in _spelled(option, given.values.get(option.key))]
    words += given.words
    return words if given.trailing is None else [*words, "--", *given.trailing]


def _spelled(option: Option, value: str | list[str] | int | None) -> list[str]:
    if isinstance(value, int):
        return [option.name] * value
    values = [value] if isinstance(value, str) else value or []
    return [f"{option.name}={text}" for text in values]


def render(command: Command) -> str:
    """The text of `--help`."""
    lines = [f"usage: pyvmm {command.usage}", "", command.summary, ""]
    if command.details:
        lines += [command.details.strip("\n"), ""]
    rows = [(_label(option), option.help) for option in (*command.options, HELP)]
    width = min(max(len(label) for label, _ in rows), 30)
    lines.append("options:")
    for label, text in rows:
        lines += _row(label, text, width)
    if command.examples:
        lines += ["", "examples:"]
        for text, line in command.examples:
            lines += [f"  # {text}", f"  {line}"]
    return "\n".join(lines) + "\n"


def _label(option: Option) -> str:
    label = f"{option.short}, {option.name}" if option.short else option.name
    return f"{label} {option.metavar}".rstrip() + (" ..." if option.many else "")


def _row(label: str, text: str, width: int) -> list[str]:
    from textwrap import wrap

    body = wrap(text, 76 - width) or [""]
    first = f"  {label:<{width}}  {body[0]}" if len(label) <= width else f"  {label}"
    rest = body[1:] if len(label) <= width else body
    return [first, *(" " * (width + 4) + line for line in rest)]
