"""What a guest's loads, stores and port accesses look like to the handler of `Vcpu.run`."""

from __future__ import annotations

import struct

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.tiny_guest import DATA, MMIO, Code, Recorder

from pyvmm._native import vcpu as native

pytestmark = pytest.mark.kvm
RAX = 0x8877_6655_4433_2211


def cut(value, width):
    return value & ((1 << 8 * width) - 1)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_mmio_write_carries_address_width_and_value(guest, width):
    vcpu = guest.vcpu(Code.store(width) + Code.HLT, rbx=MMIO + 0x10, rax=RAX)
    recorder = Recorder()
    assert vcpu.run(recorder) == (native.KVM_EXIT_HLT, {})
    assert recorder.seen == [("write", MMIO + 0x10, width, cut(RAX, width))]


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("answer", [0x1122_3344_5566_7788, -1, 1 << 80 | 5])
def test_mmio_read_takes_the_answer_cut_to_the_width(guest, width, answer):
    vcpu = guest.vcpu(Code.load(width) + Code.HLT, rbx=MMIO, rax=RAX)
    recorder = Recorder([answer])
    vcpu.run(recorder)
    assert recorder.seen == [("read", MMIO, width)]
    # A 32-bit load clears the upper half; narrower ones leave the rest alone.
    kept = 0 if width >= 4 else RAX >> 8 * width << 8 * width
    assert vcpu.get_regs()["rax"] == kept | cut(answer, width)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_port_accesses(guest, width):
    code = Code.out(width) + Code.inp(width) + Code.HLT
    vcpu = guest.vcpu(code, rdx=0x3F8, rax=0x4433_2211)
    recorder = Recorder([0x99AA_BBCC])
    assert vcpu.run(recorder)[0] == native.KVM_EXIT_HLT
    assert recorder.seen == [("out", 0x3F8, width, cut(0x4433_2211, width)), ("in", 0x3F8, width)]
    assert cut(vcpu.get_regs()["rax"], width) == cut(0x99AA_BBCC, width)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_string_output_gives_every_element_in_order(guest, width):
    values = [cut(0x0102_0304 * i, width) for i in range(1, 8)]
    guest.write(DATA, b"".join(value.to_bytes(width, "little") for value in values))
    vcpu = guest.vcpu(Code.outs(width) + Code.HLT, rdx=0x510, rsi=DATA, rcx=len(values))
    recorder = Recorder()
    assert vcpu.run(recorder)[0] == native.KVM_EXIT_HLT
    assert recorder.seen == [("out", 0x510, width, value) for value in values]


@pytest.mark.parametrize("width", [1, 2, 4])
def test_string_input_stores_every_answer_in_order(guest, width):
    answers = [cut(0x0708_090A + i * 0x0101_0101, width) for i in range(7)]
    vcpu = guest.vcpu(Code.ins(width) + Code.HLT, rdx=0x511, rdi=DATA, rcx=len(answers))
    recorder = Recorder(answers)
    assert vcpu.run(recorder)[0] == native.KVM_EXIT_HLT
    # KVM may read ahead of the instruction up to its buffer, never more than was asked for.
    assert recorder.seen == [("in", 0x511, width)] * len(answers)
    stored = guest.read(DATA, len(answers) * width)
    assert stored == b"".join(answer.to_bytes(width, "little") for answer in answers)


def test_page_crossing_store_arrives_complete(guest):
    vcpu = guest.vcpu(Code.store(8) + Code.HLT, rbx=MMIO + 0xFFC, rax=RAX)
    recorder = Recorder()
    vcpu.run(recorder)
    data = {}
    for _, address, width, value in recorder.seen:
        data.update(enumerate(value.to_bytes(width, "little"), address))
    assert bytes(data[MMIO + 0xFFC + i] for i in range(8)) == struct.pack("<Q", RAX)


def test_handler_exception_ends_the_run_and_the_access_counts_as_done(guest):
    vcpu = guest.vcpu(Code.store(4) + Code.store(2) + Code.HLT, rbx=MMIO, rax=RAX)
    recorder = Recorder()

    def fail(*access):
        recorder.on_access = None
        raise LookupError(access)

    recorder.on_access = fail
    with pytest.raises(LookupError):
        vcpu.run(recorder)
    assert vcpu.run(recorder)[0] == native.KVM_EXIT_HLT
    assert [access[2] for access in recorder.seen] == [4, 2]


def test_answer_that_is_no_integer_is_an_error_of_the_handler(guest):
    vcpu = guest.vcpu(Code.load(4) + Code.HLT, rbx=MMIO)
    with pytest.raises(TypeError):
        vcpu.run(Recorder(["seven"]))


def test_handler_without_all_methods_is_refused_before_the_guest_runs(guest):
    vcpu = guest.vcpu(Code.HLT)
    with pytest.raises(AttributeError):
        vcpu.run(object())
    assert vcpu.run(Recorder())[0] == native.KVM_EXIT_HLT


def test_read_only_slot_is_read_directly_and_written_by_exit(guest):
    guest.vm.set_memory_region(1, MMIO, 0x1000, guest.ram.address + DATA, readonly=True)
    guest.write(DATA, struct.pack("<I", 0xCAFE))
    vcpu = guest.vcpu(Code.load(4) + Code.store(4) + Code.HLT, rbx=MMIO)
    recorder = Recorder()
    assert vcpu.run(recorder)[0] == native.KVM_EXIT_HLT
    assert recorder.seen == [("write", MMIO, 4, 0xCAFE)]


def test_removed_slot_is_an_access_again(guest):
    guest.vm.set_memory_region(1, MMIO, 0x1000, guest.ram.address + DATA)
    guest.vm.set_memory_region(1, MMIO, 0, 0)
    vcpu = guest.vcpu(Code.store(1) + Code.HLT, rbx=MMIO, rax=7)
    recorder = Recorder()
    vcpu.run(recorder)
    assert recorder.seen == [("write", MMIO, 1, 7)]
