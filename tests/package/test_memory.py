"""Memory for what is read whole at every step: huge pages are asked for, and nothing else changes."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

import subquad
from subquad import _memory


class Advised:
    """The system's call, as `ctypes.CDLL(None)` gives it."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def madvise(self, start: Any, size: Any, advice: int) -> int:
        self.ranges.append((start.value, size.value))
        return 0


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> Advised:
    calls = Advised()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: calls)
    monkeypatch.setattr(_memory, "_ADVICE", 14)
    return calls


def test_large_memory_is_asked_for_in_huge_pages(advised: Advised) -> None:
    small = _memory.zeros(1000, dtype=torch.float32, device=None)
    assert not advised.ranges and not small.any()
    large = _memory.zeros(3 << 20, dtype=torch.float32, device=None)
    ((start, size),) = advised.ranges
    assert large.data_ptr() <= start and start + size <= large.data_ptr() + large.nbytes and not large.any()
    assert size > large.nbytes - 2 * 4096 and start % 4096 == 0
    assert _memory.empty(3 << 20, dtype=torch.float32, device=torch.device("meta")).is_meta and len(advised.ranges) == 1


def test_what_settles_is_the_same(advised: Advised) -> None:
    small, large = torch.arange(10), torch.arange(2 << 20)
    assert _memory.settled(small) is small
    moved = _memory.settled(large)
    assert torch.equal(moved, large) and moved.data_ptr() != large.data_ptr() and len(advised.ranges) == 1


def test_codes_are_in_such_memory(advised: Advised) -> None:
    weight = torch.randn(4096, 2048, generator=torch.Generator().manual_seed(0))
    data = subquad.quantise(weight, "int8")
    assert len(advised.ranges) == 1
    assert torch.equal(data[7:9], subquad.quantise(weight[7:9], "int8"))
