"""`pyvmm rings`: the virtqueues of a running machine as a table."""

from __future__ import annotations

import os
import sys

from .parse import Command, Option, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ..ringview import LiveQueue, Sample

SHOWN_HEADS = 8
COMMAND = Command(
    "rings",
    "Show the virtqueues of a running machine: indices, what its devices have, who is stuck.",
    "rings SOCKET [--seconds S] [--descriptors] [--json]",
    (
        Option("--seconds", "S", "how long to look: by what happens then, stuck and busy differ (default 1)"),
        Option("--descriptors", "", "the chains that devices have, descriptor by descriptor"),
        Option("--json", "", "the same as one JSON object, for programs"),
    ),
    examples=(
        ("a machine that was started with --control", "pyvmm rings /run/vm.sock"),
        ("what a device sits on", "pyvmm rings /run/vm.sock --seconds 5 --descriptors"),
    ),
    details="idle: the device has nothing; busy: it gave something back between the looks; stuck: it\n"
    "had something all the time and gave nothing back; unclear: it gave nothing back, and the memory of a\n"
    "packed ring does not tell whether it has something; broken: the ring contradicts itself.\n"
    "Heads are those of a device that gives back in order; it may have given back one with a question mark.\n"
    "Nothing in the machine is changed.  Exit status: 0, or 1 when a queue is stuck or broken.",
    words=True,
)


def main(argv: Sequence[str]) -> int:
    """Look for a while and print what was found."""
    from .. import config
    from ..errors import ConfigError

    given = parse(COMMAND, argv)
    if len(given.words) != 1:
        fault = f"rings {' '.join(given.words)}: one SOCKET at most" if given.words else "SOCKET is missing"
        raise ConfigError(f"{fault}: name the --control socket of a machine (see pyvmm rings --help)")
    from ..control import ask

    try:
        from ..ringview import BROKEN, STUCK, live_queues
    except ModuleNotFoundError as error:
        raise ConfigError(f"pyvmm rings needs {error.name}: pip install 'pyvmm[numpy]'") from None

    seconds = config.seconds("--seconds", given.text("seconds", "1"))
    machine, ram_fd = ask(given.words[0])
    try:
        queues = live_queues(machine, ram_fd)
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{given.words[0]}: it tells no machine ({what}); name the --control socket of one"
        ) from None
    finally:
        os.close(ram_fd)
    rows = look(queues, seconds)
    sys.stdout.write(as_json(rows) if given.count("json") else as_table(rows, given.count("descriptors") > 0))
    return 1 if any(row["state"] in (STUCK, BROKEN) for row in rows) else 0


def look(queues: Sequence[LiveQueue], seconds: float) -> list[dict[str, Any]]:
    """One row for each queue, from many looks."""
    from time import sleep

    from .. import ringview

    looks = [[queue.ring.sample()] for queue in queues]
    for pause in ringview.pauses(seconds):
        sleep(pause)
        for queue, seen in zip(queues, looks, strict=True):
            seen.append(queue.ring.sample())
    return [_row(queue, seen) for queue, seen in zip(queues, looks, strict=True)]


def _row(queue: LiveQueue, looks: Sequence[Sample]) -> dict[str, Any]:
    from ..ringview import latest, state

    ring, now = queue.ring, latest(looks)
    return {
        "device": queue.device,
        "queue": queue.index,
        "ring": ring.format,
        "size": ring.size,
        "avail": now.avail,
        "used": now.used,
        "outstanding": len(now.heads),
        "unsure": now.unsure,
        "state": state(looks),
        "chains": {head: list(ring.chain(head)) for head in now.heads},
    }


def as_table(rows: Sequence[dict[str, Any]], descriptors: bool) -> str:
    """Columns for people."""
    width = max([6, *(len(row["device"]) for row in rows)])
    lines = [f"{'device':<{width}}  queue  ring     size  avail   used  state    heads"]
    for row in rows:
        lines.append(
            f"{row['device']:<{width}}  {row['queue']:>5}  {row['ring']:<6}  {row['size']:>5}"
            f"  {row['avail']:>5}  {row['used']:>5}  {row['state']:<7}  {_heads(row)}".rstrip()
        )
        if descriptors:
            lines += [_descriptor(head, *part) for head, chain in row["chains"].items() for part in chain]
    return "".join(line + "\n" for line in lines)


def _heads(row: dict[str, Any]) -> str:
    heads = [f"{head}?" if turn < row["unsure"] else f"{head}" for turn, head in enumerate(row["chains"])]
    return " ".join([*heads[:SHOWN_HEADS], *(["..."] if len(heads) > SHOWN_HEADS else [])])


def _descriptor(head: int, address: int, length: int, flags: int) -> str:
    from ..ringview import INDIRECT, WRITE

    what = "device writes" if flags & WRITE else "device reads"
    table = ", a table of descriptors" if flags & INDIRECT else ""
    return f"    head {head}: {address:#x}, {length} bytes, {what}{table}"


def as_json(rows: Sequence[dict[str, Any]]) -> str:
    """The rows; `chains` maps a head to address, length and flags of its descriptors, the oldest first.

    The first `unsure` of `outstanding` chains may have been given back.
    """
    import json

    return json.dumps({"queues": rows}, indent=2) + "\n"
