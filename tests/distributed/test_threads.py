"""Ranks as threads end together: nothing that goes wrong on one leaves the others waiting."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any

import pytest

import subquad.distributed as sd

from . import threads
from .threads import on_ranks, taken


def test_an_error_of_one_rank_ends_those_that_wait() -> None:
    box: SimpleQueue[int] = SimpleQueue()

    def body(rank: int) -> Any:
        if rank == 1:
            raise KeyError("of rank 1")
        return sd.agree(here=True) if rank else taken(box)

    with pytest.raises(KeyError, match="of rank 1"):
        on_ranks(3, body)


def test_a_rank_that_returns_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "LONGEST", 0.3)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 2\] still wait for others"):
        on_ranks(3, lambda rank: None if rank == 1 else sd.agree(here=True))
    assert on_ranks(2, lambda rank: rank) == [0, 1]
