"""Rows that ranks need of each other: one all-to-all whose splits every rank computes for itself, and its adjoint.

The plan follows from the layout and from needs that all ranks can derive, so no sizes are sent. Backward: the same message the
other way; an owner adds what comes back in the order of ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch

from .. import _checks
from . import _collectives
from .agreement import checked
from .layout import Run, SequenceLayout, Span


class Plan:
    """What one exchange sends and brings.

    Args:
        layout: where the tokens are.
        needs: for every rank sorted, disjoint spans of positions that it wants; what it owns is left out.

    Attributes:
        receive, send: rows from and to every rank. idle: nobody needs anything, so nobody calls anything.
        rows: int64 [sum(send)], of this rank's tokens, by destination.
        fetched: int64 [sum(receive)], the positions that arrive, by source.
        positions: int64, own and fetched ones together, ascending; `order` sorts them.
    """

    @torch.inference_mode(False)  # it is kept, and a later call may need a gradient
    def __init__(self, layout: SequenceLayout, needs: Sequence[Sequence[Span]]) -> None:
        self.layout, rank = layout, layout.rank
        ranks = range(layout.size)
        pairs = [[[] if s == r else overlap(needs[r], layout.owned[s]) for s in ranks] for r in ranks]
        count = [[sum(b - a for a, b in spans) for spans in row] for row in pairs]
        self.receive, self.send = count[rank], [count[r][rank] for r in ranks]
        self.idle = not any(map(sum, count))
        lows = [run.low for run in layout.runs if run.owner == rank]
        offsets = [run.offset - run.low for run in layout.runs if run.owner == rank]
        sent = [(a, b) for r in ranks for a, b in pairs[r][rank]]
        self.rows = _ranges([(a + offsets[i], b + offsets[i]) for a, b in sent for i in (bisect_right(lows, a) - 1,)])
        self.fetched = _ranges([span for spans in pairs[rank] for span in spans])
        both = torch.cat([layout.positions(), self.fetched])
        self.order = both.argsort()
        self.positions = both[self.order]

    def find(self, positions: torch.Tensor) -> torch.Tensor:
        """Where positions that are here stand among own and fetched rows together."""
        return torch.searchsorted(self.positions, positions)


def overlap(a: Sequence[Span], b: Sequence[Span]) -> list[Span]:
    """Spans in both; each side is sorted and disjoint."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        low, high = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if low < high:
            found.append((low, high))
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return found


def union(spans: Sequence[Span]) -> list[Span]:
    """Sorted, disjoint spans of the same positions."""
    merged: list[Span] = []
    for a, b in sorted(span for span in spans if span[0] < span[1]):
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return merged


def _ranges(spans: Sequence[Span]) -> torch.Tensor:
    return torch.cat([torch.arange(a, b) for a, b in spans] or [torch.arange(0)])


class _Exchange(torch.autograd.Function):
    """Rows of x [B, T, C] that this rank needs, [B, n, C]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        ctx.plan, ctx.tokens = plan, x.shape[1]
        sent = x.transpose(0, 1)[plan.rows.to(x.device)]
        return _collectives.all_to_all(sent, plan.receive, plan.send, plan.layout.group).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        plan: Plan = ctx.plan
        got = _collectives.all_to_all(grad.transpose(0, 1), plan.send, plan.receive, plan.layout.group)
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = got.new_zeros((ctx.tokens, *got.shape[1:]), dtype=wide)
        rows = plan.rows.to(grad.device)
        for part, at in zip(got.split(plan.send), rows.split(plan.send), strict=True):
            total[at] += part.to(wide)  # rows of one part are distinct, parts come in the order of ranks
        return total.to(grad.dtype).transpose(0, 1), None


def fetch(plan: Plan, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The rows that this rank needs of each [B, T, ...] tensor, [B, n, ...]: one message for those of one dtype.

    Nobody communicates where nobody needs anything.
    """
    found: list[torch.Tensor] = [x[:, :0] for x in tensors]
    if plan.idle:
        return found
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        those = [i for i, x in enumerate(tensors) if x.dtype is dtype]
        flat = [tensors[i].flatten(2) if tensors[i].dim() > 2 else tensors[i].unsqueeze(-1) for i in those]
        got = _Exchange.apply(torch.cat(flat, -1), plan)
        for i, part in zip(those, got.split([x.shape[-1] for x in flat], -1), strict=True):
            found[i] = part.reshape(*part.shape[:2], *tensors[i].shape[2:])
    return found


