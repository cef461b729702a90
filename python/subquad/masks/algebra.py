"""Sets of integers as sorted, disjoint intervals, one set per row: the operations, without loops over rows.

A set is a pair of int32 tensors (starts, ends) [..., m]; interval r is [starts[r], ends[r]), empty when start >= end.
"""

from __future__ import annotations

import torch

from .. import _checks

Intervals = tuple[torch.Tensor, torch.Tensor]


def canonical(starts: torch.Tensor, ends: torch.Tensor, tk: int) -> Intervals:
    """The same sets inside [0, tk): sorted, disjoint, not touching; empty slots are (tk, tk) and come last."""
    starts, ends = starts.clamp(0, tk), ends.clamp(0, tk)
    empty = starts >= ends
    if starts.shape[-1] == 1:
        return torch.where(empty, tk, starts).int(), torch.where(empty, tk, ends).int()
    starts, order = torch.where(empty, tk, starts).sort(dim=-1, stable=True)
    ends = torch.where(empty, tk, ends).gather(-1, order)
    reach = ends.cummax(-1).values
    first = torch.ones_like(starts, dtype=torch.bool)
    first[..., 1:] = starts[..., 1:] > reach[..., :-1]
    group = first.cumsum(-1) - 1
    merged_starts = torch.full_like(starts, tk).scatter_reduce(-1, group, starts, "amin")
    merged_ends = torch.zeros_like(ends).scatter_reduce(-1, group, ends, "amax")
    merged_ends = torch.where(merged_starts == tk, tk, merged_ends)
    return merged_starts.int(), merged_ends.int()


def trimmed(intervals: Intervals, tk: int) -> Intervals:
    """Without the last slots that are empty in every row; at least one slot stays. All stay where values cannot be read."""
    starts, ends = intervals
    if starts.shape[-1] == 1 or _checks.traced(starts):
        return starts.contiguous(), ends.contiguous()
    used = (starts < ends).flatten(0, -2).any(0)
    count = max(1, int(used.sum()))
    return starts[..., :count].contiguous(), ends[..., :count].contiguous()


def union(a: Intervals, b: Intervals, tk: int) -> Intervals:
    """Keys in a or b."""
    starts, ends = (torch.cat(_same_rows(x, y), -1) for x, y in zip(a, b, strict=True))
    return canonical(starts, ends, tk)


def _same_rows(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with the same leading dimensions."""
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return a.expand(*shape, a.shape[-1]), b.expand(*shape, b.shape[-1])


def intersection(a: Intervals, b: Intervals, tk: int) -> Intervals:
    """Keys in both a and b."""
    starts = torch.maximum(a[0][..., :, None], b[0][..., None, :]).flatten(-2)
    ends = torch.minimum(a[1][..., :, None], b[1][..., None, :]).flatten(-2)
    return canonical(starts, ends, tk)


def complement(a: Intervals, tk: int) -> Intervals:
    """Keys of [0, tk) that are not in a."""
    a = canonical(*a, tk)
    starts = torch.nn.functional.pad(a[1], (1, 0), value=0)
    ends = torch.nn.functional.pad(a[0], (0, 1), value=tk)
    return canonical(starts, ends, tk)


def from_dense(dense: torch.Tensor) -> Intervals:
    """The runs of True in every row of a bool tensor [..., tk]; as many slots as could be needed where values cannot be read."""
    tk = dense.shape[-1]
    padded = torch.nn.functional.pad(dense, (1, 1))
    rises = padded[..., 1:-1] & ~padded[..., :-2]
    falls = padded[..., 1:-1] & ~padded[..., 2:]
    count = tk // 2 + 1  # more than these cannot be; as many as are, where that can be read
    if not _checks.traced(dense):
        count = max(1, int(rises.sum(-1).max()) if rises.numel() else 0)
    place = torch.arange(tk, dtype=torch.int32, device=dense.device).expand_as(dense)
    starts, ends = (
        torch.full((*dense.shape[:-1], count + 1), tk, dtype=torch.int32, device=dense.device).scatter(
            -1, torch.where(edges, edges.cumsum(-1) - 1, count), place + offset
        )[..., :count]
        for edges, offset in ((rises, 0), (falls, 1))
    )
    return starts.contiguous(), ends.contiguous()


def contains(starts: torch.Tensor, ends: torch.Tensor, tk: int) -> torch.Tensor:
    """The sets as a bool tensor [..., tk]."""
    change = torch.zeros((*starts.shape[:-1], tk + 1), dtype=torch.int32, device=starts.device)
    full = (starts < ends).int()
    change.scatter_add_(-1, starts.clamp(0, tk).long(), full)
    change.scatter_add_(-1, ends.clamp(0, tk).long(), -full)
    return change[..., :tk].cumsum(-1) > 0
