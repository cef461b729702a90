"""Which tiles of keys each tile of query rows must look at, from intervals, in O(Tq m + tiles)."""

from __future__ import annotations

import torch

PLAN_Q, PLAN_K = 128, 64  # rows and keys of a tile


def tile_plan(starts: torch.Tensor, ends: torch.Tensor, tk: int) -> list[torch.Tensor]:
    """Lists of tiles, by tile of rows and by tile of keys.

    Args:
        starts, ends: int32 [..., Tq, m], disjoint in every row.
        tk: number of keys.

    Returns:
        q_count [..., nq], q_list [..., nq, nk], k_count [..., nk], k_list [..., nk, nq], int32. The first `count` entries
        of a list are valid, ascending; an entry is 2 * tile + full, and full says that every row of the tile sees every key
        of the tile with one interval. Tiles that no row touches are left out.
    """
    tq, m = starts.shape[-2:]
    lead = starts.shape[:-2]
    nq, nk = -(-tq // PLAN_Q), -(-tk // PLAN_K)
    starts, ends = starts.clamp(0, tk).long(), ends.clamp(0, tk).long()
    live = starts < ends
    touched = _covered(starts // PLAN_K, -(-ends // PLAN_K), live, nq, nk)
    last = torch.where(ends == tk, nk, ends // PLAN_K)
    first = -(-starts // PLAN_K)
    full = _covered(first, last, live & (first < last), nq, nk)
    rows = (tq - torch.arange(nq, device=starts.device) * PLAN_Q).clamp(max=PLAN_Q)
    full = full == rows[:, None]
    touched = touched > 0
    q_count, q_list = _lists(touched, full)
    k_count, k_list = _lists(touched.transpose(-1, -2), full.transpose(-1, -2))
    assert q_list.shape == (*lead, nq, nk) and m >= 0
    return [q_count, q_list, k_count, k_list]


def _covered(first: torch.Tensor, last: torch.Tensor, live: torch.Tensor, nq: int, nk: int) -> torch.Tensor:
    """How many intervals of the rows of each tile cover each tile of keys, by sums of differences: [..., nq, nk]."""
    tq, m = first.shape[-2:]
    change = torch.zeros((*first.shape[:-2], nq * (nk + 1)), dtype=torch.int32, device=first.device)
    row = torch.arange(tq, device=first.device)[:, None] // PLAN_Q * (nk + 1)
    one = live.int()
    for at, value in ((first, one), (last, -one)):
        index = (row + at.clamp(0, nk)).flatten(-2)
        change.scatter_add_(-1, index, value.flatten(-2))
    return change.unflatten(-1, (nq, nk + 1))[..., :nk].cumsum(-1)


def _lists(touched: torch.Tensor, full: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, entries) along the last dimension."""
    n = touched.shape[-1]
    tile = torch.arange(n, device=touched.device)
    order = torch.where(touched, tile, tile + n).sort(-1).values
    valid = order < n
    at = torch.where(valid, order, 0)
    entries = torch.where(valid, 2 * at + full.gather(-1, at), 0)
    return touched.sum(-1).int(), entries.int().contiguous()
