"""`pyvmm trace`: what a recording of the vhost-user proxy holds, and the same dialogue once more."""

from __future__ import annotations

import sys

from .parse import Command, Option, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

COMMAND = Command(
    "trace",
    "Show a recording made with `python -m pyvmm.backend.proxy --record FILE`, or say the frontend's side\n"
    "of it to a backend and compare the answers.",
    "trace show FILE\n       pyvmm trace replay FILE --to SOCKET",
    (Option("--to", "SOCKET", "the backend to have the recorded dialogue with"),),
    examples=(
        ("every message and chain", "pyvmm trace show session.jsonl"),
        ("does another backend answer the same?", "pyvmm trace replay session.jsonl --to /run/rng.sock"),
    ),
    details="Exit status: 0; `replay`: 1 when an answer differs, and the first such answer is printed.",
    words=True,
)


def main(argv: Sequence[str]) -> int:
    """Do what the first word says; returns the exit status."""
    from ..errors import ConfigError

    given = parse(COMMAND, argv)
    action = ACTIONS.get(given.words[0]) if len(given.words) == 2 else None
    if action is None:
        raise ConfigError(f"one of {', '.join(ACTIONS)} and a FILE are needed (see pyvmm trace --help)")
    try:
        return action(given.words[1], given.text("to"))
    except OSError as error:
        raise ConfigError(f"{error.filename or given.text('to')}: {error.strerror}") from None


def show(path: str, to: str) -> int:
    """Print the recording."""
    from ..vhost_user.recording import read

    for line in read(path):
        sys.stdout.write(line.as_text())
    return 0


def replay(path: str, to: str) -> int:
    """Have the dialogue with the backend at the socket `to`."""
    from _socket import AF_UNIX, SOCK_STREAM, socket

    from ..errors import ConfigError
    from ..vhost_user import replay as player
    from ..vhost_user.recording import read

    if not to:
        raise ConfigError("--to is missing: the socket of the backend to ask")
    lines = list(read(path))
    sock = socket(AF_UNIX, SOCK_STREAM)
    try:
        sock.connect(to)
    except OSError:
        sock.close()
        raise
    difference = player.replay(lines, sock)
    sys.stdout.write("every answer is as recorded\n" if difference is None else f"{difference}\n")
    return 0 if difference is None else 1


ACTIONS: dict[str, Callable[[str, str], int]] = {"show": show, "replay": replay}