def with_own(plan: Plan, own: torch.Tensor, fetched: torch.Tensor) -> torch.Tensor:
    """Own and fetched rows [B, T + n, ...], sorted by position."""
    return own if plan.idle else torch.cat([own, fetched], 1).index_select(1, plan.order.to(own.device))


def halo_plan(layout: SequenceLayout, tokens: int) -> Plan:
    """The exchange that brings the `tokens` positions before every run, as far as its sequence reaches; kept by the layout."""
    key = ("halo", tokens)
    if key not in layout.plans:
        needs: list[list[Span]] = [[] for _ in range(layout.size)]
        for run in layout.runs:
            needs[run.owner].append((first_seen(layout, run, tokens), run.low))
        layout.plans[key] = Plan(layout, [union(spans) for spans in needs])
    plan: Plan = layout.plans[key]
    return plan


def first_seen(layout: SequenceLayout, run: Run, tokens: int) -> int:
    """The first of the `tokens` positions before a run that lie in its sequence; the run's own where there is none."""
    return max(layout.begin(run.low), run.low - tokens) if run.continues else run.low


def halos(layout: SequenceLayout, tokens: int, *tensors: torch.Tensor) -> list[list[torch.Tensor]]:
    """Of every tensor what stands before each of this rank's runs, [B, tokens, ...], zeros in front where its sequence is
    younger. One message for tensors of one dtype."""
    plan = halo_plan(layout, tokens)
    fetched = fetch(plan, *tensors)
    return [_halos_of(plan, with_own(plan, x, got), tokens) for x, got in zip(tensors, fetched, strict=True)]


def _halos_of(plan: Plan, every: torch.Tensor, tokens: int) -> list[torch.Tensor]:
    """`halos` of own and fetched rows together, [B, n, ...]."""
    layout, found = plan.layout, []
    for run in layout.mine:
        low = first_seen(layout, run, tokens)
        rows = every.index_select(1, plan.find(torch.arange(low, run.low)).to(every.device))
        young = rows.new_zeros((every.shape[0], tokens - rows.shape[1], *every.shape[2:]))
        found.append(torch.cat([young, rows], 1))
    return found


def halo(x: torch.Tensor, tokens: int, *, layout: SequenceLayout) -> torch.Tensor:
    """What stands before each of this rank's runs, within its sequence. Differentiable.

    Args:
        x: [B, T of this rank, ...].
        tokens: how many.
        layout: where the tokens are.

    Returns:
        [B, runs * tokens, ...], zeros where a sequence is younger.

    Raises:
        ValueError: x has another number of tokens than this rank.
    """
    check_layout(layout)

    def check() -> None:
        _checks.size("tokens", tokens)
        check_tokens("x", x, layout)

    checked(layout, lambda: {"op": "halo", "tokens": tokens, "x": (x.shape[0], *x.shape[2:], x.dtype)}, check)
    return torch.cat(halos(layout, tokens, x)[0], 1)


def check_tokens(name: str, x: object, layout: SequenceLayout, dim: int = 1) -> None:
    """x has as many tokens as the layout gives this rank, and one row where sequences are packed."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    own = layout.lengths[layout.rank]
    if x.dim() <= dim or x.shape[dim] != own:
        got = x.shape[dim] if x.dim() > dim else f"shape {list(x.shape)}"
        raise ValueError(f"{name}: expected {own} tokens as the layout gives rank {layout.rank}, got {got}")
    if layout.packed and x.shape[0] != 1:
        raise ValueError(f"{name}: expected B = 1 with packed sequences, got {x.shape[0]}")


def check_layout(layout: object) -> None:
    if not isinstance(layout, SequenceLayout):
        raise TypeError(f"layout: expected a SequenceLayout, got {type(layout).__name__}")
