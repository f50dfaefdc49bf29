"""`pyvmm trace`: what a recording of the vhost-user proxy holds, and the same dialogue once more."""

from __future__ import annotations

import sys

from .parse import Command, Option, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable, Sequence

    from ..vhost_user.recording import Line
    from .parse import Arguments

COMMAND = Command(
    "trace",
    "Show a recording made with `python -m pyvmm.backend.proxy --record FILE`, or say the frontend's side\n"
    "of it to a backend and compare the answers.",
    "trace show FILE\n       pyvmm trace replay FILE --to SOCKET",
    (
        Option("--to", "SOCKET", "the backend to have the recorded dialogue with"),
        Option("--connection", "N", "have only what was said on the Nth connection, from 1"),
        Option("--paced", "", "ask at the recorded times, instead of at once"),
    ),
    examples=(
        ("every message and chain", "pyvmm trace show session.jsonl"),
        ("does another backend answer the same?", "pyvmm trace replay session.jsonl --to /run/rng.sock"),
    ),
    details="Exit status: 0; `replay`: 1 when an answer differs, and the first such answer is printed.",
    words=True,
)

CURE = " (a backend may serve only one: ask with --connection)"


def main(argv: Sequence[str]) -> int:
    """Do what the first word says; returns the exit status."""
    from ..errors import ConfigError

    given = parse(COMMAND, argv)
    action = ACTIONS.get(given.words[0]) if len(given.words) == 2 else None
    if action is None:
        raise ConfigError(f"one of {', '.join(ACTIONS)} and a FILE are needed (see pyvmm trace --help)")
    return action(given.words[1], given)


def show(path: str, given: Arguments) -> int:
    """Print the recording."""
    from ..vhost_user.recording import read

    for line in read(path):
        sys.stdout.write(line.as_text())
    sys.stdout.flush()
    return 0


def replay(path: str, given: Arguments) -> int:
    """Have the dialogue with the backend at the socket that `--to` names."""
    from ..errors import ConfigError
    from ..vhost_user import replay as player

    to = given.text("to")
    if not to:
        raise ConfigError("--to is missing: the socket of the backend to ask")
    pace = player.Paced() if given.count("paced") else player.at_once
    for where, lines in chosen(path, given.text("connection")).items():
        difference = player.replay(lines, connected(to, where), pace)
        if difference is not None:
            sys.stdout.write(f"{where}\n{difference}\n")
            return 1
    sys.stdout.write("every answer is as recorded\n")
    return 0


def chosen(path: str, number: str) -> dict[str, list[Line]]:
    """What to call each connection in the recording, and its lines: all, or the one that is asked for."""
    from ..errors import ConfigError
    from ..vhost_user.recording import connections, read

    every = {str(count): lines for count, lines in enumerate(connections(read(path)), 1)}
    if not number:
        return {f"connection {count}{CURE if count != '1' else ''}": lines for count, lines in every.items()}
    if number not in every:
        raise ConfigError(f"--connection: {number}: {path} has those from 1 to {len(every)}")
    return {f"connection {number}": every[number]}


def connected(path: str, where: str) -> socket:
    """A socket connected to `path`; ConfigError with `where` that fails."""
    from _socket import AF_UNIX, SOCK_STREAM, socket

    from ..errors import ConfigError

    sock = socket(AF_UNIX, SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise ConfigError(f"{path}: {where}: {error.strerror}") from None
    return sock


ACTIONS: dict[str, Callable[[str, Arguments], int]] = {"show": show, "replay": replay}
