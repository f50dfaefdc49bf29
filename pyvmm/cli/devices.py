"""`pyvmm devices`: the table of device kinds, with drivers and backends; or one of them in full."""

from __future__ import annotations

import sys

from ..errors import ConfigError
from .parse import Command, Option, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from ..virtio.kinds import Kind
    from ..virtio.served import Served

COMMAND = Command(
    "devices",
    "List the kinds of devices there are: queues, configuration, guest drivers, backends known to work;\n"
    "or show one of them, with its configuration fields and an example.",
    "devices [NAME|ID] [--json]",
    (Option("--json", "", "the same as JSON, for programs"),),
    examples=(("all of them", "pyvmm devices"), ("one of them, in full", "pyvmm devices sound")),
    details="A number that is not in the list works too: any backend can be any device.",
    words=True,
)
HEADS = ("id", "name", "least", "usual", "rule", "max size", "config", "writes", "driver", "backends")
VENDOR, FIRST_DEVICE = 0x1AF4, 0x1040  # virtio 1.2, 4.1.2.1


def main(argv: Sequence[str]) -> int:
    """Print the table, or the kind that is named."""
    given = parse(COMMAND, argv)
    if len(given.words) > 1:
        raise ConfigError(f"devices {' '.join(given.words)}: one name or number at most")
    from ..virtio.kinds import KINDS

    chosen = _find(given.words[0]) if given.words else None
    if given.count("json"):
        text = as_json(describe(chosen) if chosen else [describe(kind) for kind in KINDS])
    else:
        text = as_page(chosen) if chosen else as_table(KINDS)
    sys.stdout.write(text)
    return 0


def _find(word: str) -> Kind:
    from ..devices import find_kind

    return find_kind("devices", word)


def served(kind: Kind) -> Served:
    """Drivers and backends of `kind`, possibly none."""
    from ..virtio.served import SERVED, Served

    return SERVED.get(kind.device_id) or Served()


def as_json(value: object) -> str:
    """`value` as indented JSON and a newline."""
    import json

    return json.dumps(value, indent=2) + "\n"


def describe(kind: Kind) -> dict[str, Any]:
    """Everything known about a kind, as plain values."""
    row = served(kind)
    fields = [{"name": name, "offset": offset, "width": width} for name, offset, width in kind.fields()]
    return {
        **{"id": kind.device_id, "name": kind.name, "aliases": kind.aliases, "title": kind.title},
        **{"min_queues": kind.min_queues, "usual_queues": kind.usual_queues, "rule": kind.queue_rule},
        **{"usual_sizes": kind.usual_sizes, "max_size": kind.max_size, "pci_class": kind.pci_class},
        **{"config_size": kind.config_size, "config": fields, "write_policy": kind.write_policy},
        **{"drivers": [f"CONFIG_{name}" for name in row.drivers], "refused": kind.refused},
        **{"backends": [backend.program for backend in row.backends]},
        **{"untested": [backend.program for backend in row.untested]},
    }


def as_table(kinds: Sequence[Kind]) -> str:
    """One line for each kind, under a head."""
    rows = [HEADS, *(cells(kind) for kind in kinds)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n"
        for row in rows
    )


def cells(kind: Kind) -> tuple[str, ...]:
    """The columns of HEADS for one kind; `-` where there is nothing."""
    row = served(kind)
    return (
        *(str(kind.device_id), kind.name, str(kind.min_queues), str(kind.usual_queues)),
        *("refused" if kind.refused else kind.queue_rule, str(kind.max_size)),
        *(str(kind.config_size or "-"), kind.write_policy if kind.config else "-"),
        ", ".join(row.drivers) or "-",
        ", ".join(backend.program for backend in row.backends) or "-",
    )


def as_page(kind: Kind) -> str:
    """One kind in full: facts, configuration fields, examples."""
    names = ", ".join((kind.name, *kind.aliases))
    lines = [f"{kind.device_id} {names}: {kind.title or 'a device that nobody has described'}", *_facts(kind)]
    if kind.config:
        lines += ["", "configuration fields:", "  offset  width  name"]
        lines += [f"  {offset:6}  {width:5}  {name}" for name, offset, width in kind.fields()]
    if not kind.refused:
        lines += ["", "examples:", *_examples(kind, served(kind))]
    return "\n".join(lines) + "\n"


def _facts(kind: Kind) -> Iterator[str]:
    row, data = served(kind), describe(kind)
    writes = f"; what a driver writes: {kind.write_policy}" if kind.config else ""
    newer = " (newer than Linux 6.1)" if row.newer else ""
    facts = {
        "refused": kind.refused,
        "PCI": f"{VENDOR:04x}:{FIRST_DEVICE + kind.device_id:04x}, class {kind.pci_class:04x}",
        "queues": f"at least {kind.min_queues}, usually {kind.usual_queues}; rule: {kind.queue_rule}",
        "queue size": f"{kind.usual_sizes[0]}, at most {kind.max_size}",
        "configuration": f"{kind.config_size} bytes{writes}",
        "driver": ", ".join(data["drivers"]) + newer,
        "backends": ", ".join(data["backends"]),
        "untested": ", ".join(data["untested"]),
    }
    return (f"  {name:<13}  {text}" for name, text in facts.items() if text)


def _examples(kind: Kind, row: Served) -> Iterator[str]:
    if row.option:
        yield "  # pyvmm starts the backend"
        yield f"  pyvmm --kernel vmlinux {row.option}"
    socket, name = f"{kind.name}.sock", kind.name if kind.title else kind.device_id
    generic = "  pyvmm --kernel vmlinux --generic-vhost-user"
    for backend in (*row.backends, *row.untested):
        yield "  # a backend that runs already"
        yield f"  {backend.command.format(socket=socket)}"
        keys = f",{backend.keys}" if backend.keys else ""
        yield f'{generic} "socket={backend.listens_at(socket)},device_type={name}{keys}"'
    if not row.backends + row.untested:
        yield "  # any backend"
        yield f'{generic} "socket={socket},device_type={name}"'
