"""`pyvmm doctor`: one line for each thing that pyvmm needs of this host."""

from __future__ import annotations

import sys

from .parse import Command, Option, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..host.doctor import Finding, Report

COMMAND = Command(
    "doctor",
    "Say what this host can do, one line each, with the cure for what is missing.",
    "doctor [--json]",
    (Option("--json", "", "the same as one JSON object, for programs"),),
    examples=(("all of it", "pyvmm doctor"), ("how pyvmm run works here", "pyvmm doctor --json | jq .ways")),
    details="ok: as it should be; warn: works, with a limit; fail: does not work.\n"
    "Exit status: 0 when pyvmm run can work on this host in some way, else 1.",
)


def main(argv: Sequence[str]) -> int:
    """Examine the host and print what was found."""
    given = parse(COMMAND, argv)
    from ..host.doctor import examine

    report = examine()
    sys.stdout.write(as_json(report) if given.count("json") else as_lines(report))
    return 0 if report.works else 1


def as_lines(report: Report) -> str:
    """One line for each finding: state, name, what is, and after an arrow the cure."""
    width = max(len(finding.name) for finding in report.findings)
    return "".join(_line(finding, width) for finding in report.findings)


def _line(finding: Finding, width: int) -> str:
    cure = f" -> {finding.cure}" if finding.cure else ""
    return f"{finding.state:<5} {finding.name:<{width}}  {finding.text}{cure}\n"


def as_json(report: Report) -> str:
    """`works`, `ways` and `findings` (name, state, text, cure, facts)."""
    import json

    findings = [finding._asdict() for finding in report.findings]
    value = {"works": report.works, "ways": list(report.ways), "findings": findings}
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
