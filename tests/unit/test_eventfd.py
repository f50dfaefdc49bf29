"""Whatever a peer does to a shared eventfd, nobody waits for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from pyvmm import eventfd

FULL = (1 << 64) - 2


@pytest.fixture(params=[False, True], ids=["nonblocking", "made blocking"])
def fd(request: pytest.FixtureRequest) -> Iterator[int]:
    fd = eventfd.create()
    assert not os.get_blocking(fd) and not os.get_inheritable(fd)
    os.set_blocking(fd, bool(request.param))
    yield fd
    os.close(fd)


def test_what_is_one(fd: int) -> None:
    assert eventfd.is_eventfd(fd)
    assert not eventfd.is_eventfd(1 << 20)


@pytest.mark.parametrize("name", ["eventfd", "anon_inode:[eventfd]"])
def test_a_file_is_none_whatever_its_name(name: str, tmp_path: Path) -> None:
    with open(tmp_path / name, "w") as file:
        assert not eventfd.is_eventfd(file.fileno())


def test_drain(fd: int) -> None:
    assert not eventfd.drain(fd)
    os.eventfd_write(fd, 3)
    assert eventfd.drain(fd)
    assert not eventfd.drain(fd)


def test_signal(fd: int) -> None:
    eventfd.signal(fd)
    eventfd.signal(fd)
    assert os.eventfd_read(fd) == 2


def test_a_full_counter(fd: int) -> None:
    os.eventfd_write(fd, FULL)
    eventfd.signal(fd)
    assert os.eventfd_read(fd) == FULL


def test_room_is_made_in_a_full_counter_alone(fd: int) -> None:
    os.eventfd_write(fd, 5)
    eventfd.make_room(fd)
    assert os.eventfd_read(fd) == 5
    os.eventfd_write(fd, FULL)
    eventfd.make_room(fd)
    assert not eventfd.drain(fd)


def test_who_waits_for_room_goes_on() -> None:
    fd = os.eventfd(0)
    os.eventfd_write(fd, FULL)
    thread = Thread(target=os.eventfd_write, args=(fd, 1))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    eventfd.make_room(fd)
    thread.join()
    assert os.eventfd_read(fd) == 1
    os.close(fd)
