"""The device status machine: which status a driver may write when, and what that starts.

The table is the whole of virtio 2.1 and 3.1.1 as far as the driver's bits go.  The
device's own bit, DEVICE_NEEDS_RESET, is kept out of it: a driver writes it back as it read
it.  It must not know what the actions do.
"""

from __future__ import annotations

from .spec import ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET

RESET, ACCEPT, NEGOTIATE, ACTIVATE = "reset", "accept", "negotiate", "activate"
DRIVER_BITS = 0xFF & ~NEEDS_RESET

_FOUND = ACKNOWLEDGE
_DRIVEN = ACKNOWLEDGE | DRIVER
_AGREED = _DRIVEN | FEATURES_OK
_RUNNING = _AGREED | DRIVER_OK
_STATES = (0, _FOUND, _DRIVEN, _AGREED, _RUNNING)

# (status now, status written) -> action.  A pair that is not here is the driver's mistake.
TRANSITIONS: dict[tuple[int, int], str] = {
    (0, _FOUND): ACCEPT,
    (0, _DRIVEN): ACCEPT,  # firmware sets both bits at once
    (_FOUND, _DRIVEN): ACCEPT,
    (_DRIVEN, _AGREED): NEGOTIATE,
    (_AGREED, _RUNNING): ACTIVATE,
    **{(state, state): ACCEPT for state in _STATES},
    **{(state, state | FAILED): ACCEPT for state in _STATES},
    **{(state | FAILED, state | FAILED): ACCEPT for state in _STATES},
    **{(state, 0): RESET for state in _STATES},
    **{(state | FAILED, 0): RESET for state in _STATES},
}


def transition(status: int, written: int) -> str | None:
    """Action for a driver that writes `written` over `status`; None when it must not."""
    if written == NEEDS_RESET:
        return None  # only a plain 0 resets
    return TRANSITIONS.get((status & DRIVER_BITS, written & DRIVER_BITS))
