"""Every exception that pyvmm raises on purpose, and the exit status each one means.

Whoever catches an error decides by its class alone: a `ConfigError` is for the user
to mend, a `ProtocolError` costs one device, a `KvmError` is the host's refusal, and a
`GuestError` is the end of a guest.  Messages are one line that names the cause and
the cure.  Nothing here knows where an error is raised.
"""

from __future__ import annotations

EXIT_CONFIG = 2
EXIT_TIMEOUT = 124
EXIT_PANIC = 125
EXIT_CRASH = 126
EXIT_VMM = 70


class PyvmmError(Exception):
    """Base class; never raised itself.  `exit_status` is what the process ends with."""

    exit_status = EXIT_VMM


class ConfigError(PyvmmError):
    """An option, a file or the host is not as it must be; the message says how to mend it."""

    exit_status = EXIT_CONFIG


class KvmError(PyvmmError, OSError):
    """KVM refused an operation; carries `errno` like any OSError."""


class ProtocolError(PyvmmError):
    """The vhost-user dialogue broke; the device is lost, the VMM is not."""


class LocalProtocolError(ProtocolError):
    """We were about to send something that the protocol forbids: a bug here."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something that the protocol forbids."""


class BackendLost(RemoteProtocolError):
    """The peer closed the connection, refused, or missed a deadline."""


class GuestError(PyvmmError):
    """The guest ended in a way that nobody asked for."""


class GuestPanic(GuestError):
    """The guest's kernel panicked."""

    exit_status = EXIT_PANIC


class GuestTimeout(GuestError):
    """The guest did not finish in the time allowed."""

    exit_status = EXIT_TIMEOUT


class GuestCrash(GuestError):
    """A virtual CPU cannot go on: triple fault, or KVM gave up on it."""

    exit_status = EXIT_CRASH
