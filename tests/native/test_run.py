"""The ends of `Vcpu.run`: kicks, halts, crashes, many threads, misuse."""

from __future__ import annotations

import os
import signal
import struct
import threading
import time

import pytest

pytest.importorskip("pyvmm._native", reason="the compiled core is not built")

from fakes.tiny_guest import CODE, DATA, MMIO, Code, Recorder

from pyvmm._native import memory
from pyvmm._native import vcpu as native
from pyvmm.errors import KvmError

pytestmark = pytest.mark.kvm
INTR = (native.KVM_EXIT_INTR, {})


class Runner:
    """A vCPU in a thread of its own; `ends` collects (exit, time)."""

    def __init__(self, vcpu, handler=None):
        self.vcpu = vcpu
        self.handler = handler or Recorder()
        self.ends = []
        self.started = threading.Event()
        self.thread = threading.Thread(target=self._main, daemon=True)
        self.thread.start()
        self.started.wait()

    def _main(self):
        self.started.set()
        ended = self.vcpu.run(self.handler)
        self.ends.append((ended, time.monotonic()))

    def stop(self):
        """Kick and join; seconds from the kick to the end of `run`."""
        start = time.monotonic()
        self.vcpu.kick()
        self.thread.join(30)
        assert not self.thread.is_alive()
        return self.ends[0][1] - start


@pytest.fixture
def backstop():
    """Kicks a vCPU after some seconds, so that a test that would hang fails instead."""
    timers = []

    def watch(vcpu, seconds=10):
        timers.append(threading.Timer(seconds, vcpu.kick))
        timers[-1].start()

    yield watch
    for timer in timers:
        timer.cancel()
        timer.join()


def test_halt_without_irqchip_comes_out(guest):
    assert guest.vcpu(Code.HLT).run(Recorder()) == (native.KVM_EXIT_HLT, {})


@pytest.mark.parametrize("instruction", ["SPIN", "HLT"])
def test_kick_ends_a_busy_and_an_idle_vcpu_within_milliseconds(irq_guest, instruction):
    runner = Runner(irq_guest.vcpu(getattr(Code, instruction)))
    time.sleep(0.05)
    assert runner.stop() < 0.05
    assert runner.ends[0][0] == INTR


def test_kick_before_run_ends_the_next_run_only(guest):
    vcpu = guest.vcpu(Code.store(1) + Code.HLT, rbx=MMIO)
    recorder = Recorder()
    vcpu.kick()
    vcpu.kick()
    assert vcpu.run(recorder) == INTR
    assert recorder.seen == []
    assert vcpu.run(recorder)[0] == native.KVM_EXIT_HLT


def test_kick_from_the_handler_lets_the_access_complete_first(guest):
    vcpu = guest.vcpu(Code.load(4) + Code.HLT, rbx=MMIO)
    recorder = Recorder([0x1234])
    recorder.on_access = lambda *_: vcpu.kick()
    assert vcpu.run(recorder) == INTR
    assert vcpu.get_regs()["rax"] == 0x1234
    assert vcpu.run(recorder)[0] == native.KVM_EXIT_HLT


def test_no_kick_is_lost_at_any_moment(guest):
    """Every kick that follows an answered one gets its own answer, wherever the vCPU is."""
    vcpu = guest.vcpu(Code.SPIN)
    answered = threading.Semaphore(0)
    rounds = 2000

    def run():
        for _ in range(rounds):
            assert vcpu.run(Recorder()) == INTR
            answered.release()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    for _ in range(rounds):
        vcpu.kick()
        assert answered.acquire(timeout=30), "a kick got lost"
    thread.join()


def test_kick_passes_a_signal_mask_inherited_from_the_creating_thread(guest):
    vcpu = guest.vcpu(Code.SPIN)
    old = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        runner = Runner(vcpu)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
    time.sleep(0.02)
    assert runner.stop() < 1


def test_other_signals_do_not_end_the_run(guest, backstop):
    vcpu = guest.vcpu(Code.SPIN)
    backstop(vcpu)
    hits = []
    old = signal.signal(signal.SIGALRM, lambda *_: hits.append(1) or (len(hits) == 3 and vcpu.kick()))
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        assert vcpu.run(Recorder()) == INTR
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert len(hits) >= 3


def test_interrupt_from_the_keyboard_is_raised_in_the_main_thread(guest, backstop):
    vcpu = guest.vcpu(Code.SPIN)
    backstop(vcpu)
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        vcpu.run(Recorder())
    timer.join()
    vcpu.kick()
    assert vcpu.run(Recorder()) == INTR


