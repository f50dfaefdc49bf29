"""What becomes of a command whose guest says nothing any more; `tests/guest/test_run.py` has the rest."""

from __future__ import annotations

from typing import Any

import pytest

from pyvmm import run as runner
from pyvmm.errors import GuestError
from pyvmm.vm import STOPPED, Outcome


class SilentVm:
    """A machine that runs on although nobody is at the other end of its command's port."""

    def __init__(self, config: Any, loop: Any) -> None:
        self.loop = loop
        self.hung: list[bool] = []

    def run(self) -> Outcome:
        self.loop.call_later(20, lambda: (self.hung.append(True), self.loop.stop()))
        self.loop.run()
        assert not self.hung
        return Outcome(STOPPED)

    def close(self) -> None:
        """Nothing was started."""


def test_a_guest_whose_streams_are_lost_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when their backend was killed, and is not to end the machine: no status can come any more."""
    monkeypatch.setattr(runner, "Vm", SilentVm)
    monkeypatch.setattr(runner, "POWER_OFF_SECONDS", 0.01)
    run = runner.CommandRun(runner.RunConfig(("true",), "vmlinux", "", on_backend_loss="fail"))
    try:
        with pytest.raises(GuestError, match="the streams of its command were lost") as caught:
            run.run(None, None, None)
    finally:
        run.close()
    assert caught.value.exit_status == 70
