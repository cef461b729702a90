"""`SequenceLayout`: where the tokens of a sequence are. Every rank owns ascending spans of positions; all ranks know all."""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .. import _checks
from ..masks import IntervalMask
from . import _collectives
from ._collectives import Group
from .agreement import agree

Span = tuple[int, int]


@dataclass(frozen=True)
class Run:
    """Neighbouring positions of one rank.

    Attributes:
        low, high: its positions.
        owner: the rank.
        offset: where it begins among the rank's tokens.
        index: among the rank's runs.
        passes: no sequence begins in it: the state that enters it also leaves it.
        continues: its first token is not the first of a sequence.
        cuts: bounds of its pieces, from 0 to its length: the cu_seqlens of a call on it.
    """

    low: int
    high: int
    owner: int
    offset: int
    index: int = 0
    passes: bool = True
    continues: bool = False
    cuts: tuple[int, ...] = (0, 0)

    @property
    def local(self) -> slice:
        """Its place among the rank's tokens."""
        return slice(self.offset, self.offset + self.high - self.low)

    @property
    def pieces(self) -> int:
        return len(self.cuts) - 1


class SequenceLayout:
    """Which rank owns which tokens of a sequence; equal on all ranks, which agree on it when it is made.

    Args:
        owned: for every rank its spans (low, high) of positions; together every position once.
        group: a process group, a one-dimensional DeviceMesh, or None for the default group.
        cu_seqlens: bounds of packed sequences, from 0 to the number of tokens; None: one sequence.

    Attributes:
        rank, size: of the group. tokens: of the whole sequence. lengths: tokens of every rank. runs: all runs by position.

    Raises:
        ValueError: spans that miss or repeat a position, bounds that do not fit, ranks that disagree.
        RuntimeError: there is no process group.

    Example:
        >>> layout = SequenceLayout.zigzag(1024)  # doctest: +SKIP
        >>> y, _ = subquad.distributed.gated_linear_attention(layout.shard(q), ..., layout=layout)  # doctest: +SKIP
    """

    def __init__(
        self,
        owned: Iterable[Iterable[Span]],
        *,
        group: Group = None,
        cu_seqlens: torch.Tensor | Sequence[int] | None = None,
    ) -> None:
        self._make(lambda size: owned, group, cu_seqlens)

    def _make(self, owned: Callable[[int], Iterable[Iterable[Span]]], group: Group, cu_seqlens: Any) -> None:
        """Of what `owned` makes of the number of ranks; an error on one rank is raised on all of them."""
        self.group = _collectives.group_of(group)
        self.rank, self.size = _collectives.rank_and_size(self.group)
        self.agreed: set[str] = set()  # signatures of calls that all ranks agreed on
        self.plans: dict[Any, Any] = {}  # exchanges by what they are for
        self.masks: WeakKeyDictionary[IntervalMask, Any] = WeakKeyDictionary()  # what attention makes of a mask here
        self.digests: WeakKeyDictionary[IntervalMask, Any] = WeakKeyDictionary()  # and what it was then
        problem: Exception | None = None
        try:
            self._lay_out(_spans(owned(self.size)), cu_seqlens)
        except (TypeError, ValueError) as error:  # tell the others, who may have been given the right thing
            problem = error
        known = ("problem", str(problem)) if problem else (self.owned, self.cu_seqlens)
        try:
            agree(self.group, layout=known)
        except ValueError:
            if problem is None:
                raise
        if problem is not None:
            raise problem

    def _lay_out(self, owned: list[list[Span]], cu_seqlens: torch.Tensor | Sequence[int] | None) -> None:
        if len(owned) != self.size:
            raise ValueError(f"owned: expected spans of {self.size} ranks, as many as the group has, got {len(owned)}")
        self.owned = [_merged(spans) for spans in owned]
        spans = sorted((a, b, r) for r, own in enumerate(self.owned) for a, b in own)
        edge = 0
        for a, b, _ in spans:
            if a != edge:
                got = "none at" if a > edge else "two owners at"
                raise ValueError(f"owned: expected every position once, got {got} {min(a, edge)}")
            edge = b
        self.tokens = edge
        self.packed = cu_seqlens is not None
        self.cu_seqlens = _bounds(cu_seqlens, edge)
        self._starts = sorted({a for a, b in zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False) if a < b})
        offsets, counts = [0] * self.size, [0] * self.size
        self.runs: list[Run] = []
        for a, b, r in spans:
            inside = self._starts[bisect_left(self._starts, a) : bisect_left(self._starts, b)]
            cuts = (0, *(c - a for c in inside if c > a), b - a)
            self.runs.append(Run(a, b, r, offsets[r], counts[r], not inside, a not in self._starts, cuts))
            offsets[r] += b - a
            counts[r] += 1
        self.lengths = offsets
        self.most_runs = max(counts)  # of a rank

    @classmethod
    def contiguous(
        cls,
        tokens: int,
        *,
        lengths: Sequence[int] | None = None,
        group: Group = None,
        cu_seqlens: torch.Tensor | Sequence[int] | None = None,
    ) -> SequenceLayout:
        """One span a rank, in their order: of `lengths`, or equal ones, where the first ranks take what is left over.

        Raises:
            ValueError: as the class, or lengths that do not add up to tokens.
        """

        def owned(size: int) -> list[list[Span]]:
            _checks.size("tokens", tokens)
            parts = [tokens // size + (r < tokens % size) for r in range(size)] if lengths is None else list(lengths)
            if not all(isinstance(n, int) and n >= 0 for n in parts) or sum(parts) != tokens:
                raise ValueError(f"lengths: expected numbers that add up to {tokens}, got {parts}")
            edges = [sum(parts[:r]) for r in range(len(parts) + 1)]
            return [[span] for span in itertools.pairwise(edges)]

        return cls._made(owned, group, cu_seqlens)

    @classmethod
    def zigzag(
        cls, tokens: int, *, group: Group = None, cu_seqlens: torch.Tensor | Sequence[int] | None = None
    ) -> SequenceLayout:
        """Rank r owns chunks r and 2 R - 1 - r of 2 R: under a causal mask all ranks have the same work."""

        def owned(size: int) -> list[list[Span]]:
            _checks.size("tokens", tokens)
            edges = [tokens * c // (2 * size) for c in range(2 * size + 1)]
            return [[(edges[c], edges[c + 1]) for c in (r, 2 * size - 1 - r)] for r in range(size)]

        return cls._made(owned, group, cu_seqlens)

    @classmethod
    def balanced(
        cls,
        mask: IntervalMask,
        *,
        tokens: int | None = None,
        chunks: int = 2,
        group: Group = None,
        cu_seqlens: torch.Tensor | Sequence[int] | None = None,
    ) -> SequenceLayout:
        """Every rank gets `chunks` of R times as many chunks of rows, dealt there and back by the pairs that a mask shows, those
        with the most first: zigzag for a causal mask and two chunks.

        Args:
            mask: of the whole sequence.
            tokens: of the sequence, for a mask without sizes.
            chunks: 1 to 4; every one is a run of its own, with a state of its own to be sent.
            group, cu_seqlens: as in the class.
        """

        def owned(size: int) -> list[list[Span]]:
            _checks.size("chunks", chunks, 1)
            if chunks > 4:
                raise ValueError(f"chunks: expected 1 to 4, for every chunk sends a state, got {chunks}")
            count = mask.tq if tokens is None else tokens
            if count is None:
                raise ValueError("tokens: expected a number, for the mask has no sizes")
            if mask.tq is not None and (mask.tq, mask.tk) != (count, count):
                raise ValueError(f"mask: expected {count} rows and keys, got {mask.tq} and {mask.tk}")
            whole = mask.materialize(count, count)
            assert whole.starts is not None and whole.ends is not None
            pairs = (whole.ends - whole.starts).clamp_min(0).sum((0, 1, 3), dtype=torch.int64).cumsum(0).tolist()
            edges = [count * c // (chunks * size) for c in range(chunks * size + 1)]
            until = [pairs[e - 1] if e else 0 for e in edges]
            work = [b - a for a, b in itertools.pairwise(until)]
            dealt: list[list[Span]] = [[] for _ in range(size)]
            for i, c in enumerate(sorted(range(len(work)), key=lambda c: (-work[c], -c))):
                lap, place = divmod(i, size)
                dealt[place if lap % 2 == 0 else size - 1 - place].append((edges[c], edges[c + 1]))
            return dealt

        return cls._made(owned, group, cu_seqlens)

    @classmethod
    def _made(cls, owned: Callable[[int], list[list[Span]]], group: Group, cu_seqlens: Any) -> SequenceLayout:
        layout = cls.__new__(cls)
        layout._make(owned, group, cu_seqlens)
        return layout

    # --- what this rank has ----------------------------------------

    @property
    def mine(self) -> list[Run]:
        """This rank's runs; one without tokens where it has none, so that it takes part in everything."""
        return [run for run in self.runs if run.owner == self.rank] or [Run(0, 0, self.rank, 0)]

    def hands_on(self, run: Run) -> bool:
        """Whether another run goes on with the sequence that stands at a run's end."""
        return any(other.continues for other in self.runs if other.low == run.high and other is not run)

    def begin(self, position: int) -> int:
        """First position of the sequence that a position lies in."""
        return self._starts[bisect_right(self._starts, position) - 1] if self._starts else 0

    def positions(self, rank: int | None = None, *, restart: bool = False, device: Any = None) -> torch.Tensor:
        """int64 [tokens of the rank]: where its tokens stand; `restart`: counted from the first token of each sequence."""
        spans = self.owned[self.rank if rank is None else rank]
        found = torch.cat([torch.arange(a, b) for a, b in spans] or [torch.arange(0)])
        if restart and self._starts:
            starts = torch.tensor(self._starts)
            found = found - starts[torch.searchsorted(starts, found, right=True) - 1]
        return found.to(device)

    def shard(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """This rank's part of a whole tensor. Differentiable: its gradient is this rank's share, zero elsewhere.

        Raises:
            ValueError: the dimension has another number of tokens.
        """
        if x.shape[dim] != self.tokens:
            raise ValueError(
                f"x: expected {self.tokens} tokens in dimension {dim} as the layout has, got {list(x.shape)}"
            )
        return x.index_select(dim, self.positions(device=x.device))

    def unshard(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The whole tensor on every rank. Differentiable: the gradient of a shard is the sum over ranks of what they ask of it.

        Raises:
            ValueError: the dimension has another number of tokens than this rank.
        """
        if x.shape[dim] != self.lengths[self.rank]:
            raise ValueError(
                f"x: expected {self.lengths[self.rank]} tokens in dimension {dim} as the layout gives rank {self.rank}, got "
                f"{list(x.shape)}"
            )
        whole: torch.Tensor = _Unshard.apply(x.movedim(dim, 0), self)
        return whole.movedim(0, dim)

    def labels(self, labels: torch.Tensor, dim: int = 1, ignore_index: int = -100) -> torch.Tensor:
        """Next-token labels of this rank's tokens: shifted in the whole sequence and then cut, `ignore_index` behind the last
        token of every sequence."""
        if labels.shape[dim] != self.tokens:
            raise ValueError(f"labels: expected {self.tokens} tokens in dimension {dim}, got {list(labels.shape)}")
        rows = labels.movedim(dim, 0)
        shifted = torch.cat([rows[1:], torch.full_like(rows[:1], ignore_index)])
        ends = [b - 1 for a, b in zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False) if a < b]
        shifted[torch.tensor(ends, dtype=torch.int64, device=rows.device)] = ignore_index
        return self.shard(shifted.movedim(0, dim), dim)

    def __repr__(self) -> str:
        spans = ", ".join("+".join(f"{a}:{b}" for a, b in own) or "none" for own in self.owned)
        return f"SequenceLayout(tokens={self.tokens}, rank={self.rank} of {self.size}, owned=[{spans}])"


class _Unshard(torch.autograd.Function):
    """Tokens in dimension 0."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
        ctx.layout = layout
        most = max(layout.lengths)  # gloo and NCCL gather equal sizes
        padded = x.new_zeros((most, *x.shape[1:]))
        padded[: x.shape[0]] = x
        every = _collectives.all_gather(padded, layout.group)
        whole = x.new_empty((layout.tokens, *x.shape[1:]))
        for r, part in enumerate(every.unflatten(0, (layout.size, most))):
            whole[layout.positions(r, device=x.device)] = part[: layout.lengths[r]]
        return whole

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        layout: SequenceLayout = ctx.layout
        order = torch.cat([layout.positions(r, device=grad.device) for r in range(layout.size)])
        own = layout.lengths[layout.rank]
        got = _collectives.all_to_all(grad[order], [own] * layout.size, layout.lengths, layout.group)
        total = got.new_zeros((own, *grad.shape[1:]), dtype=torch.promote_types(grad.dtype, torch.float32))
        for part in got.split([own] * layout.size):  # in the order of ranks
            total += part
        return total.to(grad.dtype), None


def _bounds(cu_seqlens: torch.Tensor | Sequence[int] | None, tokens: int) -> list[int]:
    if cu_seqlens is None:
        return [0, tokens]
    bounds = list(cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens)
    if not all(isinstance(n, int) for n in bounds):
        raise TypeError(f"cu_seqlens: expected whole numbers, got {bounds[:8]}")
    steps = itertools.pairwise(bounds)
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in steps):
        raise ValueError(
            f"cu_seqlens: expected bounds from 0 to {tokens} that do not decrease, got {_checks.shown(bounds)}"
        )
    return bounds


def _spans(owned: Any) -> list[list[Span]]:
    """Of every rank."""
    given = list(owned) if isinstance(owned, Iterable) else []
    if not isinstance(owned, Iterable) or not all(isinstance(spans, Iterable) for spans in given):
        raise TypeError(f"owned: expected spans (low, high) for every rank, got {given or owned!r}")
    return [[_span(span) for span in spans] for spans in given]


def _span(span: Any) -> Span:
    pair = tuple(span) if isinstance(span, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(n, int) for n in pair) or not 0 <= pair[0] <= pair[1]:
        raise ValueError(f"owned: expected spans (low, high) of positions, got {span!r}")
    return pair[0], pair[1]


def _merged(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for a, b in sorted(span for span in spans if span[0] < span[1]):
        if merged and merged[-1][1] == a:
            merged[-1] = (merged[-1][0], b)
        else:
            merged.append((a, b))
    return merged
