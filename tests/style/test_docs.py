"""The documentation names what exists, and what exists is documented."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.source import ROOT

from pyvmm import cli, config, devices, errors
from pyvmm.backend import faults
from pyvmm.cli.parse import HELP, Command, render
from pyvmm.virtio.kinds import KINDS

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")])
USAGE = (ROOT / "docs/usage.md").read_text()
DEVICES = (ROOT / "docs/devices.md").read_text()
COMMANDS: dict[str, Command] = {
    name: __import__(f"pyvmm.cli.{name}", fromlist=["COMMAND"]).COMMAND for name in cli.COMMANDS
}
GLOBAL = {"--help", "-h", "--version", "-V"}
OTHERS = {"-vv"}  # a switch twice
PROGRAMS = {  # options of our backends as programs
    option
    for path in (ROOT / "pyvmm" / "backend").glob("*.py")
    for option in re.findall(r'"(--[a-z-]+)"', path.read_text())
}
KEYS = {
    "--cpus": config.CPUS_KEYS,
    "--memory": config.MEMORY_KEYS,
    "--generic-vhost-user": config.GENERIC_KEYS,
    "--disk": config.DISK_KEYS,
    "--fs": config.FS_KEYS,
    "--rng": config.RNG_KEYS,
    "--net": config.NET_KEYS,
}


def names(command: Command) -> set[str]:
    """Every spelling of every option."""
    options = (*command.options, HELP)
    return {option.name for option in options} | {option.short for option in options if option.short}


def code(text: str) -> Iterator[str]:
    """Lines of code blocks, continued ones joined, and code inside of sentences."""
    for block in re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def invocations() -> Iterator[tuple[str, str, list[str]]]:
    """Page, command and options of each `pyvmm ...` in the documentation."""
    for page in PAGES:
        for line in code(page.read_text()):
            if not line.startswith("pyvmm "):
                continue
            _, *words = shlex.split(re.sub(r"[\[\]|]", " ", line.partition(" #")[0]))
            own = words[: words.index("--")] if "--" in words else words
            plain = own[0] if own and re.fullmatch(r"[a-z]+", own[0]) else "boot"
            yield page.name, plain, [word.partition("=")[0] for word in own if word.startswith("-")]


@pytest.mark.parametrize(("page", "command", "options"), list(invocations()))
def test_command_lines_in_the_text_are_possible(page: str, command: str, options: list[str]) -> None:
    assert command in COMMANDS, f"{page}: pyvmm {command}"
    for option in options:
        assert option in names(COMMANDS[command]) | GLOBAL, f"{page}: pyvmm {command} {option}"


def test_there_are_command_lines_in_the_text() -> None:
    assert {command for _, command, _ in invocations()} == set(COMMANDS)
    assert {"--generic-vhost-user", "--cmdline"} <= {
        option for *_, found in invocations() for option in found
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_named_alone_exist(page: Path) -> None:
    known = GLOBAL | OTHERS | PROGRAMS | {name for command in COMMANDS.values() for name in names(command)}
    named = {word.split("=")[0].split()[0] for word in code(page.read_text()) if re.match(r"--?[a-z]", word)}
    assert named <= known


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_the_command_s_section(name: str) -> None:
    section = USAGE.partition(f"\n## pyvmm {name}\n")[2].partition("\n## ")[0]
    assert section, f"docs/usage.md has no section about pyvmm {name}"
    for option in COMMANDS[name].options:
        assert f"`{option.name}`" in section, option.name
        assert not option.short or f"`{option.short}`" in section, option.short


def test_where_the_terminal_is_the_guest_s_the_way_out_is_told() -> None:
    for text in ((ROOT / "README.md").read_text(), render(COMMANDS["boot"])):
        assert re.search(r"Ctrl-C too\.\s+To leave, power the guest off", text)


@pytest.mark.parametrize("option", KEYS)
def test_every_key_is_explained(option: str) -> None:
    for key in KEYS[option]:
        assert re.search(rf"`{key.name}\b", USAGE + DEVICES), f"{option} {key.name}="


def test_every_device_option_has_its_keys_checked() -> None:
    records = {record.__name__ for record in devices._MAKERS}
    assert records == {"GenericDevice", "FsDevice", "DiskDevice", "RngDevice", "NetDevice", "ConsoleDevice"}


def test_every_exit_status_is_in_the_table() -> None:
    table = USAGE.partition("## Exit statuses")[2].partition("\n## ")[0]
    for name, value in vars(errors).items():
        if name.startswith("EXIT_"):
            assert f"\n| {value} |" in table, name


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_table_of_kinds_is_the_program_s(kind) -> None:  # type: ignore[no-untyped-def]
    spelled = ", ".join(f"`{name}`" for name in (kind.name, *kind.aliases))
    rule = f"refused: {kind.refused}" if kind.refused else kind.queue_rule
    config = f"{kind.config_size}, {kind.write_policy}" if kind.config else ""
    row = (
        f"| {kind.device_id} | {spelled} | {kind.min_queues} | {kind.usual_queues} | {rule} "
        f"| {kind.usual_sizes[0]} of {kind.max_size} | {config} |"
    )
    assert row in DEVICES.splitlines()


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_table_of_faults_has_them_all() -> None:
    section = (
        (ROOT / "docs/backends.md").read_text().partition("## Faults on purpose")[2].partition("\n## ")[0]
    )
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted((*faults.NAMES, "features"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target
