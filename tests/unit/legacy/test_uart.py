"""The serial port, driven as Linux's 8250 driver drives it (drivers/tty/serial/8250/8250_port.c)."""

from __future__ import annotations

import pytest

from pyvmm.legacy import uart
from pyvmm.legacy.uart import DATA, IER, IIR_FCR, LCR, LSR, MCR, MSR, SCR


class Port:
    """A port whose output and interrupt edges are recorded."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.edges: list[bool] = []
        self.uart = uart.Uart(self.sent.append, self.edges.append)

    def get(self, offset: int) -> int:
        return self.uart.read(offset, 1)

    def put(self, offset: int, value: int) -> None:
        self.uart.write(offset, 1, value)

    @property
    def line(self) -> bool:
        return bool(self.edges) and self.edges[-1]

    def open(self, ier: int) -> None:
        """What serial8250_do_startup does: FIFOs on, DTR, RTS and OUT2 on, interrupts on."""
        self.put(IIR_FCR, 0x81)
        self.put(MCR, uart.MCR_DTR | uart.MCR_RTS | uart.MCR_OUT2)
        self.put(IER, ier)


@pytest.fixture
def port() -> Port:
    return Port()


def test_linux_recognises_a_16550a(port: Port) -> None:
    """The probes of autoconfig() and autoconfig_16550a(), in their order."""
    port.put(IER, 0)
    assert port.get(IER) == 0
    port.put(IER, 0x0F)
    assert port.get(IER) == 0x0F
    port.put(IER, 0)
    port.put(MCR, uart.MCR_LOOP | 0x0A)
    assert port.get(MSR) & 0xF0 == 0x90
    port.put(MCR, uart.MCR_OUT2)
    port.put(IIR_FCR, 0x01)
    assert port.get(IIR_FCR) >> 6 == 3
    for mode in (0x80, 0xBF):  # no enhanced feature register of later chips shows up
        port.put(LCR, mode)
        assert port.get(IIR_FCR) != 0
    port.put(LCR, 0)
    port.put(IIR_FCR, 0x01 | 0x20)
    assert port.get(IIR_FCR) >> 5 == 6  # no 64-byte FIFO
    port.put(IER, 0x40)
    assert port.get(IER) == 0  # no XScale unit-enable bit


def test_scratch_and_line_control_hold_their_value(port: Port) -> None:
    for offset in (SCR, LCR):
        for value in (0x5A, 0x25):
            port.put(offset, value)
            assert port.get(offset) == value


def test_divisor_latch_hides_data_and_interrupt_enable(port: Port) -> None:
    port.put(IER, 5)
    port.put(LCR, uart.LCR_DLAB | 3)
    port.put(DATA, 0x34)
    port.put(IER, 0x12)
    assert (port.get(DATA), port.get(IER)) == (0x34, 0x12)
    port.put(LCR, 3)
    assert port.get(IER) == 5
    assert port.sent == []


def test_a_polled_line_is_one_write(port: Port) -> None:
    for byte in b"hello, world\n":
        assert port.get(LSR) & 0x20
        port.put(DATA, byte)
    assert port.sent == [b"hello, world\n"]


def test_a_prompt_without_newline_goes_out_when_the_driver_waits(port: Port) -> None:
    for byte in b"login: ":
        port.get(LSR)
        port.put(DATA, byte)
    assert port.sent == []
    port.get(LSR)
    port.get(LSR)
    assert port.sent == [b"login: "]


def test_ending_a_transmission_and_flush_send_what_is_gathered(port: Port) -> None:
    port.put(DATA, 0x61)
    port.put(IER, 0)
    port.put(DATA, 0x62)
    port.uart.flush()
    port.uart.flush()
    assert port.sent == [b"a", b"b"]


def test_output_that_never_ends_a_line_is_bounded(port: Port) -> None:
    for _ in range(1000):
        port.put(DATA, 0x2E)
    assert len(b"".join(port.sent)) >= 1000 - 256


def test_transmitter_interrupt_comes_with_each_enabling_and_goes_when_read(port: Port) -> None:
    """serial8250_do_startup takes a chip that fails this for one with a THRE bug."""
    port.open(0)
    for _ in range(2):
        port.put(IER, uart.IER_THR_EMPTY)
        assert port.line
        assert port.get(IIR_FCR) & 0x0F == uart.IIR_THR_EMPTY
        assert not port.line
        assert port.get(IIR_FCR) & 0x0F == uart.IIR_NONE
        port.put(IER, 0)


def test_each_burst_of_output_raises_a_new_edge(port: Port) -> None:
    port.open(uart.IER_THR_EMPTY)
    for _ in range(3):
        port.get(IIR_FCR)
        assert not port.line
        for byte in range(16):
            port.put(DATA, byte + 0x20)
        assert port.line
    assert port.edges == [True, False] * 3 + [True]


def test_input_raises_the_line_until_it_is_read(port: Port) -> None:
    port.open(uart.IER_RECEIVED)
    port.uart.feed(b"ab")
    assert port.line
    assert port.get(IIR_FCR) & 0x0F == uart.IIR_TIMEOUT
    assert [port.get(DATA) for _ in range(2) if port.get(LSR) & 1] == [0x61, 0x62]
    assert not port.get(LSR) & 1
    assert not port.line
    assert port.get(DATA) == 0


def test_a_full_fifo_is_a_receive_interrupt(port: Port) -> None:
    port.open(uart.IER_RECEIVED)
    port.uart.feed(b"12345678")
    assert port.get(IIR_FCR) & 0x0F == uart.IIR_RECEIVED


def test_long_input_arrives_whole_with_an_edge_for_each_fifo(port: Port) -> None:
    port.open(uart.IER_RECEIVED)
    text = bytes(range(100))
    port.uart.feed(text)
    assert port.uart.waiting == 100
    got = bytearray()
    while port.get(LSR) & 1:
        got.append(port.get(DATA))
    assert got == text
    assert port.edges.count(True) == -(-100 // 16)
    assert not port.line
    assert port.uart.waiting == 0


def test_without_fifos_one_byte_is_held(port: Port) -> None:
    port.put(IER, uart.IER_RECEIVED)
    port.uart.feed(b"xy")
    assert port.get(IIR_FCR) == uart.IIR_RECEIVED
    assert port.get(DATA) == 0x78
    assert port.get(DATA) == 0x79


def test_clearing_the_receiver_drops_only_what_it_holds(port: Port) -> None:
    port.open(0)
    port.uart.feed(bytes(20))
    port.uart.feed(b"!")
    port.put(IIR_FCR, 0x83)
    assert port.uart.waiting == 5


def test_receive_comes_before_transmit(port: Port) -> None:
    port.open(uart.IER_RECEIVED | uart.IER_THR_EMPTY)
    port.uart.feed(b"z")
    assert port.get(IIR_FCR) & 0x0F == uart.IIR_TIMEOUT
    port.get(DATA)
    assert port.get(IIR_FCR) & 0x0F == uart.IIR_THR_EMPTY
    assert not port.line


def test_loopback_returns_output_and_cuts_the_outside_off(port: Port) -> None:
    port.open(uart.IER_RECEIVED)
    port.put(MCR, uart.MCR_LOOP | uart.MCR_OUT2)
    port.uart.feed(b"outside")
    port.put(DATA, 0x42)
    assert port.get(DATA) == 0x42
    assert not port.get(LSR) & 1
    assert port.sent == []
    assert not port.line
    port.put(MCR, uart.MCR_OUT2)
    assert port.get(DATA) == ord("o")


def test_loopback_overrun_is_reported_once(port: Port) -> None:
    port.put(MCR, uart.MCR_LOOP)
    port.put(DATA, 1)
    port.put(DATA, 2)
    assert port.get(LSR) & uart.LSR_OVERRUN
    assert not port.get(LSR) & uart.LSR_OVERRUN


def test_modem_deltas_are_cleared_by_reading(port: Port) -> None:
    port.open(uart.IER_MODEM)
    assert port.get(MSR) == uart.MSR_CTS | uart.MSR_DSR | uart.MSR_DCD
    port.put(MCR, uart.MCR_LOOP)
    assert port.get(MSR) == 0x0B
    assert port.get(MSR) == 0
    port.put(MCR, uart.MCR_OUT2)
    assert port.line
    assert port.get(IIR_FCR) & 0x0F == uart.IIR_MODEM
    port.get(MSR)
    assert not port.line


def test_of_the_ring_indicator_the_falling_edge_counts(port: Port) -> None:
    port.put(MCR, uart.MCR_LOOP | uart.MCR_OUT1)
    assert port.get(MSR) & 0x44 == uart.MSR_RI
    port.put(MCR, uart.MCR_LOOP)
    assert port.get(MSR) & 0x44 == 0x04


def test_the_interrupt_needs_out2(port: Port) -> None:
    port.put(MCR, 0)
    port.put(IER, uart.IER_RECEIVED)
    port.uart.feed(b"q")
    assert not port.line
    port.put(MCR, uart.MCR_OUT2)
    assert port.line


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("width", [1, 2, 4])
def test_no_access_raises(port: Port, offset: int, width: int) -> None:
    for value in (0, 0xFF, 0xFFFF_FFFF):
        port.uart.write(offset, width, value)
        assert 0 <= port.uart.read(offset, width) < 256
