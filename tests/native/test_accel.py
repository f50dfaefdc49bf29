"""The choice between KVM and the lab: measured where there is KVM, explained where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyvmm._native.kvm", reason="the compiled core is not built")

from pyvmm.host import accel


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(accel.LAB_MARK, raising=False)
    return tmp_path / "pyvmm" / "accel"


@pytest.mark.parametrize(
    ("path", "reason"), [("/nowhere/kvm", "there is no such device"), ("/dev/null", "it is not KVM's device")]
)
def test_a_host_without_kvm_gets_a_reason(path: str, reason: str) -> None:
    assert f"{path}: {reason}" in accel.why_not(path)


def test_in_the_lab_nothing_needs_to_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(accel.LAB_MARK, "1")
    assert accel.why_not("/nowhere/kvm") == ""


@pytest.mark.usefixtures("need_kvm")
def test_what_is_measured_is_remembered(cache: Path) -> None:
    rates = accel.measure()
    assert rates.ring3 > 0 and rates.native == (rates.ring0 > 2_000_000)
    assert not cache.exists()
    native = accel.runs_kernels()
    (entry,) = cache.iterdir()
    assert entry.read_text() == ("native" if native else "emulated")
    entry.write_text("emulated" if native else "native")
    assert accel.runs_kernels() is not native
