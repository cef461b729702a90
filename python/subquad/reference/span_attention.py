"""Attention of every query to spans of its own: the dense definition.

s_j = scale * q . k_j. A slot's softmax is over the keys of its span [start, end] and the terms of `base`, another softmax of
which the result and the log-sum-exp are known. With a gate, out = sum_s gate_s out_s over the softmaxes of the slots; without,
one softmax takes all spans together, a key as often as spans hold it.

Source: arXiv 2601.18401 (Superlinear, gated); MoBA (2502.13189) and NSA (2502.11089) for blocks under one softmax.
"""

from __future__ import annotations

import torch

from ._common import upcast
from .interval_attention import interval_attention
from .span_search import unpaged

_NEVER = torch.iinfo(torch.int32).max


def span_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    gate: torch.Tensor | None,
    base_out: torch.Tensor | None,
    base_lse: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    block_table: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, T, H, Dv] in q's dtype, lse [B, T, H, S] with a gate, [B, T, H, 1] without); differentiable.

    q is [B, T, H, D], k [B, N, Hkv, D], v [B, N, Hkv, Dv]; start, end (inclusive) and gate [B, T, H, S]; base_out
    [B, T, H, Dv] and base_lse [B, T, H]; key_mask [B, N].
    """
    out, lse = slots(q, unpaged(k, block_table), unpaged(v, block_table), start, end, key_mask, scale)
    mixed, lse = mix(out, lse, gate, base_out, base_lse)
    return mixed.to(q.dtype).contiguous(), lse.contiguous()


def slots(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every span by itself: (out [B, T, H, S, Dv], lse [B, T, H, S]), 0 and -inf where it is empty."""
    tokens, spans = start.shape[1], start.shape[3]
    rows = upcast(q)[:, :, None].expand(-1, -1, spans, -1, -1).flatten(1, 2)[:, :, :, None]  # [B, T * S, H, 1, D]
    starts, ends = (x.permute(0, 2, 1, 3).flatten(2)[..., None] for x in (start, end.long() + 1))
    key_start = key_stop = None
    if key_mask is not None:
        key_stop = torch.full_like(key_mask, _NEVER, dtype=torch.int32)[:, None]
        key_start = key_stop.masked_fill(key_mask[:, None], 0)
    out, lse = interval_attention(
        rows, upcast(k), upcast(v), starts, ends, key_start, key_stop, 0, -1, False, None, None, None, scale, 0.0
    )
    return out.unflatten(1, (tokens, spans)).transpose(2, 3), lse.unflatten(1, (tokens, spans)).transpose(2, 3)


def mix(
    out: torch.Tensor,
    lse: torch.Tensor,
    gate: torch.Tensor | None,
    base_out: torch.Tensor | None,
    base_lse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots [B, T, H, S, Dv] and their lse [B, T, H, S] -> (out [B, T, H, Dv], lse [B, T, H, S or 1])."""
    if base_out is None or base_lse is None:
        base_out, base_lse = torch.zeros_like(out[..., 0, :]), torch.full_like(lse[..., 0], -torch.inf)
    base_out, base_lse = upcast(base_out), base_lse.to(lse.dtype)
    base_out = torch.where((base_lse > -torch.inf)[..., None], base_out, 0.0)[..., None, :]
    base_lse = base_lse[..., None]
    top = torch.maximum(lse, base_lse).detach()
    if gate is None:
        top = top.amax(-1, keepdim=True) if lse.shape[-1] else base_lse.detach()
    top = top.masked_fill(top == -torch.inf, 0.0)
    weight, base = torch.exp(lse - top), torch.exp(base_lse - top)
    total = (weight if gate is not None else weight.sum(-1, keepdim=True)) + base
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    result = torch.where(empty, -torch.inf, top + torch.log(safe))
    if gate is None:
        mixed = (weight / safe)[..., None].mul(out).sum(-2) + (base / safe * base_out[..., 0, :])
        return mixed, result
    per_slot = (weight / safe)[..., None] * out + (base / safe)[..., None] * base_out
    return (gate.to(lse.dtype)[..., None] * per_slot).sum(-2), result
