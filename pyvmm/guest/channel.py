"""The host's end of the command channel: one stream socket, three descriptors, one command.

It owns the dialogue with the guest's first process and the flow of standard input, output
and error.  It knows neither how the guest was started nor what its end means for the
machine.  Everything happens in the event loop's thread and nothing blocks: descriptors of
the user's keep their flags (others share them), so they are written in pieces that a
ready pipe takes at once.  One epoll instance of its own sits in the event loop as a
single reader, because that loop watches for reading only.
"""

from __future__ import annotations

import errno
import os
import select

from ..errors import RemoteProtocolError
from ..lean import deque
from ..record import Record
from . import protocol as p

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable

    from ..loop import EventLoop

    Callback = Callable[[], None]

PIECE = 4096  # PIPE_BUF: what a writable pipe takes without blocking
QUEUE_SHORT = 128 * 1024  # no more standard input is read while this much waits to be sent
EPOLLIN, EPOLLOUT = select.EPOLLIN, select.EPOLLOUT


class Outcome(Record):
    """How it ended: `status` as a shell counts it (128 + n for signal n), or `error`.

    `lost` means that the guest vanished without a word: it panicked, crashed or was stopped.
    """

    status: int | None = None
    signal: int | None = None
    error: str | None = None
    lost: bool = False


class _Watch:
    """Descriptors of one epoll; regular files and /dev/null, which it refuses, are always ready."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self._masks: dict[int, int] = {}
        self.always: set[int] = set()

    def set(self, fd: int, mask: int) -> None:
        if fd in self.always or self._masks.get(fd, 0) == mask:
            return
        try:
            self._apply(fd, mask)
        except PermissionError:
            self.always.add(fd)
            return
        self._masks[fd] = mask

    def _apply(self, fd: int, mask: int) -> None:
        if not mask:
            self.epoll.unregister(fd)
        elif self._masks.get(fd):
            self.epoll.modify(fd, mask)
        else:
            self.epoll.register(fd, mask)


class _Output:
    """One stream from the guest on its way to a descriptor of the user's."""

    def __init__(self, stream: int, fd: int | None) -> None:
        self.stream = stream
        self.fd = fd
        self.pending: deque[memoryview] = deque()
        self.taken = 0  # bytes not yet given back to the guest as credit
        self.credit = p.OUTPUT_WINDOW

    def take(self, data: bytes) -> None:
        """Let `data` wait; RemoteProtocolError when the guest has no credit for so much."""
        self.credit -= len(data)
        if self.credit < 0:
            raise RemoteProtocolError("the guest's init sent more output than it was allowed to")
        if data:
            self.pending.append(memoryview(data))

    def write(self, limit: int) -> None:
        """Write at most `limit` bytes; raises OSError when nobody will take them any more."""
        assert self.fd is not None
        data = self.pending.popleft()
        try:
            done = os.write(self.fd, data[:limit])
        except BlockingIOError:
            done = 0
        self.taken += done
        if done < len(data):
            self.pending.appendleft(data[done:])

    def drop(self) -> None:
        """Forget what waits; the guest gets the room back."""
        self.taken += sum(map(len, self.pending))
        self.pending.clear()


