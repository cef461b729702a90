"""iLLaMA's soft causal mask, between full and causal attention."""

from __future__ import annotations

import torch

from ..masks import IntervalMask
from ._lse import with_lse

NORMS = ("masked", "full")


def soft_causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alpha: float,
    *,
    norm: str = "masked",
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Causal attention in which the future counts by a factor alpha, from full (1) to causal (0) attention.

    Both forms are exact mixes of two calls through their log-sum-exp, without a [T, T] tensor, and differentiable.

    Args:
        q, k, v: as in `interval_attention`, of equal length.
        alpha: in [0, 1].
        norm: "masked" adds log(alpha) to the scores of future keys: a softmax, causal at alpha = 0. "full" is what the released
            code of iLLaMA computes: softmax over all keys, then future weights times alpha. Its denominators see the future
            even at alpha = 0, so it is never causal and its keys cannot be cached; use it for checkpoints trained so.
        scale, backend: as in `interval_attention`.

    Returns:
        [B, T, H, Dv] in q's dtype.

    Raises:
        ValueError: alpha outside [0, 1], an unknown norm, unequal lengths.

    Source: iLLaMA, arXiv 2404.06773, for the mask; the mixes are this project's.
    """
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(map(repr, NORMS))}, got {norm!r}")
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"k: expected {q.shape[1]} tokens as q has, got {k.shape[1]}")
    t = q.shape[1]
    causal, lse_causal = with_lse(q, k, v, IntervalMask.causal(), scale, backend)
    if norm == "full":
        full, lse_full = with_lse(q, k, v, IntervalMask.full(), scale, backend)
        past = (1.0 - alpha) * torch.exp(lse_causal - lse_full)
        out = past[..., None] * causal.to(past.dtype)
        if alpha > 0.0:  # at 0 a NaN among the values of the future must not come through
            out = out + alpha * full.to(past.dtype)
        return out.to(q.dtype)
    if alpha == 0.0 or t == 0:
        return causal
    future, lse_future = with_lse(q, k, v, ~IntervalMask.causal(t, t).materialize(device=q.device), scale, backend)
    weight = torch.sigmoid(
        lse_future + torch.log(torch.tensor(alpha)).item() - lse_causal
    )  # the last row has no future
    return (causal + weight[..., None] * (future.to(weight.dtype) - causal)).to(q.dtype)
