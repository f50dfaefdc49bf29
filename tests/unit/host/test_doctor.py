"""`pyvmm doctor` on hosts that lack something; each is made by taking the thing away."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm import cli
from pyvmm.cli import doctor as command
from pyvmm.guest import initramfs
from pyvmm.host import accel, backends, doctor, kernels, own_kernel
from pyvmm.host.doctor import FAIL, OK, WARN, Finding, Host, Report

RELEASE = "6.1.0-56-cloud-amd64"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host with nothing installed; `tmp_path/bin` is all of PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("XDG_CONFIG_HOME", "CC", accel.LAB_MARK):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backends, "LIBRARY_DIRS", (str(tmp_path / "lib"),))
    monkeypatch.setattr(backends, "DESCRIPTION_DIRS", (str(tmp_path / "share"),))
    monkeypatch.setattr(kernels, "_boot", lambda: iter(()))
    monkeypatch.setattr(own_kernel, "SOURCE", str(tmp_path / "linux-source.tar.xz"))
    return tmp_path


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that other users may search, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def nowhere(tmp_path: Path, **places: str) -> Host:
    return Host(kvm=str(tmp_path / "kvm")).replace(**places)


def found(report: Report, name: str) -> Finding:
    (finding,) = (finding for finding in report.findings if finding.name == name)
    return finding


def program(path: Path, content: bytes = b"#!/bin/sh\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o755)


def install_kernel(bare: Path, *modules: str) -> None:
    tree = bare / "cache/pyvmm/kernels/debian" / RELEASE
    folder = tree / "lib/modules" / RELEASE
    (tree / "boot").mkdir(parents=True)
    (tree / "boot" / f"vmlinuz-{RELEASE}").write_bytes(b"kernel")
    (folder / "kernel").mkdir(parents=True)
    for name in modules:
        (folder / "kernel" / f"{name}.ko").write_bytes(b"")
    (folder / "modules.dep").write_text("".join(f"kernel/{name}.ko:\n" for name in modules))


def test_a_bare_host_works_in_no_way_and_every_line_has_a_cure(bare: Path) -> None:
    report = doctor.examine(nowhere(bare))
    assert not report.works and report.ways == ()
    failed = {finding.name: finding for finding in report.findings if finding.state == FAIL}
    assert set(failed) - {"compiled core"} == {
        *("kvm", "virtiofsd", "kernels", "guest init", "lab machine", "lab kernel", "verdict")
    }
    assert all(finding.cure for finding in report.findings if finding.state != OK)
    assert "modprobe" in failed["kvm"].cure
    assert "cargo install virtiofsd" in failed["virtiofsd"].cure
    assert "pyvmm kernel fetch" in failed["kernels"].cure == found(report, "kernels").cure
    assert "gcc" in failed["guest init"].cure
    assert "qemu-system-x86" in failed["lab machine"].cure
    assert "virtiofsd, kernels, guest init, lab machine, lab kernel" in failed["verdict"].text
    assert found(report, "qemu-storage-daemon").state == WARN
    build = found(report, "kernel build")
    assert build.state == WARN and "linux-source.tar.xz" in build.text and "flex" in build.text


def test_names_are_unique_and_lines_are_lines(bare: Path) -> None:
    report = doctor.examine(nowhere(bare))
    names = [finding.name for finding in report.findings]
    assert len(names) == len(set(names))
    lines = command.as_lines(report).splitlines()
    assert [line.split()[0] for line in lines] == [finding.state for finding in report.findings]
    assert all(finding.cure in line for finding, line in zip(report.findings, lines, strict=True))


def test_a_host_without_kvm_that_has_all_of_the_lab(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_core_fault", lambda: "")
    monkeypatch.setattr(initramfs, "compiled_init", lambda: "/cached/init")
    install_kernel(bare, "kvm_amd")
    program(bare / "bin/virtiofsd", b"in Rust")
    program(bare / "bin/qemu-system-x86_64")
    report = doctor.examine(nowhere(bare))
    assert report.ways == ("lab",) and report.works
    assert found(report, "verdict").state == WARN
    monkeypatch.setenv(accel.LAB_MARK, "1")
    assert doctor.examine(nowhere(bare)).ways == ()


@pytest.mark.parametrize("name", doctor.WAYS["lab"])
def test_the_lab_needs_every_part(bare: Path, name: str) -> None:
    findings = [Finding(part, OK, "") for part in doctor.WAYS["lab"]]
    assert doctor._possible(findings, doctor.WAYS["lab"])
    bad = [finding.replace(state=FAIL) if finding.name == name else finding for finding in findings]
    assert not doctor._possible(bad, doctor.WAYS["lab"])


def test_kvm_that_exists_but_is_not_permitted(open_directory: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root, to become somebody else")
    device = open_directory / "kvm"
    device.write_bytes(b"")
    for group, mode, cure in ((0, 0o600, doctor.UDEV_RULE), (2, 0o660, "usermod -aG bin USER")):
        os.chown(device, 0, group)
        device.chmod(mode)
        os.seteuid(65534)
        try:
            (finding,) = doctor._kvm(Host(kvm=str(device)))
        finally:
            os.seteuid(0)
        assert finding.state == FAIL and "Permission denied" in finding.text
        assert cure in finding.cure


def test_a_file_that_is_not_kvm(bare: Path) -> None:
    pytest.importorskip("pyvmm._native.kvm", reason="no compiled core", exc_type=ImportError)
    (finding,) = doctor._kvm(Host(kvm="/dev/null"))
    assert finding.state == FAIL and "it is not KVM's device" in finding.text


def test_without_the_compiled_core(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyvmm._native", None)
    report = doctor.examine(nowhere(bare, kvm="/dev/null"))
    core = found(report, "compiled core")
    assert core.state == FAIL and "this is Python 3" in core.text and "scripts/build-inplace" in core.cure
    assert found(report, "kvm").state == WARN
    assert not report.works


def test_memory(bare: Path) -> None:
    for mib, state, least in ((8192, OK, ""), (2048, WARN, "pyvmm lab"), (512, WARN, "pyvmm run")):
        (bare / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {mib * 1024} kB\nHugePages_Free: 0\n")
        (finding,) = doctor._memory(nowhere(bare, meminfo=str(bare / "meminfo")))
        assert (finding.state, finding.facts) == (state, {"available": mib << 20})
        assert least in finding.text and f"{mib} MiB" in finding.text


def test_hugepages(bare: Path) -> None:
    place = nowhere(bare, hugepages=str(bare / "huge"))
    (finding,) = doctor._hugepages(place)
    assert finding.state == WARN and "not known" in finding.text
    for size, free in (("2048kB", 0), ("1048576kB", 0)):
        folder = bare / "huge" / f"hugepages-{size}"
        folder.mkdir(parents=True)
        (folder / "free_hugepages").write_text(f"{free}\n")
    (finding,) = doctor._hugepages(place)
    assert finding.state == WARN and "vm.nr_hugepages" in finding.cure
    (bare / "huge/hugepages-2048kB/free_hugepages").write_text("12\n")
    (finding,) = doctor._hugepages(place)
    assert finding.state == OK and finding.facts == {"2048kB": 12, "1048576kB": 0}


def test_backends(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bare / "lib/virtiofsd", b"using FUSE kernel interface")
    program(bare / "bin/qemu-storage-daemon")
    program(bare / "opt/gpu")
    (bare / "share").mkdir()
    for kind in ("gpu", "input"):
        text = json.dumps({"type": kind, "binary": str(bare / "opt" / kind)})
        (bare / "share" / f"50-{kind}.json").write_text(text)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    states = {finding.name: finding.state for finding in doctor._backends(Host())}
    assert states == {
        "virtiofsd": FAIL,
        "qemu-storage-daemon": OK,
        "backend gpu": OK,
        "backend input": WARN,
    }
    program(bare / "bin/virtiofsd", b"in Rust")
    assert next(doctor._backends(Host())).facts == {"kind": "rust"}


def test_the_c_virtiofsd_where_mounts_cannot_be_made_read_only(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = pytest.importorskip("pyvmm._native.process", reason="no compiled core", exc_type=ImportError)

    def refuse() -> None:
        raise OSError(1, "a mount namespace: Operation not permitted")

    program(bare / "lib/virtiofsd", b"using FUSE kernel interface")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(process, "read_only_mounts", refuse)
    finding = next(doctor._virtiofsd())
    assert finding.state == FAIL and "CAP_SYS_ADMIN" in finding.text and finding.cure


def test_kernels(bare: Path) -> None:
    install_kernel(bare, "fuse")
    (finding,) = doctor._kernels(Host())
    assert finding.state == OK and f"debian {RELEASE}" in finding.text
    assert finding.facts["kernels"][0]["release"] == RELEASE
    assert [finding.state for finding in doctor._lab(Host())] == [FAIL, FAIL]


def test_the_lab_needs_a_kernel_that_has_kvm(bare: Path) -> None:
    install_kernel(bare, "kvm_amd")
    assert list(doctor._lab(Host()))[1].state == OK
    (bare / "cache/pyvmm/kernels/debian" / RELEASE / "lib/modules" / RELEASE / "kernel/kvm_amd.ko").unlink()
    assert list(doctor._lab(Host()))[1].state == FAIL


def test_a_cache_that_cannot_be_written(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(bare / "file"))
    (finding,) = doctor._init(Host())
    assert (finding.state, finding.cure) == (FAIL, "set XDG_CACHE_HOME to a writable directory")
    assert "Not a directory" in finding.text and finding.cure not in finding.text


@pytest.mark.parametrize("ways", [("lab",), ()])
def test_the_command(
    ways: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = (Finding("a", OK, "fine"), Finding("bcd", FAIL, "gone", "buy one", {"n": 1}))
    monkeypatch.setattr(doctor, "examine", lambda: Report(findings, ways))
    status = 0 if ways else 1
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().out == "ok    a    fine\nfail  bcd  gone -> buy one\n"
    assert cli.main(["doctor", "--json"]) == status
    value = json.loads(capsys.readouterr().out)
    assert (value["works"], value["ways"]) == (bool(ways), list(ways))
    assert value["findings"][1] == {
        "name": "bcd", "state": "fail", "text": "gone", "cure": "buy one", "facts": {"n": 1},
    }  # fmt: skip
    assert cli.main(["doctor", "--yaml"]) == 2
