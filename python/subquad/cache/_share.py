"""Which tokens of a sequence a cache holds: all of them, or every R-th."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

Number = TypeVar("Number", int, torch.Tensor)


@dataclass(frozen=True)
class Share:
    """Tokens `rank`, `rank + size`, `rank + 2 size`, ... of every sequence, which are numbered 0, 1, 2, ... by themselves."""

    rank: int = 0
    size: int = 1

    def count(self, n: Number) -> Number:
        """How many of the first n >= 0 tokens are held, which is also the number of the first one held at or behind token n."""
        return (n - self.rank + self.size - 1) // self.size

    def token(self, number: torch.Tensor) -> torch.Tensor:
        """Of a number; negative for a negative one."""
        return number * self.size + self.rank

    def most(self, n: int) -> int:
        """The most that are held of any n tokens in a row."""
        return -(-n // self.size)

    def columns(self, seen: torch.Tensor, width: int) -> torch.Tensor:
        """[B, most(width)]: which of `width` new columns behind `seen` [B, 1] hold such tokens; numbers from `width` on: none."""
        return (self.rank - seen) % self.size + self.size * torch.arange(self.most(width), device=seen.device)
