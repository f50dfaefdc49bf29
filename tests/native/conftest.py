"""The native tests' guests; skipped, with the reason, where there is no KVM."""

from __future__ import annotations

import os
import time

import pytest
from fakes.program import children, describe, end_children, reap_orphans

PATIENCE = 5.0  # seconds for a process to end that is about to


def _why_no_kvm():
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    return ""


@pytest.fixture(scope="session")
def need_kvm():
    reason = _why_no_kvm()
    if reason:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def no_child_is_left():
    """A test that leaves a process fails itself, and not the next one that counts them."""
    before = children()
    yield
    due = time.monotonic() + PATIENCE
    while (left := children() - before) and time.monotonic() < due:
        time.sleep(0.02)
    names = [describe(pid) for pid in left]
    while left:
        end_children(left)
        left = children() - before
    reap_orphans(False)
    assert not names, f"left behind: {names}"


@pytest.fixture
def guest(need_kvm):
    """A tiny guest without an in-kernel irqchip: HLT comes out."""
    from fakes.tiny_guest import TinyGuest

    with TinyGuest() as guest:
        yield guest


@pytest.fixture
def irq_guest(need_kvm):
    """A tiny guest with an in-kernel irqchip."""
    from fakes.tiny_guest import TinyGuest

    with TinyGuest(irqchip=True) as guest:
        yield guest


@pytest.fixture
def eventfd():
    """Makes non-blocking eventfds and closes them after the test."""
    made = []

    def make(value=0):
        made.append(os.eventfd(value, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)
