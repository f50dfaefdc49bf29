"""What every test shares: skips that nobody expected are failures under CI.

A skip is honest on a developer's machine that lacks something.  Where CI=true is set, every
reason must be on this list, so that a test cannot fall silent.
"""

from __future__ import annotations

import os
import re
import signal

import pytest

# What a test machine may lack: drivers newer than Debian 12's, and some hosts' KVM emulates
# the guest's kernel mode, incompletely.  Not root and its privileges: without mount namespaces and other
# users, what protects the host would go untested.
EXPECTED_SKIPS = (
    "can: Linux 6.1 has no driver",
    "this KVM emulates ring 0 and does not emulate stmxcsr",
)


def pytest_configure() -> None:
    """Under `nohup`, and behind a script's `&`, programs started here would ignore what tests send them.

    A handler, unlike SIG_IGN, is not handed down.
    """
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    """Turn a skip with an unlisted reason into a failure, when CI asks for it."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(re.search(pattern, reason) for pattern in EXPECTED_SKIPS):
            report.outcome = "failed"
            report.longrepr = f"a skip that CI does not expect: {reason}"
    return report
