"""What a machine does about memory that its guest reached and that is not there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fakes.devices import FakeLoop, FakeVm

from pyvmm import config as cfg
from pyvmm.board import Board, places
from pyvmm.layout import ram_ranges


class Mappings:
    """`broken` of `count` mappings have no memory."""

    def __init__(self, count: int, broken: int) -> None:
        self.count, self.broken = count, broken

    def drop_broken(self, *, every: bool = False) -> int:
        gone = self.count if every else self.broken
        self.count, self.broken = self.count - gone, 0
        return gone


class Frontend:
    def __init__(self, count: int, broken: int) -> None:
        self.mappings = Mappings(count, broken)


@pytest.fixture
def board() -> Iterator[Board]:
    config = cfg.VmConfig(cfg.PayloadConfig("vmlinux"))
    board = Board(FakeVm(), ram_ranges(1 << 30), config, FakeLoop(), lambda: None, lambda: None)  # type: ignore[arg-type]
    yield board
    board.close()


def test_nothing_can_be_mended_where_nothing_is_mapped(board: Board) -> None:
    assert board.mend_memory(0) == 0


def test_what_is_broken_is_taken_away_first_and_then_the_rest(board: Board) -> None:
    innocent, guilty = Frontend(2, 0), Frontend(4, 3)
    board._mapping += [innocent, guilty]  # type: ignore[list-item]
    assert board.mend_memory(0) == 3
    assert (innocent.mappings.count, guilty.mappings.count) == (2, 1)
    assert board.mend_memory(3) == 6  # whatever it was, it is not there any more
    assert board.mend_memory(6) == 6  # so it was something else


def test_two_cpus_in_one_broken_mapping_cost_no_other(board: Board) -> None:
    innocent, guilty = Frontend(2, 0), Frontend(1, 1)
    board._mapping += [innocent, guilty]  # type: ignore[list-item]
    assert [board.mend_memory(0) for _ in range(2)] == [1, 1]
    assert (innocent.mappings.count, guilty.mappings.count) == (2, 0)


def test_slots_that_are_asked_for_are_left_free_by_others() -> None:
    wanted = (0, 2, 0, 31, 0)
    assert places([cfg.RngDevice(pci_device_id=slot) for slot in wanted]) == [1, 2, 3, 31, 4]
    assert places([cfg.RngDevice()] * 31 + [cfg.ConsoleDevice(cfg.StreamConfig())])[30:] == [31, None]
