"""Plans of faults: how they are written, and what is none."""

from __future__ import annotations

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from pyvmm.backend.echo import Echo
from pyvmm.backend.faults import Faults
from pyvmm.errors import ConfigError


def test_parse():
    plan = Faults.parse("seed=7,after=100,drop=0.01,duplicate=5+6,delay-seconds=2")
    assert (plan.seed, plan.after, plan.delay_seconds) == (7, 100, 2.0)
    assert plan.rules == {"drop": 0.01, "duplicate": {5, 6}}


@pytest.mark.parametrize(
    ("text", "rule"),
    [("5", {5}), ("0", {0}), ("1", {1}), ("0x10+2", {16, 2})]
    + [("1.0", 1.0), (".5", 0.5), ("1e-3", 0.001), ("0.", 0.0)],
)
def test_number_or_chance(text, rule):
    """The same from Python: an int is a number, a float a chance."""
    assert Faults.parse(f"drop={text}").rules == {"drop": rule}
    only = min(rule) if isinstance(rule, set) and len(rule) == 1 else rule
    assert Faults(drop=only).rules == {"drop": rule}


NEITHER = "a chance from 0.0 to 1.0, or numbers of chains joined with +, are needed"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("dorp=0.1", "no such fault"),
        *((f"drop={value}", NEITHER) for value in ("often", "-0.5", "7.0", "5.", "-5", "1+x", "nan", "")),
        ("drop", NEITHER),
        ("drop=0.1,", NEITHER),
        ("seed=x", "a number is needed"),
        ("after=0.5", "a number of chains is needed"),
        ("features=1+2", "a word of feature bits is needed"),
        ("features=-1", "a word of feature bits is needed"),
        ("features=0x10000000000000000", "a word of feature bits is needed"),
        ("delay_seconds=soon", "a time in seconds is needed"),
        ("delay-seconds=-1", "a time in seconds is needed"),
        ("delay_seconds=inf", "a time in seconds is needed"),
    ],
)
def test_plans_that_are_none(text, wanted):
    with pytest.raises(ConfigError) as caught:
        Faults.parse(text)
    assert wanted in str(caught.value)


@pytest.mark.parametrize("rule", [True, {0.5}, {-1}, "5"])
def test_rules_that_are_none(rule):
    with pytest.raises(ConfigError):
        Faults(drop=rule)


def test_native_loops_take_none():
    with pytest.raises(ConfigError, match="loop of its own"):
        Faults(drop=0.5).attach(Echo())
    Faults(drop=0.5).attach(Echo(native=False))
