"""The guest's end of the command channel, scripted by tests over a socket pair."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable

from pyvmm.guest import protocol as p


class FakeInit:
    """A guest that runs `script(self)` in a thread of its own, then hangs up."""

    def __init__(self, script: Callable[[FakeInit], None]) -> None:
        self.host_end, self.sock = socket.socketpair()
        self.failure: BaseException | None = None
        self._script = script
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._script(self)
        except BaseException as error:
            self.failure = error
        finally:
            self.sock.close()

    def join(self) -> None:
        """Wait for the script's end and raise what it raised."""
        self._thread.join(20)
        if self.failure is not None:
            raise self.failure

    def send(self, kind: int, payload: bytes = b"") -> None:
        self.sock.sendall(p.frame(kind, payload))

    def hello(self, version: int = p.VERSION) -> None:
        self.send(p.HELLO, p.U32.pack(version) + b"6.1.0-test")

    def start(self) -> dict[str, list[str]]:
        """Greet, and return the records of the description by key."""
        self.hello()
        kind, payload = self.receive()
        assert kind == p.SPEC
        records: dict[str, list[str]] = {}
        for record in payload.decode("utf-8", "surrogateescape").split("\0")[:-1]:
            key, _, value = record.partition("=")
            records.setdefault(key, []).append(value)
        return records

    def receive(self) -> tuple[int, bytes]:
        """The next frame from the host; EOFError when it hung up."""
        kind, length = p.HEADER.unpack(self._exactly(p.HEADER.size))
        return kind, self._exactly(length)

    def expect(self, wanted: int) -> bytes:
        """The next frame's payload; its type must be `wanted`."""
        kind, payload = self.receive()
        assert kind == wanted, f"frame type {kind} instead of {wanted}"
        return payload

    def exit(self, signalled: int = 0, number: int = 0) -> int:
        """End the command, and wait for the host's BYE; returns the credit that came before it."""
        self.send(p.EXIT, p.PAIR.pack(signalled, number))
        credit = 0
        while (frame := self.receive())[0] != p.BYE:
            if frame[0] == p.CREDIT:
                credit += p.PAIR.unpack(frame[1])[1]
        return credit

    def silence(self, seconds: float) -> bool:
        """Whether the host says nothing for a while."""
        self.sock.settimeout(seconds)
        try:
            self.sock.recv(1, socket.MSG_PEEK)
            return False
        except TimeoutError:
            return True
        finally:
            self.sock.settimeout(None)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data


def stage(name: str, nanoseconds: int) -> bytes:
    """Payload of a STAGE frame."""
    return struct.pack("<Q", nanoseconds) + name.encode()
