"""Records are what frozen dataclasses are."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pyvmm.record import Record


class Point(Record):
    x: int
    y: int = 2


class Named(Point):
    name: str = "p"


def test_fields_defaults_order_and_inheritance() -> None:
    assert (Point(1).x, Point(1).y) == (1, 2)
    assert Named(1, name="q") == Named(1, 2, "q")
    assert repr(Named(1)) == "Named(x=1, y=2, name='p')"


def test_value_semantics() -> None:
    assert Point(1) == Point(1, 2) != Point(2)
    assert len({Point(1), Point(1, 2), Point(3)}) == 2
    assert Point(1) != Named(1)
    assert Point(1).replace(y=5) == Point(1, 5)


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"x": 2}), ((1,), {"z": 2})])
def test_wrong_fields_are_errors(args: tuple[int, ...], kwargs: dict[str, int]) -> None:
    with pytest.raises(TypeError, match="Point"):
        Point(*args, **kwargs)


def test_immutable() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        Point(1).x = 2  # type: ignore[misc]


def test_importing_it_is_cheap() -> None:
    code = "import sys; before = set(sys.modules); import pyvmm.record; print(*set(sys.modules) - before)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(out.stdout.split()) == {"pyvmm", "pyvmm.record", "__future__"}
