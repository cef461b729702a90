"""Which tiles of keys each tile of query rows must look at, from intervals, in O(Tq m + tiles)."""

from __future__ import annotations

import torch

from .. import _checks
from .._derived import Derived

PLAN_Q, PLAN_K = 128, 64  # rows and keys of a tile


_PLANS = {per_slot: Derived() for per_slot in (False, True)}


def plan_of(starts: torch.Tensor, ends: torch.Tensor, tk: int, per_slot: bool) -> list[torch.Tensor]:
    """`tile_plan` of these intervals, or of each interval alone; kept until they are written to."""
    if _checks.traced(ends) or ends.is_inference():
        return _made(starts, ends, tk, per_slot)
    return _PLANS[per_slot].get(starts, (ends, ends._version, tk), lambda: _made(starts, ends, tk, per_slot))


def _made(starts: torch.Tensor, ends: torch.Tensor, tk: int, per_slot: bool) -> list[torch.Tensor]:
    if per_slot:
        starts, ends = (x.transpose(-1, -2).unsqueeze(-1) for x in (starts, ends))
    return tile_plan(starts, ends, tk)


def tile_plan(starts: torch.Tensor, ends: torch.Tensor, tk: int) -> list[torch.Tensor]:
    """Lists of tiles, by tile of rows and by tile of keys.

    Args:
        starts, ends: int32 [..., Tq, m], disjoint in every row.
        tk: number of keys.

    Returns:
        q_count [..., nq, 2], q_list [..., nq, nk], k_count [..., nk, 2], k_list [..., nk, nq], int32. A list begins with the
        tiles that are seen in part, then come those that every row sees wholly with one interval, each ascending; the counts
        are of these two kinds. Tiles that no row touches follow and mean nothing.
    """
    tq = starts.shape[-2]
    nq, nk = -(-tq // PLAN_Q), -(-tk // PLAN_K)
    starts, ends = starts.clamp(0, tk).long(), ends.clamp(0, tk).long()
    live = starts < ends
    touched = _covered(starts // PLAN_K, -(-ends // PLAN_K), live, nq, nk) > 0
    first, last = (
        -(-starts // PLAN_K),
        ends // PLAN_K,
    )  # a tile beyond the last key is never whole: kernels need its bound
    rows = (tq - torch.arange(nq, device=starts.device) * PLAN_Q).clamp(max=PLAN_Q)
    full = _covered(first, last, live & (first < last), nq, nk) == rows[:, None]
    return [*_lists(touched, full), *_lists(touched.transpose(-1, -2), full.transpose(-1, -2))]


def _covered(first: torch.Tensor, last: torch.Tensor, live: torch.Tensor, nq: int, nk: int) -> torch.Tensor:
    """How many intervals of the rows of each tile cover each tile of keys, by sums of differences: [..., nq, nk]."""
    tq = first.shape[-2]
    change = torch.zeros((*first.shape[:-2], nq * (nk + 1)), dtype=torch.int32, device=first.device)
    row = torch.arange(tq, device=first.device)[:, None] // PLAN_Q * (nk + 1)
    one = live.int()
    for at, value in ((first, one), (last, -one)):
        index = (row + at.clamp(0, nk)).flatten(-2)
        change.scatter_add_(-1, index, value.flatten(-2))
    return change.unflatten(-1, (nq, nk + 1))[..., :nk].cumsum(-1)


def _lists(touched: torch.Tensor, full: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(counts, tiles) along the last dimension: those in part, those seen wholly, the rest."""
    kind = torch.where(full, 1, torch.where(touched, 0, 2))
    tiles = kind.sort(dim=-1, stable=True).indices
    counts = torch.stack([(kind == 0).sum(-1), (kind == 1).sum(-1)], -1)
    return counts.int().contiguous(), tiles.int().contiguous()
