"""Fixtures for tests that boot Linux: the machine to do it in, kernels, scratch directories."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest.machines import LabMachine, Machine

from pyvmm.errors import ConfigError
from pyvmm.guest import initramfs
from pyvmm.host import accel, kernels, own_kernel
from pyvmm.host.kernels import Kernel
from pyvmm.run import unpack_ahead

# For a command that runs out of time in the emulated machine, a new machine, and the command once more.
LIMIT = 900


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("timeout") is None:
        item.add_marker(pytest.mark.timeout(LIMIT))


@pytest.fixture(scope="session")
def debian_kernel() -> Kernel:
    """Debian's cloud kernel, with its payload unpacked and its initramfs made."""
    return _prepared(kernels.fetch_kernel())


@pytest.fixture(scope="session")
def own() -> Kernel:
    """The small kernel of our own, built now if it is not cached."""
    try:
        return _prepared(own_kernel.build())
    except ConfigError as error:
        pytest.skip(str(error))


def _prepared(kernel: Kernel) -> Kernel:
    """What would take long in the emulated machine is done before it starts."""
    initramfs.for_kernel(kernel.modules)
    unpack_ahead(kernel.path)
    return kernel


@pytest.fixture(scope="session")
def machine(
    tmp_path_factory: pytest.TempPathFactory, own: Kernel, debian_kernel: Kernel
) -> Iterator[Machine]:
    """Where guests run in this test run; one for all tests."""
    shared = tmp_path_factory.mktemp("shared")
    reason = accel.why_not()
    machine = LabMachine(shared) if reason else Machine(shared)
    yield machine
    machine.close()


@pytest.fixture
def scratch(machine: Machine, request: pytest.FixtureRequest) -> Iterator[Path]:
    """An empty directory that the tests, the machine and (as a share) its guests all see."""
    folder = machine.shared / request.node.name.replace("/", "_")[:80]
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
