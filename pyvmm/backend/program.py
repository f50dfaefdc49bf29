"""The command line of our backends: QEMU's "Backend program conventions" (vhost-user.rst).

It owns `--socket-path`, `--fd` and `--print-capabilities`, and what a stop by signal means.
It must not know any device.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from _socket import socket
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .. import log
from ..errors import EXIT_CONFIG, ConfigError
from ..options import integer
from .device import Device
from .loop import DeviceLoop
from .server import serve, socket_at

TYPES = {"blk": "block"}  # where QEMU's vhost-user.json has another name for the kind
# name, default (a list: may be repeated; False: a switch; None: must be given), help
Options = Sequence[tuple[str, str | list[str] | bool | None, str]]


def main(
    kind: str,
    make: Callable[[argparse.Namespace], Device],
    options: Options = (),
    argv: list[str] | None = None,
    *,
    features: Sequence[str] = (),
) -> NoReturn:
    """Parse `argv`, serve `make(arguments)` until SIGTERM, SIGHUP or Ctrl-C, and exit.

    What the user can mend is one line and status 2: ConfigError at any time, and OSError and ValueError of
    `make` and of the socket, with a traceback only for `-vv`.  What a method of the device's raises beyond
    ConfigError is a bug and propagates.  `features` are those of docs/interop/vhost-user.json that the
    options offer.
    """
    parser = _parser(kind, options)
    arguments = parser.parse_args(argv)
    if arguments.print_capabilities:
        _print(kind, json.dumps({"type": TYPES.get(kind, kind), "features": list(features)}))
    for name, default, _ in options:
        if default is None and getattr(arguments, name[2:].replace("-", "_")) is None:
            parser.error(f"{name} must be given")
    log.level = min(arguments.verbose, log.DEBUG)
    loop = DeviceLoop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda *_: loop.stop())
    try:
        sock, remove = _socket(arguments)
    except ConfigError as error:
        _refuse(kind, error)
    try:
        try:
            device = _device(make, arguments)
        except (ConfigError, OSError, ValueError) as error:
            _refuse(kind, error)
        try:
            serve(device, sock, loop=loop)
        except ConfigError as error:
            _refuse(kind, error)
    finally:
        remove()
    sys.exit(0)


def count(name: str, text: str, most: int) -> int:
    """The value of an option that is a number from 1 on; ConfigError when it is none."""
    try:
        value = integer(text)
    except ValueError:
        value = 0
    if not 1 <= value <= most:
        raise ConfigError(f"{name} {text}: a number from 1 to {most} is needed")
    return value


def _socket(arguments: argparse.Namespace) -> tuple[socket, Callable[[], None]]:
    by_path = arguments.fd is None
    where = arguments.socket_path if by_path else arguments.fd
    try:
        return socket_at(where)
    except (OSError, ValueError, OverflowError) as error:
        what = f"--socket-path {where}" if by_path else f"--fd {where}"
        cure = "give a path where nothing is yet" if by_path else "pass a Unix stream socket"
        raise ConfigError(f"{what}: {getattr(error, 'strerror', None) or error}; {cure}") from None


def _print(kind: str, text: str) -> NoReturn:
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more at its end
        _refuse(kind, error)
    sys.exit(0)


def _device(make: Callable[[argparse.Namespace], Device], arguments: argparse.Namespace) -> Device:
    device = make(arguments)
    if arguments.faults:
        from .faults import Faults

        Faults.parse(arguments.faults).attach(device)
    return device


def _refuse(kind: str, error: Exception) -> NoReturn:
    log.warn(f"{kind} backend: {error}")
    if not isinstance(error, ConfigError):
        log.debug("".join(traceback.format_exception(error)))
    sys.exit(EXIT_CONFIG)


def _parser(kind: str, options: Options) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_name(), description=f"A vhost-user {kind} backend.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--socket-path", metavar="PATH", type=_some, help="listen here, again after each frontend"
    )
    where.add_argument("--fd", type=int, metavar="N", help="use this socket, connected or listening")
    where.add_argument("--print-capabilities", action="store_true", help="describe the backend as JSON")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say more; twice for details")
    parser.add_argument(
        "--faults",
        metavar="PLAN",
        type=_some,
        help="misbehave on purpose: seed=N,after=N,FAULT=CHANCE or FAULT=N+N...",
    )
    for name, default, text in options:
        parser.add_argument(name, default=default, help=text, **_action(default))
    return parser


def _name() -> str:
    """How this program is started: `python -m MODULE`, or its file."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name}" if spec is not None else os.path.basename(sys.argv[0])


def _action(default: object) -> dict[str, Any]:
    """What an option does, by its default."""
    if isinstance(default, list):
        return {"action": "append", "type": _some}
    if default is False:
        return {"action": "store_true"}
    return {} if default == "" else {"type": _some}


def _some(text: str) -> str:
    """Mostly an empty value comes of a variable without one; as a path it would be any socket's."""
    if not text:
        raise argparse.ArgumentTypeError("an empty value")
    return text
