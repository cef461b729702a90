"""Choosing spans: the dense definition.

Stripe i of a query at position p is key p + 1 - o_i. It can be chosen if that is a key, not before `first`, and not masked.
Scores are scale * q . k; the `num_spans` largest are chosen, the farther of two that are equal, NaN and -inf never. The span of
anchor a is [max(a - back, first), min(a + ahead, last)].

Sources: arXiv 2601.18401; where the text is silent, the kernels of the package `superlinear` 0.1.0.
"""

from __future__ import annotations

import torch

from ._common import upcast


def unpaged(x: torch.Tensor, block_table: torch.Tensor | None) -> torch.Tensor:
    """[B, N, H, D] of pages [P, page, H, D] in the order of `block_table` [B, pages]."""
    if block_table is None:
        return x
    return x[block_table.long().clamp(0, x.shape[0] - 1)].flatten(1, 2)


def span_search(
    q: torch.Tensor,
    k: torch.Tensor,
    position: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    back: torch.Tensor,
    ahead: torch.Tensor,
    offsets: torch.Tensor,
    key_mask: torch.Tensor | None,
    block_table: torch.Tensor | None,
    num_spans: int,
    scale: float,
    per_group: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(score, anchor, start, end), each [B, T, H, num_spans]: best first; -inf, -1, -1, -1 where there is no such stripe.

    q is [B, T, H, D], k [B, N, Hkv, D]; position, first, last, back and ahead are [B, T], offsets [S] ascending, key_mask [B, N].
    """
    keys = upcast(unpaged(k, block_table))
    batch, heads = q.shape[0], q.shape[2]
    count, kv_heads = keys.shape[1], keys.shape[2]
    stripes = position.long()[:, :, None] + 1 - offsets.long().flip(0)  # far to near
    possible = (stripes >= first.clamp(min=0)[:, :, None]) & (stripes < count)
    if count == 0:
        keys = keys.new_zeros((batch, 1, *keys.shape[2:]))
    at = stripes.clamp(0, max(count - 1, 0))
    rows = torch.arange(batch, device=q.device)[:, None, None]
    if key_mask is not None and count:
        possible = possible & key_mask[rows, at]
    found = torch.where(possible[..., None, None], keys[rows, at], 0.0)  # [B, T, S, Hkv, D]
    queries = upcast(q).unflatten(2, (kv_heads, heads // kv_heads))
    scores = torch.einsum("btgrd,btsgd->btgrs", queries, found) * scale
    rank = scores.detach()
    if per_group:
        rank = rank.sum(3, keepdim=True).expand_as(rank)
    rank = rank.masked_fill(~possible[:, :, None, None] | rank.isnan(), -torch.inf)
    rank, scores = (torch.nn.functional.pad(x.flatten(2, 3), (0, num_spans), value=-torch.inf) for x in (rank, scores))
    stripes = torch.nn.functional.pad(stripes, (0, num_spans), value=-1)
    best, order = (x[..., :num_spans] for x in torch.sort(rank, dim=-1, descending=True, stable=True))
    chosen = best > -torch.inf
    score = torch.where(chosen, scores.gather(-1, order), -torch.inf)
    anchor = stripes[:, :, None].expand(-1, -1, heads, -1).gather(-1, order)
    start = torch.maximum(anchor - back[..., None, None], first.clamp(min=0)[..., None, None])
    end = torch.minimum(anchor + ahead[..., None, None], last[..., None, None])
    places = (torch.where(chosen, x, -1).int() for x in (anchor, start, end))
    return score, next(places), next(places), next(places)
