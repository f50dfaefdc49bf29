"""Any bytes as kernel: a boot or a ConfigError, nothing else."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from fakes import kernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm import layout
from pyvmm.boot.load import load
from pyvmm.config import PayloadConfig
from pyvmm.errors import ConfigError

SIZE = 16 << 20
SEEDS = {
    "elf": kernels.elf(notes=kernels.pvh_note()),
    "elf32": kernels.elf(notes=kernels.pvh_note(width=4), bits=32),
    **{name: kernels.bzimage(kernels.payload(kernels.elf(), name)) for name in kernels.COMPRESSORS},
}
# The headers are where a changed byte means most: boot sector end, setup header, ELF headers.
PLACES = st.one_of(st.integers(0, 0xFF), st.integers(0x1F0, 0x270), st.integers(0x1000, 0x1500))
EDITS = st.lists(
    st.tuples(PLACES, st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255)), max_size=6
)


@pytest.fixture(scope="module", autouse=True)
def own_cache() -> object:
    """One cache for the module, since hypothesis calls a test many times."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", directory)
        yield


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("protocol", ["auto", "bzimage"])
@given(edits=EDITS, length=st.none() | st.integers(0, 6000))
def test_edited_kernels(
    tmp_path: Path, seed: str, protocol: str, edits: list[tuple[int, int]], length: int | None
) -> None:
    data = bytearray(SEEDS[seed][:length])
    for at, value in edits:
        if at < len(data):
            data[at] = value
    path = tmp_path / "kernel"
    path.write_bytes(data)
    descriptors = len(os.listdir("/proc/self/fd"))
    try:
        load(
            PayloadConfig(str(path), protocol=protocol),
            memoryview(bytearray(SIZE)),
            layout.ram_ranges(SIZE),
            0xE_0000,
        )
    except ConfigError as error:
        assert str(error).startswith(f"kernel {path}: ")
        assert "\n" not in str(error)
    assert len(os.listdir("/proc/self/fd")) == descriptors
