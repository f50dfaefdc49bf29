"""A 16550A serial port, as far as drivers can tell: COM1 for early kernel messages.

It owns the registers (National Semiconductor PC16550D data sheet) and the two FIFOs.  It does
not know where bytes come from or go to: it calls `send` with output, is given input by `feed`,
and reports its interrupt line by `set_irq`.  The line is an edge source: it goes low and high
again only when a cause goes away and comes back, as Linux's 8250 driver expects.

Bytes are taken at once, so the transmitter is always empty.  They are gathered until a line ends
or the driver shows that it has no more for now: a line goes out as one write, not as eighty.
"""

from __future__ import annotations

from ..lean import Lock, deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 8
FIFO_SIZE = 16
# Offsets; the first two are the divisor's while LCR's DLAB is set.
DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)
IER_RECEIVED, IER_THR_EMPTY, IER_LINE, IER_MODEM = 1, 2, 4, 8
IIR_NONE, IIR_THR_EMPTY, IIR_RECEIVED, IIR_LINE, IIR_TIMEOUT, IIR_MODEM = 0x01, 0x02, 0x04, 0x06, 0x0C, 0x00
IIR_FIFOS = 0xC0
FCR_ENABLE, FCR_CLEAR_RECEIVER, FCR_CLEAR_TRANSMITTER = 0x01, 0x02, 0x04
LCR_DLAB = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 0x01, 0x02, 0x04, 0x08, 0x10
LSR_READY, LSR_OVERRUN, LSR_THR_EMPTY, LSR_IDLE = 0x01, 0x02, 0x20, 0x40
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
_MSR_DELTAS = 0x0F
_GATHER = 256  # bytes of output kept back at most

_RECEIVE_TRIGGER = (1, 4, 8, 14)  # by FCR bits 6-7
# In loopback mode the modem control outputs feed the modem status inputs.
_LOOPED = ((MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD))


