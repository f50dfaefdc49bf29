"""Status, negotiation, queue validation and activation of a virtio device."""

from __future__ import annotations

import os

import pytest
from fakes.devices import FakeBackend
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import RemoteProtocolError
from pyvmm.layout import RamRange
from pyvmm.virtio import spec
from pyvmm.virtio.device import UNSUPPORTED, VirtioDevice
from pyvmm.virtio.queue import Queue
from pyvmm.virtio.status import ACTIVATE, NEGOTIATE, RESET, TRANSITIONS, transition

GIB = 1 << 30
RAM = (RamRange(0, 3 * GIB, 0), RamRange(4 * GIB, GIB, 3 * GIB))
ACK, DRIVER, DRIVER_OK, FEATURES_OK, FAILED = 1, 2, 4, 8, 0x80


class Interrupts:
    def __init__(self) -> None:
        self.config = self.resets = 0

    def call_fd(self, vector: int) -> int | None:
        return None if vector == spec.NO_VECTOR else 1000 + vector

    def config_changed(self) -> None:
        self.config += 1

    def reset(self) -> None:
        self.resets += 1


@pytest.fixture
def backend():
    return FakeBackend(config=bytes(range(40)))


@pytest.fixture
def interrupts():
    return Interrupts()


@pytest.fixture
def device(backend, interrupts):
    device = VirtioDevice(backend, RAM, interrupts)
    yield device
    device.close()


def steps(device: VirtioDevice, *written: int) -> int:
    for value in written:
        device.write_status(value)
    return device.status


def negotiated(device: VirtioDevice) -> None:
    device.accept_features(device.features)
    assert steps(device, 1, 3, 0xB) == 0xB


def place(
    device: VirtioDevice, index: int, desc: int = 0x1000, avail: int = 0x2_0000, used: int = 0x3_0000
) -> None:
    queue = device.queues[index]
    queue.desc, queue.avail, queue.used, queue.enabled = desc, avail, used, True


class TestStatus:
    def test_the_way_up(self, device):
        negotiated(device)
        assert steps(device, 0xF) == 0xF

    @pytest.mark.parametrize("written", [4, 8, 0xB, 0xF, 0x10, 0x40, 0x20, 0xFF])
    def test_shortcuts_are_refused(self, device, written):
        assert steps(device, written) == 0

    def test_bits_are_not_cleared(self, device):
        negotiated(device)
        assert steps(device, 3, 1) == 0xB

    def test_failed_leads_only_to_reset(self, device):
        assert steps(device, 1, 3, 0x83, 0x8B, 3) == 0x83
        assert steps(device, 0) == 0

    def test_drivers_write_needs_reset_back(self, device, backend):
        negotiated(device)
        backend.on_lost("gone")
        assert device.status == 0x4B
        assert steps(device, 0x4F) == 0x4F
        assert steps(device, 0x40) == 0x4F  # not a reset
        assert steps(device, 0) == 0

    def test_table(self):
        assert {action for _, action in TRANSITIONS.items()} == {RESET, "accept", NEGOTIATE, ACTIVATE}
        assert [pair for pair, action in TRANSITIONS.items() if action == ACTIVATE] == [(0xB, 0xF)]
        for (_, new), action in TRANSITIONS.items():
            assert (new == 0) == (action == RESET) or new == 0

    @given(st.integers(0, 255), st.integers(0, 255))
    def test_no_transition_clears_a_bit_but_reset(self, old, new):
        action = transition(old, new)
        if action is not None and action != RESET:
            assert old & 0xBF & ~new == 0


class TestFeatures:
    @pytest.mark.parametrize(
        ("features", "kept"),
        [(1 << 32, True), (1 << 32 | 1, True), (1 << 32 | 2, False), (1, False), (0, False)],
    )
    def test_features_ok(self, device, features, kept, capfd):
        device.accept_features(features)
        assert bool(steps(device, 1, 3, 0xB) & FEATURES_OK) == kept
        assert bool(capfd.readouterr().err) != kept

    def test_the_backend_is_told_what_is_agreed_until_the_reset(self, device, backend):
        negotiated(device)
        assert backend.agreed == device.features
        assert steps(device, 0) == 0
        assert backend.agreed == 0 and not backend.resets

    def test_a_backend_that_was_replaced_meanwhile_may_have_fewer(self, device, backend):
        backend.agreeable = False
        device.accept_features(device.features)
        assert steps(device, 1, 3, 0xB) == 3

    def test_fixed_after_features_ok(self, device):
        negotiated(device)
        device.accept_features(0)
        assert device.driver_features == device.features

    def test_what_the_transport_lacks_is_not_offered(self, device, backend):
        backend.features = (1 << 64) - 1
        assert device.features == (1 << 64) - 1 & ~UNSUPPORTED
        assert device.features & spec.F_NOTIFICATION_DATA


