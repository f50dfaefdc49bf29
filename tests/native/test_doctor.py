"""`pyvmm doctor` on the real host: what it says of KVM is what KVM says."""

from __future__ import annotations

import pytest

pytest.importorskip("pyvmm._native.kvm", reason="the compiled core is not built")

from pyvmm._native import kvm as native
from pyvmm.host import accel, doctor


@pytest.mark.usefixtures("need_kvm")
def test_what_kvm_can_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = {finding.name: finding for finding in doctor._kvm(doctor.Host())}
    assert found["kvm"].state == doctor.OK
    assert set(found) == {"kvm", "ring 0", *doctor.NEEDED, *doctor.LIMITS, *doctor.OPTIONAL}
    kvm = native.Kvm()
    try:
        assert found["memslots"].facts["count"] == kvm.check_extension(native.KVM_CAP_NR_MEMSLOTS) > 0
    finally:
        kvm.close()
    assert found["ring 0"].facts["native"] is accel.runs_kernels()
    assert (found["ring 0"].state == doctor.OK) is accel.runs_kernels()


class Poor:
    """A KVM that lacks one capability, and has everything else."""

    def __init__(self, lacking):
        self.lacking = lacking

    def check_extension(self, capability):
        return int(capability != self.lacking)


@pytest.mark.parametrize("name", [*doctor.NEEDED, *doctor.OPTIONAL])
def test_a_missing_capability(name):
    capability = {**doctor.NEEDED, **doctor.OPTIONAL}[name]
    found = {finding.name: finding for finding in doctor._capabilities(Poor(getattr(native, capability)))}
    bad = [finding for finding in found.values() if finding.state != doctor.OK]
    assert [finding.name for finding in bad] == [name]
    assert capability in bad[0].text and bad[0].cure
    assert bad[0].state == (doctor.FAIL if name in doctor.NEEDED else doctor.WARN)
