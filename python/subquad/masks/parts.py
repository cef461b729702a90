"""Some rows of a mask beside some keys: which keys rows see, and the mask of those rows and keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .interval_mask import IntervalMask

Span = tuple[int, int]


def keys_seen(mask: IntervalMask, rows: list[Span], tq: int, tk: int) -> list[Span]:
    """Spans, perhaps overlapping, that hold every key which one of the rows sees; of plain masks from their numbers alone.

    Args:
        mask: of tq rows and tk keys.
        rows: ascending spans of rows.
    """
    if mask.starts is None or mask.ends is None:
        if not mask.plain_causal:
            return [(0, tk)] if any(a < b for a, b in rows) else []
        spans = []
        for a, b in rows:
            spans += [(0 if mask.window < 0 else max(0, a - mask.window + 1), b), (0, min(mask.sink_tokens, b))]
        return spans
    change = torch.zeros(tk + 1, dtype=torch.int64)
    for a, b in rows:
        starts, ends = (x[:, :, a:b].flatten().clamp(0, tk).cpu().long() for x in (mask.starts, mask.ends))
        live = (starts < ends).long()
        change.index_add_(0, starts, live).index_add_(0, ends, -live)
    seen = change[:tk].cumsum(0) > 0
    if mask.key_start is not None and mask.key_stop is not None and rows:
        alive = (mask.key_start < rows[-1][1]) & (mask.key_stop > rows[0][0])
        seen &= alive.flatten(0, -2).any(0).cpu()
    edges = torch.nn.functional.pad(seen.int(), (1, 1)).diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def part(mask: IntervalMask, rows: torch.Tensor, keys: torch.Tensor, tq: int, tk: int) -> IntervalMask:
    """The mask of these rows and keys, both ascending; among the keys are all that the rows see.

    Keys keep their order, so an interval of a row stays one interval: no interval is added, nothing dense is made. One run of
    rows of a plain mask, with the keys up to its end, is the same plain mask of other sizes.
    """
    count, plain = len(keys), mask.starts is None and mask.key_start is None
    if len(rows) == 0 or (plain and not mask.plain_causal):
        return IntervalMask.full(len(rows), count)
    if plain and _one_run(rows) and count >= len(rows) and int(keys[-1]) == int(rows[-1]):
        return IntervalMask._plain(True, mask.sink_tokens, mask.window, len(rows), count)
    return _cut(mask.materialize(tq, tk), rows, keys)


def blocks(
    mask: IntervalMask, rows: torch.Tensor, keys: Sequence[torch.Tensor], tq: int, tk: int
) -> list[IntervalMask | None]:
    """The masks of these rows beside each set of keys, all ascending, whatever else the rows see; None for no keys.

    Where it can be it is a plain mask: the rows beside themselves, or rows that see all of a set.
    """
    whole = mask.materialize(tq, tk)
    return [_block(mask, whole, rows, at) if len(at) else None for at in keys]


def _block(mask: IntervalMask, whole: IntervalMask, rows: torch.Tensor, keys: torch.Tensor) -> IntervalMask:
    plain = mask.plain_causal and mask.key_start is None and torch.equal(rows, keys) and _one_run(rows)
    if plain and (mask.sink_tokens == 0 or int(rows[0]) == 0):  # other first keys are no sinks
        return IntervalMask._plain(True, mask.sink_tokens, mask.window, len(rows), len(keys))
    found = _cut(whole, rows, keys)
    assert found.starts is not None and found.ends is not None
    every = (found.starts[..., 0] == 0) & (found.ends[..., 0] == len(keys))
    return IntervalMask.full(len(rows), len(keys)) if found.key_start is None and bool(every.all()) else found


def _one_run(rows: torch.Tensor) -> bool:
    return int(rows[-1]) - int(rows[0]) == len(rows) - 1


def _cut(mask: IntervalMask, rows: torch.Tensor, keys: torch.Tensor) -> IntervalMask:
    """Of a mask that has intervals. Keys keep their order, so those of an interval stay neighbours."""
    assert mask.starts is not None and mask.ends is not None
    count = len(keys)
    rows, keys = rows.to(mask.starts.device), keys.to(mask.starts.device)
    found = [torch.searchsorted(keys, x[:, :, rows].long().contiguous()).int() for x in (mask.starts, mask.ends)]
    empty = found[0] >= found[1]
    starts, ends = (x.masked_fill(empty, count) for x in found)
    order = starts.argsort(dim=-1, stable=True)
    shift = None
    if mask.shift is not None:
        own = mask.shift[:, :, rows]
        lead = torch.broadcast_shapes(own.shape[:2], order.shape[:2])
        shift = own.expand(*lead, *own.shape[2:]).gather(-1, order.expand(*lead, *order.shape[2:]))
    local = IntervalMask(starts.gather(-1, order), ends.gather(-1, order), tk=count, shift=shift)
    if mask.key_start is None or mask.key_stop is None:
        return local
    lives = [torch.searchsorted(rows, x[:, :, keys].long().contiguous()).int() for x in (mask.key_start, mask.key_stop)]
    return local.with_key_lifetime(lives[0], lives[1])