class Uart:
    """One 16550A.  `read` and `write` are for the bus, `feed` and `flush` for any thread."""

    def __init__(self, send: Callable[[bytes], None], set_irq: Callable[[bool], None]) -> None:
        self._send = send
        self._set_irq = set_irq
        self._lock = Lock()
        self._sending = Lock()  # taken before the other
        self._drained = bytearray()  # output that is to be sent now
        self._input: deque[int] = deque()
        self._output = bytearray()
        self._ier = self._fcr = self._lcr = self._scratch = self._overrun = 0
        self._mcr = MCR_OUT2  # the PC's interrupt gate, which drivers expect open
        self._modem = MSR_CTS | MSR_DSR | MSR_DCD
        self._divisor = 12  # 9600 baud
        self._thr_interrupt = False  # the transmitter has run empty and nobody has seen it
        self._line = False
        self._polled = False  # the line status was read since the last byte of output
        self._pending = deque[int]()  # input that waits for room in the receiver's FIFO

    def feed(self, data: bytes) -> None:
        """Input for the guest, any number of bytes; what does not fit in the FIFO waits."""
        with self._lock:
            self._pending.extend(data)
            self._refill()
            self._update()

    @property
    def waiting(self) -> int:
        """Bytes of input that the guest has not read, for back-pressure on whoever feeds."""
        return len(self._pending) + len(self._input)

    def flush(self) -> None:
        """Send what is gathered now; for the end of the machine and for idle moments."""
        with self._lock:
            self._drain()
        self._deliver()

    def read(self, offset: int, width: int) -> int:
        """A register, one byte; a wider access gets the byte and zeros."""
        with self._lock:
            value = self._read(offset)
            self._update()
        self._deliver()
        return value

    def write(self, offset: int, width: int, value: int) -> None:
        """A register; only the low byte of a wider access counts."""
        with self._lock:
            self._write(offset, value & 0xFF)
            self._update()
        self._deliver()

    def _deliver(self) -> None:
        """Send what is drained, in order; without the lock, since a reader may stand still."""
        if not self._drained:
            return
        with self._sending:
            with self._lock:
                data = bytes(self._drained)
                self._drained.clear()
            if data:
                self._send(data)

    # -- registers; the lock is held ---------------------------------------------------

    def _read(self, offset: int) -> int:
        if self._lcr & LCR_DLAB and offset in (DATA, IER):
            return self._divisor >> 8 * offset & 0xFF
        if offset == DATA:
            return self._receive()
        if offset == IIR_FCR:
            cause = self._cause()
            if cause == IIR_THR_EMPTY:
                self._thr_interrupt = False  # reading it as the cause acknowledges it
            return cause | (IIR_FIFOS if self._fcr & FCR_ENABLE else 0)
        if offset == LSR:
            return self._line_status()
        if offset == MSR:
            return self._modem_status()
        return (0, self._ier, 0, self._lcr, self._mcr, 0, 0, self._scratch)[offset]

    def _write(self, offset: int, value: int) -> None:
        if self._lcr & LCR_DLAB and offset in (DATA, IER):
            shift = 8 * offset
            self._divisor = self._divisor & ~(0xFF << shift) | value << shift
        elif offset == DATA:
            self._transmit(value)
        elif offset == IER:
            self._enable(value & 0x0F)
        elif offset == IIR_FCR:
            self._control_fifos(value)
        elif offset == LCR:
            self._lcr = value
        elif offset == MCR:
            self._control_modem(value & 0x1F)
        elif offset == SCR:
            self._scratch = value

    def _receive(self) -> int:
        value = self._input.popleft() if self._input else 0
        if not self._input and self._pending:
            self._update()  # down and up again: a handler that gave up half-way gets its edge
            self._refill()
        return value

    def _line_status(self) -> int:
        # A polling driver reads the status once for each byte or FIFO of output; twice, and it waits.
        if self._polled:
            self._drain()
        self._polled = True
        status = LSR_THR_EMPTY | LSR_IDLE | self._overrun | (LSR_READY if self._input else 0)
        self._overrun = 0
        return status

    def _modem_status(self) -> int:
        status = self._modem
        self._modem &= ~_MSR_DELTAS
        return status

    def _transmit(self, value: int) -> None:
        if self._mcr & MCR_LOOP:
            if len(self._input) < self._capacity():
                self._input.append(value)
            else:
                self._overrun = LSR_OVERRUN
        else:
            self._output.append(value)
            if value == 0x0A or len(self._output) >= _GATHER:
                self._drain()
        self._polled = False
        self._thr_interrupt = True

    def _enable(self, value: int) -> None:
        # Enabling the interrupt while the transmitter is empty raises it (data sheet, 8.6.1);
        # Linux starts every transmission so.
        if value & IER_THR_EMPTY and not self._ier & IER_THR_EMPTY:
            self._thr_interrupt = True
        self._ier = value
        self._drain()  # Linux ends every transmission and console message with such a write

    def _control_fifos(self, value: int) -> None:
        if (value ^ self._fcr) & FCR_ENABLE or value & FCR_CLEAR_RECEIVER:
            self._input.clear()
        self._fcr = value & ~(FCR_CLEAR_RECEIVER | FCR_CLEAR_TRANSMITTER) if value & FCR_ENABLE else 0
        self._refill()

    def _control_modem(self, value: int) -> None:
        self._mcr = value
        if value & MCR_LOOP:
            now = sum(status for control, status in _LOOPED if value & control)
        else:
            now = MSR_CTS | MSR_DSR | MSR_DCD
            self._refill()
        changed = (now ^ self._modem) & 0xF0
        trailing = changed & MSR_RI & ~now  # of RI only the falling edge counts
        self._modem = now | self._modem & _MSR_DELTAS | (changed & ~MSR_RI | trailing) >> 4

    # -- FIFOs and the interrupt line --------------------------------------------------

    def _capacity(self) -> int:
        return FIFO_SIZE if self._fcr & FCR_ENABLE else 1

    def _refill(self) -> None:
        """Move waiting input into the FIFO; in loopback mode the receiver is cut off."""
        if self._mcr & MCR_LOOP:
            return
        while self._pending and len(self._input) < self._capacity():
            self._input.append(self._pending.popleft())

    def _drain(self) -> None:
        self._drained += self._output
        self._output.clear()

    def _cause(self) -> int:
        """The pending interrupt of highest priority (data sheet, table IV), or IIR_NONE."""
        if self._ier & IER_LINE and self._overrun:
            return IIR_LINE
        if self._ier & IER_RECEIVED and self._input:
            trigger = _RECEIVE_TRIGGER[self._fcr >> 6] if self._fcr & FCR_ENABLE else 1
            # Fewer bytes than the trigger level are reported as a character timeout, at once.
            return IIR_RECEIVED if len(self._input) >= trigger else IIR_TIMEOUT
        if self._ier & IER_THR_EMPTY and self._thr_interrupt:
            return IIR_THR_EMPTY
        if self._ier & IER_MODEM and self._modem & _MSR_DELTAS:
            return IIR_MODEM
        return IIR_NONE

    def _update(self) -> None:
        # OUT2 gates the interrupt in a PC, and loopback mode cuts the outputs off.
        gated = self._mcr & MCR_OUT2 and not self._mcr & MCR_LOOP
        line = bool(gated) and self._cause() != IIR_NONE
        if line != self._line:
            self._line = line
            self._set_irq(line)