class CommandChannel:
    """Runs `spec` in the guest at the other end of `sock`, which it owns from now on.

    `on_end` is called once, after the last byte was written out.  `on_stage(name, seconds)`
    reports the guest's own times since its boot.  `stdin` None is an empty input, `stdout` or
    `stderr` None discards.  The three descriptors stay the caller's.
    """

    def __init__(
        self,
        loop: EventLoop,
        sock: socket,
        spec: p.Spec,
        on_end: Callable[[Outcome], None],
        *,
        stdin: int | None = 0,
        stdout: int | None = 1,
        stderr: int | None = 2,
        on_stage: Callable[[str, float], None] | None = None,
        on_warning: Callable[[str], None] | None = None,
        on_hello: Callable[[str], None] | None = None,
    ) -> None:
        self._loop, self._sock, self._spec = loop, sock, spec.encode()
        self._on_end: Callable[[Outcome], None] | None = on_end
        self._on_stage, self._on_warning, self._on_hello = on_stage, on_warning, on_hello
        self._decoder = p.Decoder()
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._stdin, self._input_open, self._greeted = stdin, True, False
        self._input_credit = p.INPUT_WINDOW
        self._outputs = {p.STDOUT: _Output(1, stdout), p.STDERR: _Output(2, stderr)}
        self._outcome: Outcome | None = None
        self._guest_gone = False
        self._watch = _Watch()
        sock.setblocking(False)
        self._watch.set(sock.fileno(), EPOLLIN)
        loop.add_reader(self._watch.epoll.fileno(), self._ready)

    # -- what the caller asks for ------------------------------------------------------

    def signal(self, number: int) -> None:
        """Send a signal to the command and all of its process group."""
        self._send(p.SIGNAL, p.U32.pack(number))

    def resize(self, rows: int, columns: int) -> None:
        """Tell the command's terminal its new size."""
        self._send(p.WINDOW, p.WINDOW_SIZE.pack(rows, columns))

    def close(self) -> None:
        """Release the socket; `on_end` is not called any more."""
        self._on_end = None
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._watch.epoll.fileno())
            self._watch.epoll.close()
            self._sock.close()

    # -- the loop's side -----------------------------------------------------------------

    def _ready(self) -> None:
        for fd, events in self._watch.epoll.poll(0):
            if fd == self._sock.fileno():
                if events & ~EPOLLOUT:
                    self._receive()
            elif fd == self._stdin:
                self._read_input()
            else:
                self._write_output(fd)
            if self._closed():
                return
        self._pump()

    def _closed(self) -> bool:
        return self._sock.fileno() < 0

    def _pump(self) -> None:
        """Do what can be done now, and say what to wait for."""
        for output in self._outputs.values():
            self._advance(output)
        if self._stdin is not None and self._stdin in self._watch.always:
            while self._may_read_input():
                self._read_input()
        self._flush()
        self._update_watch()
        self._end_if_done()

    def _update_watch(self) -> None:
        if self._stdin is not None:
            self._watch.set(self._stdin, EPOLLIN if self._may_read_input() else 0)
            if self._stdin in self._watch.always and self._may_read_input():
                self._loop.call_soon_threadsafe(self._pump_if_open)
        for output in self._outputs.values():
            if output.fd is not None:
                self._watch.set(output.fd, EPOLLOUT if output.pending else 0)
        if not self._guest_gone:
            self._watch.set(self._sock.fileno(), EPOLLIN | (EPOLLOUT if self._queue else 0))

    def _pump_if_open(self) -> None:
        if not self._closed():
            self._pump()

    # -- standard input --------------------------------------------------------------------

    def _may_read_input(self) -> bool:
        ready = self._greeted and self._outcome is None
        return ready and self._input_open and self._input_credit > 0 and self._queued < QUEUE_SHORT

    def _read_input(self) -> None:
        assert self._stdin is not None
        try:
            data = os.read(self._stdin, min(self._input_credit, p.DATA_MAX))
        except BlockingIOError:
            return
        except OSError:
            data = b""  # a terminal that hung up, a closed descriptor: no more input
        self._input_credit -= len(data)
        self._input_open = bool(data)
        self._send(p.STDIN, data)

    # -- standard output and error --------------------------------------------------------

    def _write_output(self, fd: int) -> None:
        for output in self._outputs.values():
            if output.fd == fd and output.pending:
                self._write_some(output, PIECE)

    def _write_some(self, output: _Output, limit: int) -> None:
        try:
            output.write(limit)
        except OSError:
            self._lose_reader(output)

    def _lose_reader(self, output: _Output) -> None:
        """Nobody reads the user's descriptor: let the command have its SIGPIPE."""
        assert output.fd is not None
        self._watch.set(output.fd, 0)
        output.fd = None
        self._send(p.CLOSE, p.U32.pack(output.stream))

    def _advance(self, output: _Output) -> None:
        if output.fd is not None and output.pending:
            self._watch.set(output.fd, EPOLLOUT)  # finds out what the descriptor is
        while output.pending and output.fd is not None and output.fd in self._watch.always:
            self._write_some(output, p.OUTPUT_WINDOW)
        if output.fd is None:
            output.drop()
        if output.taken >= p.OUTPUT_WINDOW // 4:
            self._send(p.CREDIT, p.PAIR.pack(output.stream, output.taken))
            output.credit += output.taken
            output.taken = 0

    # -- the socket ------------------------------------------------------------------------

    def _send(self, kind: int, payload: bytes = b"") -> None:
        if self._closed() or self._guest_gone or (self._outcome is not None and kind != p.BYE):
            return
        self._queue.append(p.frame(kind, payload))
        self._queued += len(payload) + p.HEADER.size
        self._flush()
        if self._queue:
            self._watch.set(self._sock.fileno(), EPOLLIN | EPOLLOUT)

    def _flush(self) -> None:
        while self._queue:
            try:
                done = self._sock.send(self._queue[0])
            except BlockingIOError:
                return
            except OSError:
                self._queue.clear()  # reading says the same, and ends it
                self._queued = 0
                return
            self._queued -= done
            rest = self._queue.popleft()[done:]
            if rest:
                self._queue.appendleft(rest)

    def _receive(self) -> None:
        try:
            data = self._sock.recv(256 * 1024)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ECONNRESET:
                raise
            data = b""
        if not data:
            self._lose_guest(Outcome(lost=True))
            return
        try:
            for kind, payload in self._decoder.feed(data):
                self._handle(kind, payload)
        except RemoteProtocolError as error:
            self._lose_guest(Outcome(error=str(error), lost=True))

    def _lose_guest(self, outcome: Outcome) -> None:
        self._guest_gone = True
        self._watch.set(self._sock.fileno(), 0)
        self._queue.clear()
        self._queued = 0
        self._outcome = self._outcome or outcome

    def _handle(self, kind: int, payload: bytes) -> None:
        if self._outcome is not None:
            return
        if kind in self._outputs:
            self._outputs[kind].take(payload)
        elif kind == p.CREDIT:
            self._input_credit += p.PAIR.unpack_from(payload)[1]
        elif kind == p.EXIT:
            self._finish(_exit_outcome(*p.PAIR.unpack_from(payload)))
        elif kind == p.ERROR:
            self._finish(Outcome(error=_text(payload)))
        else:
            self._report(kind, payload)

    def _report(self, kind: int, payload: bytes) -> None:
        if kind == p.HELLO:
            self._greet(payload)
        elif kind == p.STAGE and self._on_stage is not None:
            self._on_stage(_text(payload[8:]), p.STAGE_TIME.unpack_from(payload)[0] / 1e9)
        elif kind == p.WARNING and self._on_warning is not None:
            self._on_warning(_text(payload))

    def _greet(self, payload: bytes) -> None:
        version = p.U32.unpack_from(payload)[0]
        if version != p.VERSION:
            raise RemoteProtocolError(f"the guest's init speaks version {version}, not {p.VERSION}")
        self._greeted = True
        if self._on_hello is not None:
            self._on_hello(_text(payload[4:]))
        self._send(p.SPEC, self._spec)
        if self._stdin is None:
            self._send(p.STDIN)

    # -- the end -----------------------------------------------------------------------------

    def _finish(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._send(p.BYE)

    def _end_if_done(self) -> None:
        waiting = self._queue or any(output.pending for output in self._outputs.values())
        if self._outcome is None or waiting or self._on_end is None:
            return
        on_end, self._on_end = self._on_end, None
        on_end(self._outcome)


def _text(payload: bytes) -> str:
    return payload.decode("utf-8", "backslashreplace")


def _exit_outcome(signalled: int, number: int) -> Outcome:
    if signalled:
        return Outcome(status=128 + number, signal=number)
    return Outcome(status=number)
