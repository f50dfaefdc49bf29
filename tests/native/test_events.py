"""Doorbells and interrupts that never come through user space: ioeventfd, irqfd, routes."""

from __future__ import annotations

import os
import struct
import threading
import time

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.tiny_guest import DATA, LAPIC, LAPIC_EOI, MMIO, VECTOR, Code, Recorder

from pyvmm._native import kvm
from pyvmm._native import vcpu as native
from pyvmm.errors import KvmError

pytestmark = pytest.mark.kvm
GSI = 24
DOORBELL = MMIO + 0x3004


def drain(fd):
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def route(vm, gsi=GSI, vector=VECTOR):
    vm.set_gsi_routing([(gsi, kvm.KVM_IRQ_ROUTING_MSI, LAPIC, 0, vector)])


class Counting:
    """A guest that waits with interrupts on and counts those of `VECTOR` at `DATA`."""

    def __init__(self, guest):
        self.guest = guest
        self.recorder = Recorder()
        wait = Code.STI + Code.SPIN
        handler = Code.COUNT_RSI + Code.EOI + Code.IRETQ
        self.vcpu = guest.interrupt_vcpu(wait, handler, rsi=DATA, rdi=LAPIC + LAPIC_EOI)
        self.ended = []

    def _main(self):
        self.ended.append(self.vcpu.run(self.recorder))

    def __enter__(self):
        self.thread = threading.Thread(target=self._main, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.vcpu.kick()
        self.thread.join(30)

    @property
    def count(self):
        return struct.unpack("<I", self.guest.read(DATA, 4))[0]

    def reaches(self, wanted, seconds=10.0):
        deadline = time.monotonic() + seconds
        while self.count != wanted and time.monotonic() < deadline:
            time.sleep(0.001)
        return self.count == wanted

    def stays(self, wanted, seconds=0.1):
        time.sleep(seconds)
        return self.count == wanted


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_ioeventfd_fires_for_any_width_without_an_exit(guest, eventfd, width):
    bell = eventfd()
    guest.vm.ioeventfd(bell, DOORBELL)
    vcpu = guest.vcpu(Code.repeat(Code.store(width)) + Code.HLT, rbx=DOORBELL, rax=width, rcx=5)
    recorder = Recorder()
    assert vcpu.run(recorder)[0] == native.KVM_EXIT_HLT
    assert recorder.seen == []
    assert drain(bell) == 5


def test_ioeventfd_leaves_reads_and_neighbours_to_user_space(guest, eventfd):
    bell = eventfd()
    guest.vm.ioeventfd(bell, DOORBELL)
    vcpu = guest.vcpu(Code.load(4) + bytes.fromhex("894304") + Code.HLT, rbx=DOORBELL)  # mov [rbx+4], eax
    recorder = Recorder([9])
    vcpu.run(recorder)
    assert recorder.seen == [("read", DOORBELL, 4), ("write", DOORBELL + 4, 4, 9)]
    assert drain(bell) == 0


def test_deassigned_ioeventfd_is_an_access_again(guest, eventfd):
    bell = eventfd()
    guest.vm.ioeventfd(bell, DOORBELL)
    guest.vm.ioeventfd(bell, DOORBELL, assign=False)
    vcpu = guest.vcpu(Code.store(2) + Code.HLT, rbx=DOORBELL, rax=3)
    recorder = Recorder()
    vcpu.run(recorder)
    assert recorder.seen == [("write", DOORBELL, 2, 3)]
    assert drain(bell) == 0


def test_ioeventfd_with_datamatch_takes_that_value_only(guest, eventfd):
    bell = eventfd()
    guest.vm.ioeventfd(bell, DOORBELL, length=2, datamatch=7)
    vcpu = guest.vcpu(Code.store(2) + b"\xff\xc0" + Code.store(2) + Code.HLT, rbx=DOORBELL, rax=7)
    recorder = Recorder()
    vcpu.run(recorder)
    assert recorder.seen == [("write", DOORBELL, 2, 8)]
    assert drain(bell) == 1


def test_ioeventfd_on_a_port(guest, eventfd):
    bell = eventfd()
    guest.vm.ioeventfd(bell, 0x600, length=1, pio=True)
    vcpu = guest.vcpu(Code.out(1) + Code.HLT, rdx=0x600)
    recorder = Recorder()
    vcpu.run(recorder)
    assert (recorder.seen, drain(bell)) == ([], 1)


def test_second_ioeventfd_at_an_address_is_refused_in_words(guest, eventfd):
    guest.vm.ioeventfd(eventfd(), DOORBELL)
    with pytest.raises(KvmError, match="KVM_IOEVENTFD: File exists; another eventfd"):
        guest.vm.ioeventfd(eventfd(), DOORBELL)


def test_irqfd_reaches_the_guests_handler(irq_guest, eventfd):
    call = eventfd()
    route(irq_guest.vm)
    irq_guest.vm.irqfd(call, GSI)
    with Counting(irq_guest) as counting:
        for wanted in range(1, 11):
            os.eventfd_write(call, 1)
            assert counting.reaches(wanted)
    assert counting.recorder.seen == []
    assert counting.ended == [(native.KVM_EXIT_INTR, {})]


def test_deassigned_irqfd_keeps_the_event_and_assigning_injects_it(irq_guest, eventfd):
    call = eventfd()
    route(irq_guest.vm)
    irq_guest.vm.irqfd(call, GSI)
    with Counting(irq_guest) as counting:
        irq_guest.vm.irqfd(call, GSI, assign=False)
        os.eventfd_write(call, 1)
        os.eventfd_write(call, 1)
        assert counting.stays(0)
        assert drain(call) == 2  # what the pending bit is read from
        os.eventfd_write(call, 2)
        irq_guest.vm.irqfd(call, GSI)
        assert counting.reaches(1)
        assert counting.stays(1)


def test_event_is_not_injected_twice_by_masking_again(irq_guest, eventfd):
    call = eventfd()
    route(irq_guest.vm)
    with Counting(irq_guest) as counting:
        os.eventfd_write(call, 1)
        for _ in range(3):
            irq_guest.vm.irqfd(call, GSI)
            assert counting.reaches(1)
            irq_guest.vm.irqfd(call, GSI, assign=False)
            assert drain(call) == 0
        assert counting.stays(1)


def test_assigned_irqfd_follows_a_changed_route(irq_guest, eventfd):
    call = eventfd()
    irq_guest.vm.set_gsi_routing([])
    irq_guest.vm.irqfd(call, GSI)
    with Counting(irq_guest) as counting:
        os.eventfd_write(call, 1)
        assert counting.stays(0)
        route(irq_guest.vm)
        os.eventfd_write(call, 1)
        assert counting.reaches(1)


def test_doorbell_to_backend_thread_to_interrupt_without_an_exit(irq_guest):
    kick, call = os.eventfd(0, os.EFD_CLOEXEC), os.eventfd(0, os.EFD_CLOEXEC)
    irq_guest.vm.ioeventfd(kick, DOORBELL)
    route(irq_guest.vm)
    irq_guest.vm.irqfd(call, GSI)
    rounds = 50

    def backend():
        for _ in range(rounds):
            os.eventfd_read(kick)
            os.eventfd_write(call, 1)

    # The guest rings, waits for its handler to change [rsi], and rings again.
    handler = Code.COUNT_RSI + Code.EOI + Code.IRETQ
    wait = bytes.fromhex("8b06 8903 3b06 74fc")  # mov eax,[rsi]; mov [rbx],eax; cmp eax,[rsi]; je -4
    done = bytes.fromhex("894308")  # mov [rbx+8], eax
    code = Code.STI + Code.repeat(wait) + done + Code.SPIN
    vcpu = irq_guest.interrupt_vcpu(code, handler, rsi=DATA, rdi=LAPIC + LAPIC_EOI, rbx=DOORBELL, rcx=rounds)
    recorder = Recorder()
    recorder.on_access = lambda *_: vcpu.kick()
    thread = threading.Thread(target=backend, daemon=True)
    thread.start()
    try:
        assert vcpu.run(recorder)[0] == native.KVM_EXIT_INTR
    finally:
        thread.join(30)
        os.close(kick)
        os.close(call)
    assert recorder.seen == [("write", DOORBELL + 8, 4, rounds - 1)]
    assert irq_guest.read(DATA, 4) == struct.pack("<I", rounds)


def test_signal_msi_and_irq_line_deliver_at_once(irq_guest):
    route(irq_guest.vm)
    with Counting(irq_guest) as counting:
        assert irq_guest.vm.signal_msi(LAPIC, VECTOR)
        assert counting.reaches(1)
        irq_guest.vm.irq_line(GSI, True)
        assert counting.reaches(2)
        irq_guest.vm.irq_line(GSI, False)
        assert counting.stays(2)


def test_irqfd_needs_an_irqchip(guest, eventfd):
    with pytest.raises(KvmError, match="KVM_IRQFD: .*; it needs an in-kernel irqchip"):
        guest.vm.irqfd(eventfd(), GSI)


def test_bad_route_is_refused(irq_guest):
    with pytest.raises(KvmError, match="KVM_SET_GSI_ROUTING"):
        irq_guest.vm.set_gsi_routing([(GSI, 77, 0, 0, 0)])