class TestActivation:
    def test_only_enabled_queues(self, device, backend):
        negotiated(device)
        place(device, 1)
        device.queues[1].vector = 5
        steps(device, 0xF)
        assert [*backend.active] == [1]
        queue = backend.active[1]
        assert (queue.size, queue.desc, queue.avail, queue.used) == (256, 0x1000, 0x2_0000, 0x3_0000)
        assert (queue.kick, queue.call) == (device.kicks[1], 1005)

    def test_once(self, device, backend):
        negotiated(device)
        steps(device, 0xF, 0xF, 0xF)
        assert backend.active == {}

    def test_no_vector_means_no_call(self, device, backend):
        negotiated(device)
        place(device, 0)
        steps(device, 0xF)
        assert backend.active[0].call is None

    @pytest.mark.parametrize("index", [0, 1])
    def test_one_bad_queue_is_enough(self, device, backend, interrupts, index, capfd):
        negotiated(device)
        place(device, 0)
        place(device, 1)
        device.queues[index].desc = 3 * GIB
        assert steps(device, 0xF) == 0x4F
        assert backend.active is None
        assert interrupts.config == 1
        assert f"queue {index} cannot be used" in capfd.readouterr().err
        assert steps(device, 0) == 0
        assert backend.resets == 0  # it was never started

    @pytest.mark.parametrize("error", [RemoteProtocolError("nonsense"), BrokenPipeError("pipe")])
    def test_refusal(self, device, backend, interrupts, error):
        negotiated(device)
        backend.error = error
        assert steps(device, 0xF) == 0x4F
        assert interrupts.config == 1
        steps(device, 0)
        assert backend.resets == 1  # part of it may have started
        negotiated(device)
        assert steps(device, 0xF) == 0xF

    def test_refused_interrupt(self, device, backend, interrupts):
        negotiated(device)
        place(device, 0)
        steps(device, 0xF)
        backend.error = RemoteProtocolError("no")
        device.update_calls()
        assert device.status == 0x4F
        assert interrupts.config == 1

    def test_reset_goes_on_when_the_backend_does_not(self, device, backend, interrupts):
        negotiated(device)
        place(device, 0)
        steps(device, 0xF)
        os.eventfd_write(device.kicks[0], 3)
        backend.error = RemoteProtocolError("no")
        assert steps(device, 0) == 0
        assert not device.queues[0].enabled
        assert interrupts.resets == 1
        with pytest.raises(BlockingIOError):
            os.eventfd_read(device.kicks[0])

    def test_full_doorbell(self, device):
        os.eventfd_write(device.kicks[0], 2**64 - 2)
        device.ring(0)
        device.ring(9)
        assert os.eventfd_read(device.kicks[0]) == 2**64 - 2


