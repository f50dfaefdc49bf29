"""What users of the library see of it says what it is, and where the specification does."""

from __future__ import annotations

import inspect
import re

import pytest

pytest.importorskip("pyvmm._native.vring", reason="the compiled core is not built")

from pyvmm import backend

CLASSES = (backend.Chain, backend.ConfigSpace, backend.Device, backend.Queue, backend.SharedMemory)
SECTIONS = {  # of virtio 1.3, and words for what only vhost-user knows
    "Chain": ("2.7.4", {"push": "2.7.8", "used_length": "2.7.8", "written": "2.7.8"}),
    "ConfigSpace": ("2.5", {}),
    "Device": (
        "5",
        {
            "queues": "2.6",
            "offer": "2.2",
            "on_features": "2.2",
            "on_start": "Ring states",
            "on_queue": "2.9",
            "on_stop": "Ring states",
            "on_reset": "2.4",
            "on_config_read": "2.5",
            "on_config_write": "2.5",
            "save_state": "Migrating back-end state",
            "config_changed": "3.2.1",
        },
    ),
    "Queue": ("2.6", {"pop": "2.7.6", "notify": "2.7.7"}),
    "SharedMemory": ("2.10", {"map": "SHMEM_MAP", "unmap": "SHMEM_UNMAP"}),
}

FIELDS = {"pushed"}  # of the compiled core, which have no text but the class's


def members(cls):
    """The public methods and properties of the class itself."""
    for name, member in vars(cls).items():
        if not name.startswith("_") and (callable(member) or inspect.isdatadescriptor(member)):
            yield name, member


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_everything_is_explained(cls):
    silent = {name for name, member in members(cls) if not inspect.getdoc(member)}
    assert silent <= FIELDS
    assert all(f"`{name}`" in cls.__doc__ for name in silent)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_sections_are_named(cls):
    whole, parts = SECTIONS[cls.__name__]
    assert re.search(rf"(?:section|sections) {re.escape(whole)}\b", inspect.getdoc(cls))
    for name, text in parts.items():
        assert re.search(rf"\b{re.escape(text)}\b", inspect.getdoc(getattr(cls, name))), name