def test_triple_fault_is_shutdown(guest):
    vcpu = guest.vcpu(Code.UD2)
    vcpu.set_sregs({"idt": {"limit": 0}})
    assert vcpu.run(Recorder()) == (native.KVM_EXIT_SHUTDOWN, {})


def test_running_where_no_memory_is_gives_an_internal_error_with_data(guest):
    vcpu = guest.vcpu(Code.JUMP_RBX, rbx=MMIO)
    reason, details = vcpu.run(Recorder())
    assert reason == native.KVM_EXIT_INTERNAL_ERROR
    assert details["suberror"] == 1
    assert isinstance(details["data"], tuple)
    assert all(isinstance(word, int) for word in details["data"])
    assert isinstance(details["instruction"], bytes)
    assert vcpu.get_regs()["rip"] == MMIO


def test_memory_without_a_host_page_is_an_error_in_words_or_an_access(guest):
    """Hardware virtualisation faults; a KVM that emulates ring 0 takes it for MMIO."""
    space = memory.AddressSpace(0x1000)
    guest.vm.set_memory_region(1, MMIO, 0x1000, space.address)
    vcpu = guest.vcpu(Code.store(4) + Code.HLT, rbx=MMIO)
    recorder = Recorder()
    try:
        vcpu.run(recorder)
    except KvmError as error:
        assert error.strerror.startswith("KVM_RUN: Bad address; the guest reached memory")
    else:
        assert recorder.seen == [("write", MMIO, 4, 0)]
    guest.vm.set_memory_region(1, MMIO, 0, 0)
    space.close()


def test_several_vcpus_run_at_once_and_all_threads_end(guest):
    """Four vCPUs count in shared memory with locked increments, then spin until kicked."""
    count, rounds = 4, 200
    done = threading.Semaphore(0)
    runners = []
    for number in range(count):
        recorder = Recorder()
        recorder.on_access = lambda *_: done.release()
        code = Code.repeat(Code.COUNT_RSI) + Code.store(4) + Code.SPIN
        registers = {"rsi": DATA, "rcx": rounds, "rbx": MMIO, "rax": number}
        vcpu = guest.vcpu(code, number=number, **registers)
        runners.append(Runner(vcpu, recorder))
    for _ in range(count):
        assert done.acquire(timeout=60)
    assert [runner.stop() < 5 for runner in runners] == [True] * count
    assert guest.read(DATA, 4) == struct.pack("<I", count * rounds)
    assert [runner.handler.seen[0][3] for runner in runners] == list(range(count))


def test_secondary_vcpu_waits_for_startup_and_can_be_kicked(irq_guest):
    irq_guest.vcpu(Code.HLT)
    second = irq_guest.vm.create_vcpu(1)
    try:
        assert second.get_mp_state() == native.KVM_MP_STATE_UNINITIALIZED
        runner = Runner(second)
        time.sleep(0.05)
        assert runner.stop() < 0.05
    finally:
        second.close()


def test_handler_exception_in_a_thread_leaves_the_vcpu_usable(guest):
    vcpu = guest.vcpu(Code.store(4) + Code.HLT, rbx=MMIO)
    recorder = Recorder()

    def fail(*_):
        raise LookupError

    recorder.on_access = fail
    caught = []

    def run():
        try:
            vcpu.run(recorder)
        except LookupError as error:
            caught.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    vcpu.kick()  # the thread is gone; this must only be remembered
    assert len(caught) == 1
    assert vcpu.run(recorder) == INTR


def test_running_vcpu_refuses_a_second_run_and_close(guest):
    vcpu = guest.vcpu(Code.SPIN)
    runner = Runner(vcpu)
    time.sleep(0.02)
    with pytest.raises(RuntimeError, match="running already"):
        vcpu.run(Recorder())
    with pytest.raises(RuntimeError, match="kick it"):
        vcpu.close()
    runner.stop()


def test_closed_vcpu_refuses_to_run_and_ignores_kicks(guest):
    vcpu = guest.vcpu(Code.HLT)
    vcpu.close()
    vcpu.close()
    vcpu.kick()
    with pytest.raises(ValueError, match="closed"):
        vcpu.run(Recorder())
    with pytest.raises(KvmError, match="KVM_GET_REGS: Bad file descriptor"):
        vcpu.get_regs()
    assert vcpu.fd == -1


def test_other_threads_run_python_while_the_guest_runs(guest):
    runner = Runner(guest.vcpu(Code.SPIN))
    start = time.monotonic()
    sum(range(100_000))
    assert time.monotonic() - start < 2
    runner.stop()
    assert runner.vcpu.get_regs()["rip"] == CODE
