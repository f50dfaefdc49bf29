"""The way back from a loss: when to look for another backend, and when to give up.

It owns the timer and the thread of one device's outage; neither exists while the backend is there.
It lives in the event loop's thread, where programs are started and sockets connected to,
which takes no time; the dialogue with the new backend, which may, is in the thread.  It must not know what is
said there.
"""

from __future__ import annotations

from time import monotonic

from .. import log
from ..errors import BackendLost, ConfigError, LocalProtocolError, ProtocolError
from ..lean import Thread
from .opening import Unfit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable

    from ..loop import EventLoop, Timer
    from .endpoint import Endpoint

RECONNECT, STOP, FAIL = "reconnect", "stop", "fail"

FIRST_PAUSE = 0.05  # seconds between two attempts, doubling up to the endpoint's `longest_pause`


class Abandoned(BackendLost):
    """The driver began anew while a backend was told of what it wanted before: nothing is wrong with that."""


class Recovery:
    """Looks for backends of the device `name` at `endpoint`, in the thread of `loop`.

    `restore` is called in a thread with each connection; it makes the device work with it, or raises.
    `ended` is called in the loop's thread: with "" for success, else with the reason for giving
    up.  `patience` is how many seconds to try, 0 for ever.
    """

    def __init__(
        self,
        name: str,
        loop: EventLoop,
        endpoint: Endpoint,
        restore: Callable[[socket], None],
        ended: Callable[[str], None],
        patience: float,
    ) -> None:
        self._name, self._loop, self._endpoint = name, loop, endpoint
        self._restore, self._ended, self._patience = restore, ended, patience
        self._pause = 0.0
        self._since = 0.0
        self._told: set[str] = set()
        self._timer: Timer | None = None
        self._thread: Thread | None = None
        self._cancelled = False

    def begin(self, worked: bool) -> None:
        """The backend is lost; `worked` says whether it had done anything.

        One that had is looked for at once.  Pauses go on growing otherwise, so that a backend
        that ends as soon as it is started is not started all the time.
        """
        if worked:
            self._pause = 0.0
            self._told.clear()
        self._since = monotonic()
        self._schedule()

    def cancel(self) -> None:
        """Start no further attempt; harmless at any time."""
        self._cancelled = True
        if self._timer is not None:
            self._timer.cancel()

    def join(self, seconds: float) -> None:
        """Wait for an attempt to end; whoever cancels one also ends its connection."""
        if self._thread is not None and not self._thread.join(seconds):
            log.warn(f"{self._name}: a thread that reconnects did not end in time; it is left behind")

    def _schedule(self) -> None:
        pause = self._pause
        self._pause = min(max(2 * pause, FIRST_PAUSE), self._endpoint.longest_pause)
        if self._patience:
            pause = max(0.0, min(pause, self._since + self._patience - monotonic()))
        if not self._cancelled:
            self._timer = self._loop.call_later(pause, self._try)

    def _try(self) -> None:
        if self._thread is not None:
            self._schedule()  # the attempt that was successful for a moment has not been reported yet
            return
        try:
            sock = self._endpoint.reconnect()
        except (ConfigError, OSError) as error:
            self._tell(str(error), f"no backend can be had: {error}")
            self._failed(error)
            return
        if sock is None:
            self._failed(None)
        else:
            self._thread = Thread(self._attempt, sock)

    def _attempt(self, sock: socket) -> None:
        """In the thread."""
        failure: Exception | None = None
        try:
            self._restore(sock)
        except (ProtocolError, ConfigError, OSError) as error:
            failure = error
        except Exception as error:  # a fault of ours must not be the silent end of looking for others
            failure = _told_in_full(error)
        self._loop.call_soon_threadsafe(lambda: self._attempted(failure))

    def _attempted(self, failure: Exception | None) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        if self._cancelled:
            return
        if failure is None:
            self._ended("")
            return
        if isinstance(failure, Abandoned):
            self._schedule()
            return
        self._endpoint.explain_later(self._loop, lambda known: self._refused(failure, known))

    def _refused(self, failure: Exception, known: str) -> None:
        if not self._cancelled:
            self._tell(known or str(failure), f"a backend came and cannot be used: {failure}{known}")
            self._failed(failure)

    def _tell(self, reason: str, text: str) -> None:
        """Each reason once, until a backend has worked again."""
        if reason not in self._told:
            self._told.add(reason)
            log.warn(f"{self._name}: {text}")

    def _failed(self, failure: Exception | None) -> None:
        useless = isinstance(failure, LocalProtocolError) or (
            isinstance(failure, Unfit) and self._endpoint.same_again
        )
        if useless:
            self._ended(str(failure))
        elif self._patience and monotonic() - self._since >= self._patience:
            self._ended(f"none came back within {self._patience:g} s")
        else:
            self._schedule()


def _told_in_full(error: Exception) -> Exception:
    """The same with its name for the user, and where it came from for those who asked for detail."""
    if log.level >= log.DEBUG:
        from traceback import format_exception

        log.debug("".join(format_exception(error)))
    return Exception(f"{type(error).__name__}: {error}")
