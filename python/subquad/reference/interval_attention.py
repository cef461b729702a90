"""Softmax attention where every query row sees a union of key intervals: the dense definition.

s_ij = cap(scale * q_i . k_j) - alibi_slope * |i + Tk - Tq - j| + key_bias_j over the keys j that row i sees, where
cap(x) = softcap * tanh(x / softcap), or x where softcap is 0;
lse_i = log(exp(sink_logit) + sum_j exp(s_ij));  P_ij = exp(s_ij - lse_i);  out_i = sum_j P_ij v_j.

Sources: FlashAttention (arXiv 2205.14135) for lse and its gradients; gpt-oss for the sink logit in the denominator; Gemma 2
(arXiv 2408.00118) for the cap of the logits; ALiBi (arXiv 2108.12409), with the distance both ways, as flash-attn has it;
PINE (arXiv 2407.01100) for a query that is rotated differently for every interval.
"""

from __future__ import annotations

import torch


def visible(
    tq: int,
    tk: int,
    starts: torch.Tensor | None,
    ends: torch.Tensor | None,
    key_start: torch.Tensor | None,
    key_stop: torch.Tensor | None,
    sink_tokens: int,
    window: int,
    causal: bool,
    device: torch.device,
) -> torch.Tensor:
    """Which keys each interval of each row covers: bool [B|1, H|1, Tq, m, Tk].

    Without `starts`, row t has the absolute index i = t + Tk - Tq and sees [0, min(sink_tokens, i + 1)) and
    [i - window + 1, i + 1) when `causal` (window -1: all keys up to i), else every key.
    """
    j = torch.arange(tk, device=device)
    rows = torch.arange(tq, device=device)
    if starts is not None and ends is not None:
        keep = (j >= starts[..., None]) & (j < ends[..., None])
    elif causal:
        i = (rows + (tk - tq))[:, None]
        keep = (j <= i) if window < 0 else (j <= i) & ((j < sink_tokens) | (i - j < window))
        keep = keep[None, None, :, None]
    else:
        keep = torch.ones((1, 1, tq, 1, tk), dtype=torch.bool, device=device)
    if key_start is not None and key_stop is not None:
        t = rows[:, None]
        alive = (t >= key_start[:, :, None]) & (t < key_stop[:, :, None])
        keep = keep & alive[:, :, :, None]
    return keep


def distance(tq: int, tk: int, device: torch.device) -> torch.Tensor:
    """How far each key is from each row, of which the last stands at the last key: [Tq, Tk]."""
    own = torch.arange(tq, device=device)[:, None] + (tk - tq)
    return (own - torch.arange(tk, device=device)).abs()


def interval_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor | None,
    ends: torch.Tensor | None,
    key_start: torch.Tensor | None,
    key_stop: torch.Tensor | None,
    sink_tokens: int,
    window: int,
    causal: bool,
    key_bias: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, Tq, H, Dv] in q's dtype, lse [B, Tq, H]) by dense matrices; differentiable, any float dtype.

    q is [B, Tq, H, R, D]: R = 1, or one query per interval; alibi_slopes is [B|1, H]. float64 input is computed and lse
    returned in float64, anything else in float32.
    """
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    groups = q.shape[2] // k.shape[2]
    wide_k, wide_v = (x.to(dtype).repeat_interleave(groups, dim=2) for x in (k, v))
    keep = visible(q.shape[1], k.shape[1], starts, ends, key_start, key_stop, sink_tokens, window, causal, q.device)
    scores = torch.einsum("bthrd,bshd->bhtrs", q.to(dtype), wide_k) * scale
    # Intervals with queries of their own are disjoint, so one term of the sum is not zero.
    scores = torch.where(keep, scores, 0.0).sum(3) if q.shape[3] > 1 else scores[:, :, :, 0]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(dtype)[:, :, None, None]
        scores = scores - slopes * distance(q.shape[1], k.shape[1], q.device)
    keep = keep.any(3)
    if key_bias is not None:
        scores = scores + key_bias.to(dtype)[:, :, None]
        keep = keep & (key_bias != -torch.inf)[:, :, None]
    scores = scores.masked_fill(~keep, -torch.inf)
    top = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:3], 1), -torch.inf)
    if sink_logits is not None:
        sinks = sink_logits.to(dtype)[:, None, None]
        top = torch.maximum(top, sinks)
    top = top.detach().masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sink_logits is not None:
        total = total + torch.exp(sinks - top)
    empty = total == 0
    lse = torch.where(empty, -torch.inf, top + torch.log(total.masked_fill(empty, 1.0)))[..., 0]
    probabilities = weights / total.masked_fill(empty, 1.0)
    out = _product(probabilities, wide_v, keep)
    return out.to(q.dtype).contiguous(), lse.transpose(1, 2).contiguous()


def _product(p: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """sum_j p[b, h, t, j] v[b, j, h, :] over the keys that are kept: NaN and infinity in the others do not count."""
    out = torch.einsum("bhts,bshd->bthd", p, torch.where(torch.isfinite(v), v, 0.0))
    seen = keep.to(v.dtype).expand(p.shape)
    for value, where in ((torch.inf, v == torch.inf), (-torch.inf, v == -torch.inf), (torch.nan, v.isnan())):
        hit = torch.einsum("bhts,bshd->bthd", seen, where.to(v.dtype)) > 0
        out = out + torch.where(hit, value, 0.0)
    return out
