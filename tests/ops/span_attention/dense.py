"""Superlinear attention by its definition, in float64: each slot a masked softmax over its span and the window, then the gate."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from subquad import SuperlinearConfig
from subquad.testing import backend_params

from ..span_search.dense import search, stacked, window


@dataclass
class Dense:
    """out [B, T, H, Dv]; the others [B, T, H, num_spans]."""

    out: torch.Tensor
    anchor: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    gate: torch.Tensor


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of q [B, T, H, D] over the keys `seen` [B, T, H, ..., N]; 0 and -inf where there are none."""
    group, more = q.shape[2] // k.shape[2], seen.dim() - 4
    k, v = (x.double().repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bthd,bnhd->bthn", q.double(), k) * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = scores[(..., *(None,) * more, slice(None))].masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(seen, torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]), 0.0)
    values = v.transpose(1, 2)[:, None][(..., *(None,) * more, slice(None), slice(None))]
    values = torch.where(weights[..., None] > 0, values, 0.0)
    return (weights[..., None] * values).sum(-2), lse


def superlinear(
    q_search: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: SuperlinearConfig,
    positions: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    search_keys: torch.Tensor | None = None,
    firsts: list[int] | None = None,
) -> Dense:
    """As `subquad.superlinear_attention`; positions [B, T], `firsts` of every packed query."""
    batch, tokens = q.shape[:2]
    keys = k.shape[1]
    if positions is None:
        positions = torch.arange(keys - tokens, keys).expand(batch, tokens)
    found = search(q_search, k if search_keys is None else search_keys, config, positions, keep, firsts)
    anchor, start, end, score = (stacked(found, name) for name in ("anchor", "start", "end", "score"))
    at, j = positions[:, :, None, None, None], torch.arange(keys)
    near = (j <= at) & (j > at - min(window(config), keys))
    seen = near | ((j >= start[..., None]) & (j <= end[..., None]))
    if keep is not None:
        seen = seen & keep[:, None, None, None, :keys]
    if firsts is not None:
        seen = seen & (j >= torch.tensor(firsts)[:, None, None, None])
    out, _ = attend(q, k, v, seen, config.sm_scale)
    largest = float(torch.finfo(torch.float32).max)
    weights = score.double().clamp(max=largest).masked_fill(anchor < 0, -1e300)  # all alike where nothing is found
    gate = torch.softmax(weights, -1)
    return Dense((gate[..., None] * out).sum(-2), anchor, start, end, gate)


def with_backends(*names: str) -> pytest.MarkDecorator:
    """Every backend that has both operators."""
    params = backend_params("span_attention", *names).args[1]
    both = [
        pytest.param(*p.values, id=p.id, marks=[*p.marks, pytest.mark.backend("span_search", p.values[0])])
        for p in params
    ]
    return pytest.mark.parametrize("backend", both)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference."""
    assert actual.shape == expected.shape and not actual.isnan().any()
    return float((actual.double() - expected.double()).abs().max()) if actual.numel() else 0.0
