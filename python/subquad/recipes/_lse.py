"""Attention and its log-sum-exp, with which parts are mixed."""

from __future__ import annotations

import torch

from ..masks import IntervalMask
from ..ops.interval_attention import interval_attention


def with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: IntervalMask, scale: float | None, backend: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of `interval_attention`."""
    result = interval_attention(q, k, v, mask, scale=scale, return_lse=True, backend=backend)
    assert isinstance(result, tuple)
    return result
