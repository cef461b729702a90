"""Streams as lists in Python: what a cache remembers, row by row, in float64, without a ring."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from subquad import RopeSpec, SinkKVCache

ROPE = RopeSpec(1.0 / 30.0 ** (torch.arange(0, 6, 2).double() / 6), 6, attention_scaling=1.2)
INTERLEAVED = RopeSpec(1.0 / 20.0 ** (torch.arange(0, 4, 2).double() / 4), 4, interleaved=True)
# By frame, line and column.
VIDEO = RopeSpec(torch.tensor([0.9, 0.5, 0.3]), 6, attention_scaling=1.2, axes=(1, 1, 1))
WIDE_VIDEO = RopeSpec(torch.tensor([1.0, 0.01, 0.7, 0.4]), 8, interleaved=True, axes=(2, 1, 1))
HEADS, KV_HEADS, DIM = 4, 2, 8


@dataclass
class Token:
    """Key and value of all heads [H, D], neither rotated; `gone` when it is forgotten for good."""

    k: torch.Tensor
    v: torch.Tensor
    gone: bool = False


@dataclass
class Stream:
    """One sequence under the literal definition: a list of tokens, of which some are seen, at positions 0, 1, 2, ..."""

    sinks: int
    window: int
    rope: RopeSpec | None = None
    absolute: bool = False
    sink_logits: torch.Tensor | None = None
    tokens: list[Token] = field(default_factory=list)
    grid: tuple[int, int] | None = None  # lines and columns of a frame

    def seen_by(self, last: int) -> list[int]:
        """Tokens that one sees whose window ends at `last`."""
        window = range(max(self.sinks, last - self.window + 1), last + 1)
        return [*range(min(self.sinks, last + 1)), *(j for j in window if not self.tokens[j].gone)]

    def step(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, together: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [T, Hq, Dv], lse [T, Hq]) of new tokens [T, H, D], which are appended."""
        start = len(self.tokens)
        self.tokens += [Token(*pair) for pair in zip(k, v, strict=True)]
        found = [self.attend(q[t], start + t, len(self.tokens) - 1 if together else start + t) for t in range(len(q))]
        empty = q.new_zeros(0, q.shape[1], v.shape[2]), q.new_zeros(0, q.shape[1])
        return tuple(torch.stack(x) for x in zip(*found, strict=True)) if found else empty  # type: ignore[return-value]

    def attend(self, q: torch.Tensor, i: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen = self.seen_by(last)
        positions, own = list(range(len(seen))), len(seen) - 1 - (last - i)
        if self.absolute:
            positions, own = seen, i
        groups = q.shape[0] // KV_HEADS
        keys = (
            torch.stack([self.turned(self.tokens[j].k, p) for j, p in zip(seen, positions, strict=True)], 1)
            if seen
            else None
        )
        logits = (
            q.new_full((q.shape[0], 1), -torch.inf) if self.sink_logits is None else self.sink_logits[:, None].to(q)
        )
        if keys is None:
            return q.new_zeros(q.shape[0], self.tokens[i].v.shape[1]), logits[:, 0]
        query = self.turned(q, own)
        scores = torch.einsum("hd,hjd->hj", query, keys.repeat_interleave(groups, 0)) * q.shape[1] ** -0.5
        scores = torch.cat([scores, logits], 1)
        values = torch.stack([self.tokens[j].v for j in seen], 1).repeat_interleave(groups, 0)
        return torch.einsum("hj,hjd->hd", scores.softmax(1)[:, :-1], values), scores.logsumexp(1)

    def turned(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """x [H, D] rotated by angles in plain floating point, and scaled."""
        if self.rope is None:
            return x
        width, angle = self.rope.rotary_dim, self.rope.inv_freq.double() * self.numbers(position)
        first = x[:, :width] * self.rope.attention_scaling
        a, b = (first[:, ::2], first[:, 1::2]) if self.rope.interleaved else first.chunk(2, 1)
        pair = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        done = torch.stack(pair, 2).flatten(1) if self.rope.interleaved else torch.cat(pair, 1)
        return torch.cat([done, x[:, width:]], 1)

    def numbers(self, position: int) -> torch.Tensor:
        """What every frequency is multiplied by."""
        assert self.rope is not None
        if self.grid is None or self.rope.axes is None:
            return torch.tensor(position)
        frame, place = divmod(position, self.grid[0] * self.grid[1])
        return torch.tensor([frame, *divmod(place, self.grid[1])]).repeat_interleave(torch.tensor(self.rope.axes))

    # --- forgetting ----------------------------------------

    def forget_before(self, first: int) -> None:
        for token in self.tokens[self.sinks : max(first, self.sinks)]:
            token.gone = True

    def evict_for_space(self, m: int) -> None:
        self.forget_before(len(self.tokens) + m - self.window)

    def evict(self, lo: int, hi: int) -> None:
        hi = min(hi, len(self.tokens))
        if lo >= hi:
            return
        self.forget_before(len(self.tokens) - self.window)
        head, tail = self.tokens[: self.sinks], self.tokens[self.sinks :]
        head = [x for j, x in enumerate(head) if not lo <= j < hi]
        tail = [x for j, x in enumerate(tail, len(self.tokens[: self.sinks])) if not lo <= j < hi]
        while len(head) < self.sinks and any(not x.gone for x in tail):
            head.append(tail.pop(next(i for i, x in enumerate(tail) if not x.gone)))
        self.tokens = head + (tail if len(head) == self.sinks else [])


def streams_of(cache: SinkKVCache) -> list[Stream]:
    logits = cache.sink_logits
    absolute = cache.positions == "absolute"
    return [Stream(cache.sink_tokens, cache.window, cache.rope, absolute, logits) for _ in range(cache.seen.shape[0])]


def drawn(batch: int, width: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k, v [B, T, H, D]."""
    return [torch.randn(batch, width, heads, DIM, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
