"""Masks in the forms that other libraries take."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from . import algebra

if TYPE_CHECKING:
    from .interval_mask import IntervalMask

_COLUMNS = 256  # keys whose columns are looked at together


def mask_mod(
    starts: torch.Tensor, ends: torch.Tensor, key_start: torch.Tensor | None, key_stop: torch.Tensor | None
) -> Callable[..., torch.Tensor]:
    """FlexAttention's predicate (b, h, q, kv) -> bool, of the tensors as they are now."""
    slots = [(_column(starts[..., r]), _column(ends[..., r])) for r in range(starts.shape[3])]
    alive = None if key_start is None or key_stop is None else (_column(key_start), _column(key_stop))

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        keep = (kv >= slots[0][0](b, h, q)) & (kv < slots[0][1](b, h, q))
        for start, stop in slots[1:]:
            keep = keep | ((kv >= start(b, h, q)) & (kv < stop(b, h, q)))
        if alive is not None:
            keep = keep & (q >= alive[0](b, h, kv)) & (q < alive[1](b, h, kv))
        return keep

    return visible


def _column(table: torch.Tensor) -> Callable[..., torch.Tensor]:
    """table[b, h, i] of a tensor [B|1, H|1, n]. Indexed by tensors alone: torch.compile does not trace numbers among them."""
    per_batch, per_head = table.shape[0] > 1, table.shape[1] > 1
    if per_batch and per_head:
        whole = table.clone().contiguous()
        return lambda b, h, i: whole[b, h, i]
    rows = (table[:, 0] if per_batch else table[0]).clone().contiguous()
    if per_batch:
        return lambda b, h, i: rows[b, i]
    if per_head:
        return lambda b, h, i: rows[h, i]
    single = rows[0].contiguous()
    return lambda b, h, i: single[i]


def flashmask(mask: IntervalMask) -> torch.Tensor:
    """FlashMask's startend_row_indices; see `IntervalMask.to_flashmask`."""
    wide = mask.materialize()
    assert wide.starts is not None and wide.ends is not None and wide.tk is not None
    columns = []
    for first in range(0, wide.tk, _COLUMNS):
        last = min(wide.tk, first + _COLUMNS)
        starts, ends = (x.clamp(first, last) - first for x in (wide.starts, wide.ends))
        hidden = ~algebra.contains(starts, ends, last - first)
        if wide.key_start is not None and wide.key_stop is not None:
            t = torch.arange(hidden.shape[2], device=hidden.device)[:, None]
            hidden = (
                hidden | (t < wide.key_start[:, :, None, first:last]) | (t >= wide.key_stop[:, :, None, first:last])
            )
        columns.append(_column_runs(hidden.transpose(-1, -2), first))
    if not columns:
        return torch.zeros((*wide.starts.shape[:2], 0, 4), dtype=torch.int32, device=wide.starts.device)
    return torch.cat(columns, 2)


def _column_runs(hidden: torch.Tensor, first: int) -> torch.Tensor:
    """[.., keys, Tq] -> the runs of hidden rows as (LTS, LTE, UTS, UTE), [.., keys, 4]."""
    tq = hidden.shape[-1]
    starts, ends = algebra.from_dense(hidden)
    if starts.shape[-1] > 2:
        key = int((starts[..., 2] < ends[..., 2]).flatten(0, -2).any(0).nonzero()[0])
        raise ValueError(
            f"mask: expected keys that at most two runs of rows do not see, as FlashMask has it; key {first + key} has more"
        )
    starts, ends = (torch.nn.functional.pad(x, (0, 2 - x.shape[-1]), value=tq) for x in (starts, ends))
    upper = (starts[..., 0] == 0) & (ends[..., 0] > 0)
    one = torch.stack([starts[..., 0], ends[..., 0]], -1)
    two = torch.stack([starts[..., 1], ends[..., 1]], -1)
    none = torch.zeros_like(one)
    has_two = two[..., 0] < two[..., 1]
    only_lower = ~upper & ~has_two
    lower_run = torch.where(only_lower[..., None], one, two)
    upper_run = torch.where(only_lower[..., None], none, one)
    return torch.cat([lower_run, upper_run], -1).int()