class TestConfiguration:
    def test_reads_stay_inside(self, device):
        assert device.config_size == 44
        assert device.read_config(36, 8) == bytes((36, 37, 38, 39, 0, 0, 0, 0))
        assert device.read_config(40, 4) == bytes(4)
        assert device.read_config(4000, 4) == bytes(4)

    def test_writes_stay_inside(self, device, backend):
        device.write_config(38, b"\xaa\xbb\xcc\xdd")
        device.write_config(40, b"\xaa")
        assert backend.config[36:] == bytes((36, 37, 0xAA, 0xBB))

    def test_no_interrupt_before_driver_ok(self, device, backend, interrupts):
        backend.on_config_change()
        negotiated(device)
        backend.on_config_change()
        assert interrupts.config == 0
        steps(device, 0xF)
        backend.on_config_change()
        assert interrupts.config == 1

    def test_generation_wraps(self, device, backend):
        for _ in range(256):
            backend.on_config_change()
            backend.on_config_change()
            device.read_config(0, 1)
        assert device.generation == 0
        backend.on_config_change()
        device.read_config(0, 1)
        assert device.generation == 1

    def test_short_answers_are_filled_up(self, device, backend):
        backend.read_config = lambda offset, length: b"\1"
        assert device.read_config(0, 4) == b"\1\0\0\0"

    def test_a_refused_access_asks_for_a_reset_once(self, device, backend, interrupts):
        """Linux reads the configuration in answer to its interrupt, which may be refused again."""
        negotiated(device)
        steps(device, 0xF)
        for _ in range(3):
            backend.on_config_refused()
        assert (device.status, interrupts.config) == (0x4F, 1)
        backend.on_back()
        assert device.status == 0x4F, "only a reset ends that"

    def test_a_refusal_before_there_is_a_driver_is_not_held_against_the_next_backend(self, device, backend):
        backend.on_config_refused()
        negotiated(device)
        steps(device, 0xF)
        backend.on_away()
        assert device.status == 0x4F
        backend.on_back()
        assert device.status == 0xF
        assert steps(device, 0) == 0

    def test_lost_is_said_once(self, device, backend, interrupts, capfd):
        negotiated(device)
        backend.on_lost("a")
        backend.on_lost("b")
        assert capfd.readouterr().err.count("asks the guest for a reset") == 1


class TestQueue:
    def queue(self, **fields: int) -> Queue:
        queue = Queue(0, 256)
        queue.desc, queue.avail, queue.used = 0x1000, 0x2000, 0x3000
        for name, value in fields.items():
            setattr(queue, name, value)
        return queue

    def test_good(self):
        assert self.queue().fault(RAM) is None

    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            ({"desc": 0x1008}, "descriptor area at 0x1008 is not aligned to 16"),
            ({"avail": 0x2001}, "driver area at 0x2001 is not aligned to 2"),
            ({"used": 0x3002}, "device area at 0x3002 is not aligned to 4"),
            ({"desc": 3 * GIB}, "descriptor area .* not lie in guest RAM"),
            ({"desc": 3 * GIB - 4096 + 16}, "descriptor area"),
            ({"avail": 3 * GIB - 516}, "driver area"),
            ({"used": 5 * GIB - 2052}, "device area"),
            ({"desc": 2**64 - 16}, "descriptor area"),
            ({"used": 4 * GIB - 4}, "device area"),
            ({"size": 0}, "power of two"),
        ],
    )
    def test_faults(self, fields, text):
        fault = self.queue(**fields).fault(RAM)
        assert fault is not None
        import re

        assert re.search(text, fault)

    @pytest.mark.parametrize(
        ("fields", "text"),
        [
            ({}, None),
            ({"desc": 3 * GIB - 4096, "avail": 3 * GIB - 4, "used": 5 * GIB - 4}, None),
            ({"desc": 0x1008}, "descriptor area at 0x1008 is not aligned to 16"),
            ({"desc": 3 * GIB - 4096 + 16}, "descriptor area"),
            ({"avail": 0x2002}, "driver area at 0x2002 is not aligned to 4"),
            ({"avail": 3 * GIB}, "driver area"),
            ({"used": 0x3002}, "device area at 0x3002 is not aligned to 4"),
            ({"used": 5 * GIB}, "device area"),
            ({"size": 0}, "power of two"),
        ],
    )
    def test_packed(self, fields, text):
        fault = self.queue(**fields).fault(RAM, packed=True)
        assert fault is None if text is None else fault is not None and text in fault

    @pytest.mark.parametrize(
        "fields",
        [{"desc": 3 * GIB - 4096}, {"avail": 3 * GIB - 518}, {"used": 5 * GIB - 2056}, {"desc": 4 * GIB}],
    )
    def test_up_to_the_last_byte(self, fields):
        if "used" in fields:
            fields = {"used": 5 * GIB - 2056 & ~3}
        assert self.queue(**fields).fault(RAM) is None

    @pytest.mark.parametrize(
        ("size", "kept"), [(256, 256), (1, 1), (128, 128), (512, 0), (0, 0), (100, 0), (3, 0)]
    )
    def test_sizes(self, size, kept):
        queue = self.queue()
        queue.set_size(size)
        assert queue.size == kept
