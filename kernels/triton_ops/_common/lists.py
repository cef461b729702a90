"""Lists of what queries have chosen, in the order of the keys: how scattered choices become tiles for matrix units.

The pairs of a key head are (token, query head of the group, slot), numbered in this order. Sorting is torch's: a radix sort,
which is a counting sort by every digit, stable, of a size that is known without asking the device, and one that nobody waits for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Lists(NamedTuple):
    """places int32 and order int64 [B * Hkv, pairs]: sorted, and whose they are; begin int32 [B * Hkv, blocks + 1]: where those
    of a block begin."""

    places: torch.Tensor
    order: torch.Tensor
    begin: torch.Tensor


def sort_pairs(places: torch.Tensor, kv_heads: int, blocks: int, size: int = 1) -> Lists:
    """Pairs by `places` int32 [B, T, H, slots]: a block, of `blocks`, times `size` plus a number below `size`; those of block
    `blocks` are in none and come last."""
    batch, tokens, heads, slots = places.shape
    shape = (batch, tokens, kv_heads, heads // kv_heads * slots)
    flat = places.view(shape).transpose(1, 2).reshape(batch * kv_heads, tokens * shape[3])
    found, order = torch.sort(flat.contiguous(), dim=1, stable=True)
    bounds = torch.arange(blocks + 1, dtype=torch.int32, device=places.device) * size
    begin = torch.searchsorted(found, bounds.expand(flat.shape[0], -1).contiguous(), out_int32=True)
    return Lists(found, order, begin)
