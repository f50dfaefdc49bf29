"""`pyvmm trace` with recordings of the proxy."""

from __future__ import annotations

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from native.backend.test_proxy import Listener, Odd, Upper, plug, recording  # noqa: F401 (fixtures)

from pyvmm.cli import main


def test_show(recording, capsys):  # noqa: F811
    assert main(["trace", "show", str(recording[0])]) == 0
    shown = capsys.readouterr().out
    assert "SET_MEM_TABLE" in shown
    assert "(memfd, memfd)" in shown
    assert "readable 3, writable 3" in shown


@pytest.mark.parametrize(("make", "status"), [(Upper, 0), (Odd, 1)])
def test_replay(recording, tmp_path, capsys, make, status):  # noqa: F811
    path = str(tmp_path / "socket")
    backend = Listener(make(), path)
    try:
        assert main(["trace", "replay", str(recording[0]), "--to", path]) == status
    finally:
        backend.close()
    assert ("GET_CONFIG" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize(
    "words",
    [[], ["show"], ["draw", "x"], ["show", "/none"], ["replay", "/none"], ["replay", "/x", "--to", "/y"]],
)
def test_what_is_wrong_is_one_line(words, capfd):
    assert main(["trace", *words]) == 2
    assert capfd.readouterr().err.count("\n") == 1
