"""Finding guest kernels, and fetching one with stand-ins for apt and dpkg."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvmm import cli
from pyvmm.errors import ConfigError
from pyvmm.host import kernels

NEWEST = "6.1.0-56-cloud-amd64"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "_boot", lambda: iter(()))
    return tmp_path / "pyvmm" / "kernels"


def debian(cache: Path, release: str) -> None:
    tree = cache / "debian" / release
    (tree / "boot").mkdir(parents=True)
    (tree / "boot" / f"vmlinuz-{release}").write_bytes(b"kernel")
    (tree / "lib" / "modules" / release).mkdir(parents=True)


def own(cache: Path, name: str, mtime: int) -> None:
    (cache / "own" / name).mkdir(parents=True)
    path = cache / "own" / name / "vmlinux"
    path.write_bytes(b"kernel")
    os.utime(path, (mtime, mtime))


def test_own_before_debian_and_newest_first(cache: Path) -> None:
    for release in ("6.1.0-9-cloud-amd64", NEWEST, "6.1.0-10-cloud-amd64"):
        debian(cache, release)
    own(cache, "6.1.192-pyvmm-ffff", 1000)
    own(cache, "6.1.192-pyvmm-aaaa", 2000)
    own(cache, ".building", 3000)
    found = [(kernel.source, kernel.release) for kernel in kernels.find_kernels()]
    assert found == [
        ("own", "6.1.192-pyvmm-aaaa"),
        ("own", "6.1.192-pyvmm-ffff"),
        ("debian", NEWEST),
        ("debian", "6.1.0-10-cloud-amd64"),
        ("debian", "6.1.0-9-cloud-amd64"),
    ]
    assert kernels.find_kernel().source == "own"
    assert kernels.find_kernel("debian").release == NEWEST
    assert kernels.find_kernel("6.1.0-9-cloud-amd64").modules is not None


def test_a_file_gets_its_modules_when_they_lie_beside_it(cache: Path, tmp_path: Path) -> None:
    debian(cache, NEWEST)
    path = str(cache / "debian" / NEWEST / "boot" / f"vmlinuz-{NEWEST}")
    assert kernels.find_kernel(path) == kernels.find_kernel("debian")
    other = tmp_path / "vmlinux"
    other.write_bytes(b"kernel")
    assert kernels.find_kernel(str(other)) == kernels.Kernel(str(other), "", None, "file")


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        (None, "pyvmm kernel fetch gets Debian's, pyvmm kernel build makes a small one"),
        ("own", "pyvmm kernel build"),
        ("debian", "pyvmm kernel fetch"),
        ("5.4", "no kernel of this name"),
    ],
)
def test_absent_kernels(cache: Path, name: str | None, cure: str) -> None:
    with pytest.raises(ConfigError, match=cure) as caught:
        kernels.find_kernel(name)
    assert "scripts/" not in str(caught.value), "an installed pyvmm has none"


def test_the_list_says_when_it_is_empty(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kernel", "list"]) == 0
    assert capfd.readouterr() == ("", f"pyvmm: {kernels.NONE}\n")
    own(cache, "6.1-pyvmm", 1000)
    assert cli.main(["kernel"]) == 0
    assert capfd.readouterr() == (f"own     {'6.1-pyvmm':<32} {cache}/own/6.1-pyvmm/vmlinux\n", "")


TOOLS = {
    "apt-cache": f'echo "linux-image-cloud-amd64"; echo "  Depends: linux-image-{NEWEST}"',
    "apt-get": """case "$1" in
update) touch "$STATE/updated" ;;
download) [ -e "$STATE/stale" ] && [ ! -e "$STATE/updated" ] && { echo "E: 404 Not Found" >&2; exit 100; }
    [ -e "$STATE/offline" ] && { echo "E: no network" >&2; exit 100; }
    : >"$3.deb" ;;
esac""",
    "dpkg-deb": f'mkdir -p "$3/boot" "$3/lib/modules/{NEWEST}"; echo kernel >"$3/boot/vmlinuz-{NEWEST}"',
}


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for Debian's tools; they write the calls they get to `calls`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in TOOLS.items():
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$1" >>"$STATE/calls"\n{body}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("STATE", str(tmp_path))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def calls(state: Path) -> list[str]:
    return (state / "calls").read_text().split("\n")[:-1]


def test_fetched_once(cache: Path, tools: Path) -> None:
    said: list[str] = []
    kernel = kernels.fetch_kernel(said.append)
    assert (kernel.release, kernel.source) == (NEWEST, "debian")
    assert kernel.modules and os.path.isdir(kernel.modules)
    assert said == [f"downloading linux-image-{NEWEST}", f"unpacking linux-image-{NEWEST}"]
    before = calls(tools)
    assert before == ["apt-cache depends", "apt-get download", "dpkg-deb -x"]
    (tools / "offline").touch()
    assert kernels.fetch_kernel() == kernel
    assert calls(tools) == before
    assert [entry.name for entry in (cache / "debian").iterdir()] == [NEWEST]


def test_two_fetches_at_once(cache: Path, tools: Path) -> None:
    other = f"{cache}/debian/{NEWEST}/boot"
    script = f'mkdir -p "$3/boot" {other}; touch {other}/vmlinuz-{NEWEST}'
    (tools / "bin" / "dpkg-deb").write_text(f"#!/bin/sh\n{script}\n")
    assert kernels.fetch_kernel(lambda text: None).release == NEWEST


def test_stale_lists_are_refreshed(cache: Path, tools: Path) -> None:
    (tools / "stale").touch()
    assert kernels.fetch_kernel(lambda text: None).release == NEWEST
    assert calls(tools).count("apt-get update") == 1


def test_no_network_leaves_nothing(cache: Path, tools: Path) -> None:
    (tools / "offline").touch()
    with pytest.raises(ConfigError, match="no network"):
        kernels.fetch_kernel(lambda text: None)
    assert list((cache / "debian").iterdir()) == []
