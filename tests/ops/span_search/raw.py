"""Calls of raw operators in the emulator, their arguments by name, shared by the tests of both span operators."""

from __future__ import annotations

import ctypes
from typing import Any, Self

import torch

from subquad.contract import HANDLES
from subquad.testing.compare import assert_same_bits
from subquad.testing.instruments import Traffic, traffic

Results = tuple[torch.Tensor, ...]


class RawCall:
    """One call of `operator`: `args` in the order of its schema.

    Attributes:
        operator: its name.
        rows: arguments that have a row for every query.
    """

    operator: str
    rows: tuple[str, ...]
    args: dict[str, Any]

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=torch.int32)

    def run(self) -> Results:
        return tuple(HANDLES["simt"][self.operator](*self.args.values()))

    def token(self, n: int) -> Self:
        """The call with query n alone."""
        alone = type(self).__new__(type(self))
        held = {name: self.args[name] for name in self.rows if self.args[name] is not None}
        alone.args = self.args | {name: x[:, n : n + 1].contiguous() for name, x in held.items()}
        return alone

    def traffic(self, emulator: ctypes.CDLL) -> Traffic:
        return traffic(emulator, self.run)


def assert_same(found: Results, first: Results, what: str) -> None:
    for a, b in zip(found, first, strict=True):
        assert_same_bits(a, b, what)
