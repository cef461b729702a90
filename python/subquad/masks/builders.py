"""Intervals of the masks in use, one function each: (starts, ends) [..., Tq, k], in any order, possibly overlapping.

What each row sees is in the docstrings of `IntervalMask`, whose methods of the same names make masks of these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .algebra import Intervals

Span = tuple[int, int]


def stack(*pairs: tuple[torch.Tensor | int, torch.Tensor | int]) -> Intervals:
    """Intervals side by side; numbers and tensors [..., Tq] broadcast."""
    shapes = [x.shape for pair in pairs for x in pair if isinstance(x, torch.Tensor)]
    shape = torch.broadcast_shapes(*shapes)
    starts, ends = (
        torch.stack([torch.as_tensor(pair[side], dtype=torch.int64).expand(shape) for pair in pairs], -1)
        for side in (0, 1)
    )
    return starts, ends


def sink(tq: int, tk: int, sink_tokens: int, window: int) -> Intervals:
    i = torch.arange(tq) + (tk - tq)
    if window < 0:
        return stack((0, i + 1))
    first = (i - window + 1).clamp_min(0)
    return stack((torch.zeros_like(i), (i + 1).clamp(max=sink_tokens)), (first, i + 1))


def prefix_lm(prefix: int | torch.Tensor, tq: int, tk: int) -> Intervals:
    i = torch.arange(tq) + (tk - tq)
    if not isinstance(prefix, torch.Tensor):
        return stack((0, (i + 1).clamp_min(prefix)))
    i = i.to(prefix.device)
    return stack((0, torch.maximum(i + 1, prefix.long()[:, None, None])))


def packed(
    cu_q: torch.Tensor, cu_k: torch.Tensor, tq: int, causal: bool, sink_tokens: int = 0, window: int = -1
) -> Intervals:
    cu_q, cu_k = cu_q.long(), cu_k.long()
    lengths = cu_q.diff()
    row = torch.arange(tq, device=cu_q.device)
    document = (torch.searchsorted(cu_q, row, right=True) - 1).clamp(0, max(0, lengths.shape[0] - 1))
    low, high = cu_k[:-1][document], cu_k[1:][document]
    if not causal:
        return stack((low, high))
    stop = low + (row - cu_q[:-1][document]) + 1 + (high - low) - lengths[document]
    if window < 0:
        return stack((low, stop))
    sinks = torch.minimum(low + sink_tokens, stop)
    return stack((low, sinks), (torch.maximum(low, stop - window), stop))


def mma(tq: int, images: Sequence[Span], questions: Sequence[Span]) -> Intervals:
    i = torch.arange(tq)
    questions_seen = [
        (c, torch.where((i >= a) & (i < b), d, c)) for (a, b), (c, d) in zip(images, questions, strict=True)
    ]
    return stack((0, i + 1), *questions_seen)


def pine(prefix: int, lengths: Sequence[int], suffix: int) -> Intervals:
    edges = torch.tensor([prefix, *lengths]).cumsum(0)
    total = int(edges[-1])
    i = torch.arange(total + suffix)
    document = torch.bucketize(i, edges, right=True)
    inside = (i >= prefix) & (i < total)
    stop = torch.where(inside, edges[document.clamp(max=len(lengths))], total)
    return stack((0, i + 1), (stop, total))


def pine_shifted(
    prefix: int, lengths: Sequence[int], suffix: int, shift: torch.Tensor
) -> tuple[Intervals, torch.Tensor]:
    """Intervals prefix, every document, suffix; and the shift [B|1, H|1, Tq, n + 2] of each.

    Rows of `shift`: one for each document, then one for each token of the suffix.
    """
    n = len(lengths)
    edges = torch.tensor([prefix, *lengths]).cumsum(0)
    total = int(edges[-1])
    i = torch.arange(total + suffix)
    group = (torch.bucketize(i, edges, right=True) - 1).clamp(0, n)  # of prefix rows: the first document's, unused
    in_prefix, in_suffix = i < prefix, i >= total
    pairs: list[tuple[torch.Tensor | int, torch.Tensor | int]] = [(0, (i + 1).clamp(max=prefix))]
    for j in range(n):
        low, high = int(edges[j]), int(edges[j + 1])
        stop = torch.where(~in_suffix & (group == j), i + 1, high)
        pairs.append((low, torch.where(in_prefix, low, stop)))
    pairs.append((total, torch.where(in_suffix, i + 1, total)))
    row = torch.where(in_suffix, n + i - total, group).to(shift.device)
    rows = shift.to(torch.int32)[:, :, row]
    zero = rows.new_zeros((*rows.shape[:-1], 1))
    return stack(*pairs), torch.cat([zero, rows, zero], -1)


def rings(height: int, width: int) -> torch.Tensor:
    """Distance of every pixel from the border, in raster order."""
    y, x = torch.arange(height)[:, None], torch.arange(width)
    return torch.minimum(torch.minimum(y, height - 1 - y), torch.minimum(x, width - 1 - x)).flatten()


def cca(height: int, width: int, before: int, after: int) -> Intervals:
    ring = rings(height, width).sort(stable=True).values
    seen = before + torch.searchsorted(ring, ring, right=True)
    text = torch.arange(before + height * width + after) + 1
    stop = torch.cat([text[:before], seen, text[before + height * width :]])
    return stack((0, stop))


def easycontrol(main: int, conditions: Sequence[int]) -> Intervals:
    sizes = torch.tensor([main, *conditions])
    edges = sizes.cumsum(0)
    block = torch.repeat_interleave(torch.arange(sizes.numel()), sizes)
    low = torch.where(block == 0, 0, edges[block] - sizes[block])
    return stack((low, torch.where(block == 0, int(edges[-1]), edges[block])))


def frame_sink(frames: int, tokens: int, sinks: int, local: int, block: int, pinned: Span | None) -> Intervals:
    frame = torch.arange(frames).repeat_interleave(tokens)
    last = (frame // block * block + block - 1).clamp(max=frames - 1)
    first = (last - (local - sinks) + 1).clamp_min(0)
    pairs: list[tuple[torch.Tensor | int, torch.Tensor | int]] = [
        (0, (last + 1).clamp(max=sinks) * tokens),
        (torch.maximum(first, torch.full_like(first, sinks)) * tokens, (last + 1) * tokens),
    ]
    if pinned is not None:
        start, stop = pinned
        pairs.append((start * tokens, torch.where(first >= stop, stop * tokens, start * tokens)))
    return stack(*pairs)


def lookahead(ahead: torch.Tensor, left: int | None, tk: int) -> Intervals:
    i = torch.arange(ahead.shape[-1], device=ahead.device)
    return stack((0 if left is None else (i - left).clamp_min(0), (i + 1 + ahead.long()).clamp(max=tk)))
