"""PINE: attention that does not depend on the order of documents."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from ..masks import IntervalMask
from ..ops.interval_attention import interval_attention
from ..rope import RopeSpec
from ._lse import with_lse


def segment_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    edges: Sequence[int],
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """log sum_j exp(scale q . k_j) over each segment of keys [edges[s], edges[s + 1]): [B, Tq, H, S] float32.

    softmax over the last dimension gives the attention mass of the segments.

    Raises:
        ValueError: edges that decrease, leave [0, Tk], or are fewer than two.
    """
    tk = k.shape[1]
    if any(a > b for a, b in pairwise(edges)) or len(edges) < 2 or edges[0] < 0 or edges[-1] > tk:
        raise ValueError(f"edges: expected at least two numbers that do not decrease, in [0, {tk}], got {list(edges)}")
    narrow = k.new_zeros((*k.shape[:3], 1))  # the values do not matter, so they are one column
    parts = [with_lse(q, k[:, a:b], narrow[:, a:b], IntervalMask.full(), scale, backend)[1] for a, b in pairwise(edges)]
    return torch.stack(parts, -1)


def pine_importance(
    q: torch.Tensor,
    k: torch.Tensor,
    prefix: int,
    lengths: Sequence[int],
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """How important each document is to each document, and to each token of the suffix: float32 [B, H, n + suffix, n].

    For a token of the suffix the attention mass that goes to document j, per token of j; for document i the mean of that over its
    tokens, among the other documents. Queries and keys without rotation, so that order does not count. A document is the most
    important to itself. A token of the suffix has an order of its own, so that the suffix stays causal.
    """
    n = len(lengths)
    edges = _edges(prefix, lengths)
    lse = segment_lse(q[:, prefix:], k, edges, scale=scale, backend=backend)
    per_token = 1.0 / torch.tensor(lengths, dtype=lse.dtype, device=lse.device).clamp_min(1)
    rows = []
    for i in range(n):
        own = torch.arange(n, device=lse.device) == i
        others = lse[:, edges[i] - prefix : edges[i + 1] - prefix].masked_fill(own, -torch.inf)
        mass = others.softmax(-1).nan_to_num() * per_token  # one document alone has no others
        mean = mass.sum(1) / max(1, lengths[i])
        rows.append(mean.masked_fill(own, torch.inf)[:, :, None])
    suffix = lse[:, edges[n] - prefix :].softmax(-1) * per_token
    return torch.cat([*rows, suffix.transpose(1, 2)], 2)


def pine_shift(importance: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Position shifts int32 [B, H, n + suffix, n] from `pine_importance`: the tokens of the documents ranked before each.

    The most important document stands last, next to the query. Equal importance keeps the order of the documents: then, and only
    then, the result depends on that order.
    """
    order = importance.argsort(dim=-1, descending=True, stable=True)
    ordered = torch.tensor(lengths, device=importance.device)[order]
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(order).scatter(-1, order, before).int()


def pine_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix: int,
    lengths: Sequence[int],
    rope: RopeSpec,
    *,
    importance: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Attention that does not depend on the order of documents (PINE, arXiv 2407.01100).

    Documents between a causal prefix and a causal suffix see each other; every query has them ordered by importance to it,
    its own last. Keys are rotated once; the other order is a rotation of the query for every document.

    Args:
        q, k, v: [B, T, H, D] without rotary embedding, T = prefix + sum(lengths) + suffix.
        prefix: tokens before the documents.
        lengths: tokens of each document.
        rope: the rotary embedding.
        importance: [B|1, H|1, n + suffix, n], how important the documents are to each document, then to each token of the
            suffix; None for `pine_importance`. The order is not differentiable.
        scale, backend: as in `interval_attention`.

    Returns:
        [B, T, H, Dv] in q's dtype.

    Raises:
        ValueError: lengths that do not fit T, or an importance of another shape.
    """
    t, n, total = q.shape[1], len(lengths), prefix + sum(lengths)
    if n == 0 or min(prefix, *lengths) < 0 or total > t or k.shape[1] != t:
        got = f"prefix {prefix}, lengths {list(lengths)} and {k.shape[1]} keys"
        raise ValueError(f"lengths: expected at least one document and none negative, within {t} tokens, got {got}")
    if importance is None:
        with torch.no_grad():
            importance = pine_importance(q, k, prefix, lengths, scale=scale, backend=backend)
    if importance.dim() != 4 or importance.shape[2:] != (n + t - total, n):
        raise ValueError(f"importance: expected shape [B|1, H|1, {n + t - total}, {n}], got {list(importance.shape)}")
    mask = IntervalMask.pine(prefix, lengths, t - total, shift=pine_shift(importance, lengths))
    positions = _pine_positions(prefix, lengths, t).to(q.device)[:, None]
    out = interval_attention(
        rope.rotate(q, positions), rope.rotate(k, positions), v, mask, scale=scale, q_shift=rope, backend=backend
    )
    assert isinstance(out, torch.Tensor)
    return out


def _edges(prefix: int, lengths: Sequence[int]) -> list[int]:
    return torch.tensor([prefix, *lengths]).cumsum(0).tolist()


def _pine_positions(prefix: int, lengths: Sequence[int], t: int) -> torch.Tensor:
    """int64 [T]: every document ends where the suffix begins."""
    total = prefix + sum(lengths)
    documents = [torch.arange(total - length, total) for length in lengths]
    return torch.cat([torch.arange(prefix), *documents, torch.arange(total, t)])
