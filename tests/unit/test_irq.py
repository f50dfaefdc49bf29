"""The GSI table: whole commits, shared lines, refusals."""

from __future__ import annotations

import errno
import os

import pytest
from fakes.devices import FakeVm

from pyvmm import layout
from pyvmm.irq import MAX_ROUTES, InterruptRouter, default_routes


@pytest.fixture
def vm():
    return FakeVm()


@pytest.fixture
def router(vm):
    return InterruptRouter(vm)


def test_pins_stay_in_every_commit(vm, router):
    gsi = router.allocate_gsi()
    assert gsi == layout.GSI_COUNT
    router.set_msi(gsi, 0x1_FEE0_1000, 0x4021)
    assert vm.routes == [*default_routes(), (gsi, 2, 0xFEE0_1000, 1, 0x4021)]
    assert {route[3] for route in default_routes() if route[2] == 2} == set(range(24))
    assert (8, 1, 1, 0, 0) in default_routes()


def test_unchanged_routes_cost_nothing(vm, router):
    gsi = router.allocate_gsi()
    router.set_msi(gsi, 0xFEE0_0000, 1)
    router.set_msi(gsi, 0xFEE0_0000, 1)
    assert vm.log == ["routing"]
    router.clear(gsi)
    router.clear(gsi)
    assert vm.log == ["routing"] * 2
    assert vm.routes == default_routes()


def test_refused_routes_are_not_kept(vm, router):
    first, second = router.allocate_gsi(), router.allocate_gsi()
    router.set_msi(first, 0xFEE0_0000, 1)
    vm.refuse.add("routing")
    for gsi, data in ((first, 9), (second, 2)):
        with pytest.raises(OSError, match="fake"):
            router.set_msi(gsi, 0xFEE0_0000, data)
    vm.refuse.clear()
    third = router.allocate_gsi()
    router.set_msi(third, 0xFEE0_0000, 3)
    assert [(route[0], route[4]) for route in vm.routes if route[1] == 2] == [(first, 1), (third, 3)]


def test_gsis_are_used_again_and_end(router):
    gsi = router.allocate_gsi()
    router.free_gsi(gsi)
    assert router.allocate_gsi() == gsi
    with pytest.raises(OSError, match="interrupt routes") as failure:
        for _ in range(MAX_ROUTES):
            router.allocate_gsi()
    assert failure.value.errno == errno.ENOSPC


def test_irqfds(vm, router):
    gsi = router.allocate_gsi()
    router.set_msi(gsi, 0xFEE0_0000, 5)
    fd = os.eventfd(0)
    router.assign(fd, gsi)
    assert vm.message(fd) == (0xFEE0_0000, 5)
    router.deassign(fd, gsi)
    assert vm.message(fd) is None
    os.close(fd)


def test_shared_lines_are_ored(vm, router):
    first, second = router.line(16), router.line(16)
    first.set(True)
    second.set(True)
    first.set(False)
    assert vm.lines[16] == 1
    second.set(False)
    second.set(False)
    assert vm.log == ["line 16=1", "line 16=0"]
