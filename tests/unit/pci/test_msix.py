"""MSI-X: which vector is live when, what gathers meanwhile, and KVM's refusals."""

from __future__ import annotations

import os

import pytest
from fakes.devices import FakeVm

from pyvmm import layout
from pyvmm.irq import InterruptRouter
from pyvmm.pci.msix import ENABLE, FUNCTION_MASK, MsixTable, drain

ADDRESS = 0xFEE0_1000
MASK_WORD = 12


@pytest.fixture
def vm():
    return FakeVm()


@pytest.fixture
def table(vm, request):
    table = MsixTable(InterruptRouter(vm), 70, request.node.name)
    yield table
    table.close()
    assert not vm.irqfds
    assert all(route[1] == 1 for route in vm.routes)


def fill(table: MsixTable, vector: int, data: int, masked: bool = False) -> None:
    for offset, value in ((0, ADDRESS), (4, 0), (8, data), (MASK_WORD, int(masked))):
        table.write(16 * vector + offset, 4, value)


def test_nothing_before_enable(vm, table):
    fill(table, 3, 0x55)
    assert vm.log == []
    table.set_control(ENABLE)
    assert vm.message(table.fd(3)) == (ADDRESS, 0x55)
    assert [*vm.irqfds] == [table.fd(3)]  # the others are masked, as after a reset


def test_route_before_irqfd_and_irqfd_gone_before_route(vm, table):
    table.set_control(ENABLE)
    fill(table, 0, 1)
    gsi = layout.GSI_COUNT
    assert vm.log == ["routing", f"assign {gsi}"]
    vm.log.clear()
    table.set_control(0)
    assert vm.log == [f"deassign {gsi}", "routing"]


def test_masks(vm, table):
    table.set_control(ENABLE)
    fill(table, 0, 1)
    fill(table, 1, 2)
    table.write(MASK_WORD, 4, 1)
    assert [*vm.irqfds] == [table.fd(1)]
    table.set_control(ENABLE | FUNCTION_MASK)
    assert not vm.irqfds
    table.write(MASK_WORD, 4, 0)
    assert not vm.irqfds
    table.set_control(ENABLE)
    assert {*vm.irqfds} == {table.fd(0), table.fd(1)}
    assert sum(entry == "routing" for entry in vm.log) == 2  # masks come and go without new routes


def test_message_changes_while_live(vm, table):
    table.set_control(ENABLE)
    fill(table, 0, 1)
    table.write(8, 4, 2)
    assert vm.message(table.fd(0)) == (ADDRESS, 2)
    table.write(0, 8, 7 << 32 | ADDRESS)
    assert vm.message(table.fd(0)) == (7 << 32 | ADDRESS, 2)


def test_pending_is_the_counter(vm, table):
    table.set_control(ENABLE)
    for vector in (0, 33, 69):
        fill(table, vector, vector, masked=True)
    table.trigger(33)
    os.eventfd_write(table.fd(69), 5)
    assert table.pending.read(0, 8) == 1 << 33
    assert table.pending.read(4, 4) == 1 << 1
    assert table.pending.read(8, 4) == 1 << 5
    assert table.pending.read(0x800, 8) == 0
    table.pending.write(0, 8, 0)
    assert table.pending.read(0, 8) == 1 << 33
    table.write(16 * 33 + MASK_WORD, 4, 0)
    assert drain(table.fd(33))  # signalled again, for KVM to take
    table.write(16 * 33 + MASK_WORD, 4, 1)
    table.write(16 * 33 + MASK_WORD, 4, 0)
    assert not drain(table.fd(33))  # and not a second time


def test_drain(table):
    table.trigger(0)
    table.trigger(1)
    table.drain([1])
    assert table.pending.read(0, 4) == 1


def test_reads_back(table):
    fill(table, 5, 0x77)
    table.write(16 * 5 + MASK_WORD, 4, 0xFFFF_FFFF)
    assert [table.read(80 + 4 * word, 4) for word in range(4)] == [ADDRESS, 0, 0x77, 1]
    assert table.read(80, 8) == ADDRESS
    assert table.read(88, 8) == 1 << 32 | 0x77
    assert table.read(12, 4) == 1  # a fresh vector is masked


@pytest.mark.parametrize(("offset", "width"), [(0, 1), (2, 2), (4, 8), (6, 4), (70 * 16, 4), (0x1FF8, 8)])
def test_bad_accesses(table, offset, width):
    before = [table.read(4 * word, 4) for word in range(280)]
    table.write(offset, width, 0)
    assert table.read(offset, width) == 0
    assert [table.read(4 * word, 4) for word in range(280)] == before


@pytest.mark.parametrize("what", ["routing", "irqfd"])
def test_refusals_cost_interrupts_only(vm, table, what, capfd):
    vm.refuse.add(what)
    table.set_control(ENABLE)
    fill(table, 0, 1)
    table.trigger(0)
    assert "KVM refused" in capfd.readouterr().err
    assert not vm.irqfds
    table.write(MASK_WORD, 4, 1)
    vm.refuse.clear()
    table.write(MASK_WORD, 4, 0)
    assert vm.message(table.fd(0)) == (ADDRESS, 1)
    assert drain(table.fd(0))


def test_a_refusal_to_forget_a_route_costs_nothing(vm, table, capfd):
    table.set_control(ENABLE)
    fill(table, 0, 1)
    vm.refuse.add("routing")
    table.set_control(0)
    assert "KVM refused" in capfd.readouterr().err
    vm.refuse.clear()
    table.set_control(ENABLE)
    assert vm.message(table.fd(0)) == (ADDRESS, 1)
    assert vm.irqfds == {table.fd(0): layout.GSI_COUNT}  # the number is not lost


@pytest.mark.parametrize("count", [0, 2049])
def test_bad_counts(vm, count):
    with pytest.raises(ValueError, match="1 to 2048"):
        MsixTable(InterruptRouter(vm), count, "x")


def test_capability(table):
    assert table.capability(4, 0x2000, 0x3000) == bytes.fromhex("4500 04200000 04300000")
