"""Finding backends and the words for their command lines; nothing is started here."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from fakes.backend import no_new_fds

from pyvmm.config import DiskDevice, FsDevice
from pyvmm.errors import ConfigError
from pyvmm.host import backends, handover


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host with nothing installed; `tmp_path/bin` is all of PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(backends, "LIBRARY_DIRS", (str(tmp_path / "lib"),))
    monkeypatch.setattr(backends, "DESCRIPTION_DIRS", (str(tmp_path / "etc"), str(tmp_path / "share")))
    return tmp_path


def program(path: Path, content: bytes = b"#!/bin/sh\n") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o755)
    return str(path)


def describe(folder: Path, name: str, **fields: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(fields))


def test_programs_are_found_in_order(bare: Path) -> None:
    assert backends.find_program("x") is None
    in_lib = program(bare / "lib/x")
    assert backends.find_program("x") == in_lib
    in_cargo = program(bare / "home/.cargo/bin/x")
    assert backends.find_program("x") == in_cargo
    in_path = program(bare / "bin/x")
    assert backends.find_program("x") == in_path
    os.chmod(in_path, 0o644)
    assert backends.find_program("x") == in_cargo
    (bare / "bin/y").mkdir()
    assert backends.find_program("y") is None


def test_descriptions(bare: Path, capfd: pytest.CaptureFixture[str]) -> None:
    describe(bare / "share", "50-a.json", type="fs", binary="/shared", description="A")
    describe(bare / "share", "60-b.json", type="gpu", binary="/gpu")
    describe(bare / "etc", "50-a.json", type="fs", binary="/mine")
    describe(bare / "share", "70-c.json", type="gpu")
    (bare / "share/80-d.json").write_text("{")
    (bare / "share/90-e.json").write_text("[]")
    (bare / "share/README").write_text("no description")
    found = backends.descriptions()
    assert [(entry.type, entry.binary) for entry in found] == [("fs", "/mine"), ("gpu", "/gpu")]
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == 3 and all("no usable backend description" in line for line in errors)
    describe(bare / "home/.config/qemu/vhost-user", "50-a.json", type="fs", binary="/own")
    assert backends.descriptions()[0].binary == "/own"


def test_virtiofsd_that_only_announces_itself(bare: Path) -> None:
    binary = program(bare / "opt/virtiofsd")
    describe(bare / "share", "50-a.json", type="fs", binary="/gone")
    describe(bare / "share", "60-b.json", type="fs", binary=binary)
    assert backends.find_virtiofsd() == binary


def test_the_two_virtiofsd_are_told_apart(bare: Path) -> None:
    assert backends.is_c_virtiofsd(program(bare / "c", b"\x7fELF..using FUSE kernel interface version %i.%i"))
    assert not backends.is_c_virtiofsd(program(bare / "rust", b"\x7fELF..--shared-dir"))


def test_nothing_installed(bare: Path) -> None:
    (bare / "disk").write_bytes(bytes(512))
    with pytest.raises(ConfigError, match="no virtiofsd found; apt install"):
        backends.start_virtiofsd(FsDevice("t", str(bare)))
    with pytest.raises(ConfigError, match="no qemu-storage-daemon found; apt install"):
        backends.start_disk(DiskDevice(str(bare / "disk")))


def test_c_virtiofsd_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    arguments = backends.c_virtiofsd_arguments(FsDevice("t", "x", cache="always"), "/a,b\\c", 9)
    assert arguments == [
        *("--fd=9", "-f", "-o", "log_level=err"),
        *("-o", "source=/a\\,b\\\\c", "-o", "sandbox=chroot", "-o", "cache=always"),
    ]
    assert backends.c_virtiofsd_arguments(FsDevice("t", "x", cache="never"), "/", 9)[-1] == "cache=none"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match="needs root"):
        backends.c_virtiofsd_arguments(FsDevice("t", "x"), "/", 9)


@pytest.mark.parametrize(
    ("uid", "namespaces", "sandbox"), [(0, False, "chroot"), (1000, True, "namespace"), (1000, False, "none")]
)
def test_rust_virtiofsd_arguments(
    monkeypatch: pytest.MonkeyPatch, uid: int, namespaces: bool, sandbox: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(backends, "_user_namespaces", lambda: namespaces)
    arguments = backends.rust_virtiofsd_arguments(FsDevice("t", "x"), "/a,b", 9)
    assert arguments == ["--fd=9", "--log-level=error", "--shared-dir=/a,b", f"--sandbox={sandbox}"]
    device = FsDevice("t", "x", readonly=True, cache="never")
    assert backends.rust_virtiofsd_arguments(device, "/", 9)[4:] == ["--cache=never", "--readonly"]


def test_storage_daemon_arguments(tmp_path: Path) -> None:
    (tmp_path / "a,b").write_bytes(b"")
    path = str(tmp_path / "a,b")
    arguments = backends.storage_daemon_arguments(DiskDevice(path, num_queues=4), path, "qcow2", 9)
    doubled = path.replace(",", ",,")
    rules = "read-only=off,cache.direct=off,discard=unmap"
    assert arguments == [
        *("--blockdev", f"driver=file,node-name=file,filename={doubled},{rules}"),
        *("--blockdev", f"driver=qcow2,node-name=image,file=file,{rules}"),
        "--export",
        "type=vhost-user-blk,id=disk,node-name=image,writable=on,num-queues=4,addr.type=fd,addr.str=9",
    ]
    readonly = backends.storage_daemon_arguments(DiskDevice(path, True, True), path, "raw", 9)
    assert "read-only=on,cache.direct=on" in readonly[1] and "writable=off" in readonly[5]


def qcow2(version: int = 3, backing: int = 0, incompatible: int = 0) -> bytes:
    header = bytearray(112)
    struct.pack_into(">4sIQ", header, 0, b"QFI\xfb", version, backing)
    struct.pack_into(">Q", header, 72, incompatible)
    return bytes(header)


@pytest.mark.parametrize(
    ("head", "image_type", "expected"),
    [
        (bytes(512), "", "raw"),
        (b"\x55\xaa", "", "raw"),
        (qcow2(), "", "qcow2"),
        (qcow2(), "raw", "raw"),
        (qcow2(backing=512), "qcow2", "qcow2"),
        (qcow2(version=2, incompatible=4), "", "qcow2"),
        (qcow2(backing=512), "", None),
        (qcow2(incompatible=4), "", None),
    ],
)
def test_image_format(tmp_path: Path, head: bytes, image_type: str, expected: str | None) -> None:
    (tmp_path / "disk").write_bytes(head)
    device = DiskDevice(str(tmp_path / "disk"), image_type=image_type)
    with no_new_fds():
        image = backends.open_image(device)
        if expected is None:
            with pytest.raises(ConfigError, match="refers to another file; add image_type=qcow2"):
                backends.image_format(device, image)
        else:
            assert backends.image_format(device, image) == expected
        os.close(image)


def test_an_image_is_locked(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(512))
    path = str(tmp_path / "disk")
    with no_new_fds():
        writer = backends.open_image(DiskDevice(path))
        with pytest.raises(ConfigError, match="another machine uses it"):
            backends.open_image(DiskDevice(path, readonly=True))
        os.close(writer)
        readers = [backends.open_image(DiskDevice(path, readonly=True)) for _ in range(2)]
        with pytest.raises(ConfigError, match="another machine uses it"):
            backends.open_image(DiskDevice(path))
        for reader in readers:
            os.close(reader)


def test_listener_is_connected_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with no_new_fds():
        listener, connection = handover.connected_listener()
        assert os.listdir(tmp_path) == []
        assert not os.get_inheritable(listener.fileno())
        fd, _ = listener._accept()  # type: ignore[attr-defined]
        connection.send(b"hello")
        assert os.read(fd, 5) == b"hello"
        os.close(fd)
        listener.close()
        connection.close()


def test_unwritable_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/nowhere")
    for end in handover.connected_listener():
        end.close()
    monkeypatch.setattr(os, "mkdir", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(ConfigError, match="Read-only file system; set XDG_RUNTIME_DIR"):
        handover.connected_listener()
