"""Where tokens are, what is agreed on, what is sent, and what is refused, on all ranks."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import subquad
import subquad.distributed as sd
from subquad import IntervalMask
from subquad.distributed import _collectives
from subquad.distributed.exchange import overlap, union

from .threads import caught, on_ranks


def test_importing_subquad_imports_none_of_it() -> None:
    code = "import sys, subquad; assert not {'subquad.distributed', 'torch.distributed.tensor'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_spans() -> None:
    assert union([(5, 7), (0, 2), (2, 3), (4, 4), (6, 9)]) == [(0, 3), (5, 9)]
    assert overlap([(0, 3), (5, 9)], [(2, 6), (8, 20)]) == [(2, 3), (5, 6), (8, 9)]


@pytest.mark.parametrize("seed", range(20))
def test_random_layouts(seed: int) -> None:
    """Shards, labels, positions, halos and unshard of any partition, against the whole tensor."""
    rng = random.Random(seed)
    size, tokens = rng.randint(1, 6), rng.randint(0, 40)
    edges = sorted(rng.randint(0, tokens) for _ in range(2 * size))
    spans = list(zip([0, *edges], [*edges, tokens], strict=True))
    owners = [rng.randrange(size) for _ in spans]
    owned = [[s for s, r in zip(spans, owners, strict=True) if r == rank] for rank in range(size)]
    cu = (
        sorted({0, tokens, *(rng.randint(0, tokens) for _ in range(rng.randint(0, 4)))}) if rng.random() < 0.7 else None
    )
    bounds = [0, tokens] if cu is None else cu
    x = torch.arange(3.0 * tokens).view(1, tokens, 3) + 1
    weight = torch.randn(1, tokens, 3, generator=torch.Generator().manual_seed(seed))
    ids = torch.arange(tokens)[None]
    begin_of = [max(b for b in bounds[:-1] if b <= p) for p in range(tokens)]

    def body(rank: int) -> Any:
        layout = sd.SequenceLayout(owned, cu_seqlens=cu)
        own = layout.shard(x).requires_grad_()
        whole = layout.unshard(own)
        (grad,) = torch.autograd.grad((whole * weight).sum(), own)
        local = layout.shard(x).requires_grad_()
        before = sd.halo(local, 4, layout=layout)
        rows = [list(range(run.low - 4, run.low)) for run in layout.mine]
        mix = torch.randn(before.shape, generator=torch.Generator().manual_seed(seed + rank))
        (home,) = torch.autograd.grad((before * mix).sum() + 0 * local.sum(), local)
        return layout, whole, grad, before, rows, mix, home

    found = on_ranks(size, body)
    gathered = torch.zeros(1, tokens, 3)
    for layout, whole, grad, before, rows, mix, _ in found:
        at = layout.positions()
        assert torch.equal(whole, x) and torch.allclose(grad, size * weight[:, at], atol=1e-5)
        assert layout.positions(restart=True).tolist() == [p - begin_of[p] for p in at.tolist()]
        labels = [p + 1 if p + 1 < tokens and p + 1 not in bounds else -100 for p in at.tolist()]
        assert layout.labels(ids)[0].tolist() == labels
        for i, (run, places) in enumerate(zip(layout.mine, rows, strict=True)):
            for j, p in enumerate(places):
                seen = p >= 0 and run.high > run.low and p >= begin_of[run.low]
                wanted = x[0, p] if seen else torch.zeros(3)
                assert torch.equal(before[0, 4 * i + j], wanted), (run, p)
                if seen:
                    gathered[0, p] += mix[0, 4 * i + j]
    for layout, *_, home in found:
        torch.testing.assert_close(home, gathered[:, layout.positions()])
    every = torch.cat([layout.positions() for layout, *_ in found]).sort().values
    assert every.tolist() == list(range(tokens))


def test_zigzag_and_balanced() -> None:
    def body(rank: int) -> Any:
        zigzag = sd.SequenceLayout.zigzag(48)
        balanced = sd.SequenceLayout.balanced(IntervalMask.causal(48, 48))
        packed = IntervalMask.packed(torch.tensor([0, 30, 35, 40, 48]))
        return zigzag.owned, balanced.owned, sd.SequenceLayout.balanced(packed, chunks=4).owned

    zigzag, balanced, dealt = on_ranks(4, body)[0]
    assert zigzag == balanced == [[(0, 6), (42, 48)], [(6, 12), (36, 42)], [(12, 18), (30, 36)], [(18, 30)]]
    work = [
        sum(p - max(b for b in (0, 30, 35, 40) if b <= p) + 1 for a, z in own for p in range(a, z)) for own in dealt
    ]
    assert max(work) < 1.5 * min(work)


# --- what is sent ----------------------------------------


class Traffic:
    """Calls and bytes into every rank."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[tuple[int, str]] = Counter()
        self.bytes: Counter[int] = Counter()
        real = _collectives.all_to_all, _collectives.all_gather

        def all_to_all(given: torch.Tensor, receive: list[int], send: list[int], group: Any) -> torch.Tensor:
            got = real[0](given, receive, send, group)
            rank, _ = _collectives.rank_and_size(group)
            rows = sum(receive) - receive[rank]
            self._count(rank, "all_to_all", rows * got[:1].numel() * got.element_size() if len(got) else 0)
            return got

        def all_gather(given: torch.Tensor, group: Any) -> torch.Tensor:
            rank, size = _collectives.rank_and_size(group)
            self._count(rank, "all_gather", (size - 1) * given.nbytes)
            return real[1](given, group)

        monkeypatch.setattr(_collectives, "all_to_all", all_to_all)
        monkeypatch.setattr(_collectives, "all_gather", all_gather)

    def _count(self, rank: int, name: str, size: int) -> None:
        self.calls[rank, name] += 1
        self.bytes[rank] += size

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()


B, T, H, K, V, W, SINKS = 2, 64, 2, 8, 5, 4, 3
SHAPES = {"q": (B, T, 2 * H, K), "k": (B, T, H, K), "v": (B, T, H, V)}


def _call(op: str, layout: sd.SequenceLayout, **options: Any) -> torch.Tensor:
    rows = {n: torch.ones(s)[:, : layout.lengths[layout.rank]].requires_grad_() for n, s in SHAPES.items()}
    if op == "conv":
        return sd.causal_conv1d(rows["k"].flatten(2), torch.ones(H * K, W), layout=layout)
    if op == "linear":
        return sd.gated_linear_attention(**rows, layout=layout, **options)[0]
    y = sd.interval_attention(**rows, layout=layout, **options)
    assert isinstance(y, torch.Tensor)
    return y


STATE = 4 * B * H * K  # bytes of one column of it
FORMULAS: dict[str, tuple[str, dict[str, Any], Callable[[int, int], int], int]] = {
    # op, options, bytes into rank r of R forward, collectives forward
    "conv": ("conv", {}, lambda r, size: (r > 0) * B * (W - 1) * H * K * 4, 1),
    "gather": ("linear", {"method": "all_gather"}, lambda r, size: (size - 1) * STATE * (V + 2), 1),
    "scan": ("linear", {"method": "scan"}, lambda r, size: (size - 1) * STATE // size * (2 * V + 3), 2),
    "window": ("attention", {"mask": IntervalMask.sliding(9)}, lambda r, size: (r > 0) * B * 8 * H * (K + V) * 4, 1),
    "sinks": (
        "attention", {"mask": IntervalMask.sink(SINKS, 9)},
        lambda r, size: (r > 0) * B * (8 + SINKS) * H * (K + V) * 4, 1,
    ),
    "causal": ("attention", {"mask": IntervalMask.causal()}, lambda r, size: B * r * T // size * H * (K + V) * 4, 1),
    "heads": (
        "attention", {"mask": IntervalMask.causal(), "method": "heads"},
        lambda r, size: B * T // size * (size - 1) // size * (2 * H * K + H * K + H * V + 2 * H * V) * 4, 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, size) for name in FORMULAS for size in (2, 4) if name != "heads" or size <= H],  # more ranks repeat heads
)
def test_bytes_are_those_of_the_formulas(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And backward brings as many again, in as many messages; nothing is sent twice for agreement."""
    op, options, formula, calls = FORMULAS[name]
    traffic = Traffic(monkeypatch)
    barrier = _Barrier(size)

    def body(rank: int) -> Any:
        layout = sd.SequenceLayout.contiguous(T)
        _call(op, layout, **options)  # agrees
        barrier(traffic.clear)
        y = _call(op, layout, **options)
        barrier()
        forward = traffic.bytes[rank], sum(n for (r, _), n in traffic.calls.items() if r == rank)
        barrier(traffic.clear)
        y.sum().backward()
        barrier()
        return forward, (traffic.bytes[rank], sum(n for (r, _), n in traffic.calls.items() if r == rank))

    found = on_ranks(size, body)
    for rank, ((into, count), (_, count_back)) in enumerate(found):
        assert into == formula(rank, size), (rank, into)
        assert count == count_back == calls
    assert sum(b for _, (b, _) in found) == sum(f for (f, _), _ in found)


class _Barrier:
    """Threads that wait for each other; one of them does something meanwhile."""

    def __init__(self, size: int) -> None:
        import threading

        self.barrier = threading.Barrier(size)

    def __call__(self, action: Callable[[], None] = lambda: None) -> None:
        if self.barrier.wait() == 0:
            action()
        self.barrier.wait()


@pytest.mark.parametrize("op", ["conv", "linear", "attention"])
def test_nothing_is_sent_where_no_sequence_crosses_a_border(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = Traffic(monkeypatch)
    barrier = _Barrier(4)

    def body(rank: int) -> None:
        cu = [0, 16, 32, 48, 64]
        layout = sd.SequenceLayout.contiguous(T, cu_seqlens=cu)
        options = {"mask": IntervalMask.packed(torch.tensor(cu))} if op == "attention" else {}
        rows = {n: torch.ones(1, 16, *s[2:]).requires_grad_() for n, s in SHAPES.items()}
        for _ in range(2):
            barrier(traffic.clear)
            if op == "conv":
                y = sd.causal_conv1d(rows["k"].flatten(2), torch.ones(H * K, W), layout=layout)
            elif op == "linear":
                y = sd.gated_linear_attention(**rows, layout=layout)[0]
            else:
                y = sd.interval_attention(**rows, layout=layout, **options)  # type: ignore[assignment]
            y.sum().backward()
            barrier()

    on_ranks(4, body)
    assert not traffic.calls


# --- what is refused ----------------------------------------


def test_wrong_layouts_are_refused_on_all_ranks() -> None:
    cases: list[tuple[Callable[[int], Any], str]] = [
        (lambda r: sd.SequenceLayout([[(0, 4)], [(4, 8)]]), "owned: expected spans of 3 ranks, as many as the group has, got 2"),
        (lambda r: sd.SequenceLayout(5), "owned: expected spans (low, high) for every rank, got 5"),  # type: ignore[arg-type]
        (lambda r: sd.SequenceLayout([5, 6, 7]), "owned: expected spans (low, high) for every rank, got [5, 6, 7]"),  # type: ignore[list-item]
        (lambda r: sd.SequenceLayout([[4], [], []]), "owned: expected spans (low, high) of positions, got 4"),  # type: ignore[list-item]
        (lambda r: sd.SequenceLayout([[(0, 4)], [(5, 8)], []]), "owned: expected every position once, got none at 4"),
        (lambda r: sd.SequenceLayout([[(0, 4)], [(3, 8)], []]), "owned: expected every position once, got two owners at 3"),
        (lambda r: sd.SequenceLayout.contiguous(8, lengths=[3, 3, 3]), "lengths: expected numbers that add up to 8"),
        (lambda r: sd.SequenceLayout.contiguous(8, cu_seqlens=[0, 5, 4, 8]), "cu_seqlens: expected bounds from 0 to 8"),
        (lambda r: sd.SequenceLayout.contiguous(8, cu_seqlens=[0, 7]), "cu_seqlens: expected bounds from 0 to 8"),
        (lambda r: sd.SequenceLayout.contiguous(8 + (r == 1)), "layout: expected the same on all ranks of the group, got"),
        (lambda r: sd.SequenceLayout.balanced(IntervalMask.causal(8, 8), chunks=9), "chunks: expected 1 to 4"),
        (lambda r: sd.SequenceLayout.balanced(IntervalMask.causal()), "tokens: expected a number"),
    ]  # fmt: skip
    for make, message in cases:
        for found in on_ranks(3, lambda rank, make=make: caught(lambda: make(rank))):
            assert message in found, found


def test_wrong_arguments_are_refused_on_all_ranks_and_the_group_goes_on() -> None:
    ones = torch.ones

    def linear(layout: sd.SequenceLayout, **changes: Any) -> Any:
        n = layout.lengths[layout.rank]
        given = {"q": ones(1, n, 4, 8), "k": ones(1, n, 2, 8), "v": ones(1, n, 2, 5)} | changes
        return sd.gated_linear_attention(**given, layout=layout)

    def attention(layout: sd.SequenceLayout, mask: Any = None, **changes: Any) -> Any:
        n = layout.lengths[layout.rank]
        given = {"q": ones(1, n, 4, 8), "k": ones(1, n, 2, 8), "v": ones(1, n, 2, 5)} | changes
        return sd.interval_attention(**given, mask=mask or IntervalMask.causal(), layout=layout)

    cases: list[tuple[Callable[[int, sd.SequenceLayout], Any], str, str]] = [
        (lambda r, at: linear(at, k=ones(1, 3, 2, 8)), "k: expected 8 tokens as the layout gives rank", "line"),
        (lambda r, at: linear(at, k=ones(1, 8 - 5 * (r == 1), 2, 8)), "k: expected 8 tokens as the layout gives rank 1", "line"),
        (lambda r, at: linear(at, method="other"), "method: expected one of", "line"),
        (lambda r, at: linear(at, method="ring"), "method: expected 'all_gather' or 'scan' for a layout", "zigzag"),
        (lambda r, at: linear(at, q=ones(2, 8, 4, 8)), "q: expected B = 1 with packed sequences", "packed"),
        (lambda r, at: linear(at, initial_state=ones(7, 2, 8, 5)), "initial_state: expected", "packed"),
        (lambda r, at: linear(at, eps=1e-3 * (r + 1)), "options: expected the same on all ranks of the group, got", "line"),
        (lambda r, at: linear(at, backend="reference"), "backend: expected 'native' or 'triton'", "line"),
        (lambda r, at: attention(at, IntervalMask.causal(9, 9)), "mask: expected 24 rows and keys as the layout has", "line"),
        (lambda r, at: attention(at, 3), "mask: expected a subquad.IntervalMask", "line"),
        (lambda r, at: attention(at, IntervalMask.sliding(3 + r)), "mask: expected the same on all ranks", "line"),
        (lambda r, at: attention(at, method="heads", return_lse=True), "method: expected 'keys' with", "line"),
        (lambda r, at: attention(at, method="heads"), "tensors[0]: expected shape [B, T, H, D], H a multiple", "line"),
        (lambda r, at: attention(at, key_bias=ones(24)), "key_bias: expected shape [1, 8]", "line"),
        (lambda r, at: sd.causal_conv1d(ones(1, 5, 4), ones(4, 2), layout=at), "x: expected 8 tokens", "line"),
        (lambda r, at: sd.causal_conv1d(ones(1, 8, 4), ones(4, 2 + r), layout=at), "weight: expected the same", "line"),
        (lambda r, at: sd.causal_conv1d(ones(1, 8, 4), ones(4), layout=at), "weight: expected a tensor [D, W]", "line"),
        (lambda r, at: sd.causal_conv1d(ones(1, 8), ones(4, 2), layout=at), "x: expected shape [B, T, D], got [1, 8]", "line"),
        (lambda r, at: sd.conv_feature_map(ones(1, 8, 4), ones(4, 2), ones(1, 4, 2), layout=at), "x: expected shape [B,", "line"),
        (lambda r, at: sd.by_heads(5, ones(1, 8, 3, 4), layout=at), "function: expected a callable, got int", "line"),
        (lambda r, at: sd.by_heads(torch.neg, layout=at), "tensors: expected at least one, got none", "line"),
        (lambda r, at: sd.halo(ones(1, 5, 4), 2, layout=at), "x: expected 8 tokens", "line"),
        (lambda r, at: at.shard(ones(1, 7)), "x: expected 24 tokens in dimension 1", "line"),
        (lambda r, at: at.unshard(ones(1, 7)), "x: expected 8 tokens in dimension 1", "line"),
        (lambda r, at: sd.causal_conv1d(ones(1, 8, 4), ones(4, 2), layout=3), "layout: expected a Seq", "line"),
    ]  # fmt: skip

    def body(rank: int) -> Any:
        messages = []
        for call, _, kind in cases:  # on a layout of its own: no rank knows the call yet
            cu_seqlens = [0, 5, 24] if kind == "packed" else None
            make = sd.SequenceLayout.zigzag if kind == "zigzag" else sd.SequenceLayout.contiguous
            layout = make(24, cu_seqlens=cu_seqlens)
            messages.append(caught(lambda call=call, layout=layout: call(rank, layout)))
            assert linear(layout)[0].shape == (1, 8, 4, 5)  # the group still works
        return messages

    for found in on_ranks(3, body):
        for message, (_, wanted, _) in zip(found, cases, strict=True):
            assert wanted in message, (wanted, message)


def test_what_is_not_a_number_stays_where_it_came_from() -> None:
    def body(rank: int) -> Any:
        layout = sd.SequenceLayout.contiguous(24)
        x = torch.ones(1, 24, 2, 8)
        x[0, 10, 0] = float("nan")
        whole = subquad.interval_attention(torch.ones(1, 24, 2, 8), x, x, IntervalMask.sliding(5))
        own = layout.shard(x)
        found = sd.interval_attention(torch.ones(1, 8, 2, 8), own, own, IntervalMask.sliding(5), layout=layout)
        linear, _ = subquad.gated_linear_attention(torch.ones(1, 24, 2, 8), x, x)
        mine, _ = sd.gated_linear_attention(torch.ones(1, 8, 2, 8), own, own, layout=layout)
        assert isinstance(found, torch.Tensor) and isinstance(whole, torch.Tensor)
        return torch.equal(found.isnan(), layout.shard(whole).isnan()), torch.equal(
            mine.isnan(), layout.shard(linear).isnan()
        )

    assert all(all(pair) for pair in on_ranks(3, body))


def test_masks_are_compared_to_the_last_bound_and_again_when_written_to() -> None:
    def differ(rank: int) -> str:
        layout = sd.SequenceLayout.contiguous(24)
        mask = IntervalMask.sliding(3 + rank, 24, 24).materialize()
        x = torch.ones(1, 12, 2, 8)
        return caught(lambda: sd.interval_attention(x, x, x, mask, layout=layout))

    assert all("mask: expected the same on all ranks" in message for message in on_ranks(2, differ))

    def written(rank: int) -> bool:
        layout = sd.SequenceLayout.contiguous(24)
        mask = IntervalMask.sliding(4, 24, 24).materialize()
        q, k, v = (torch.randn(1, 24, 2, 8, generator=torch.Generator().manual_seed(s)) for s in range(3))
        local = [layout.shard(x) for x in (q, k, v)]
        sd.interval_attention(*local, mask, layout=layout)
        assert mask.starts is not None
        mask.starts.zero_()
        found, whole = sd.interval_attention(*local, mask, layout=layout), subquad.interval_attention(q, k, v, mask)
        assert isinstance(found, torch.Tensor) and isinstance(whole, torch.Tensor)
        return torch.allclose(found, layout.shard(whole), atol=1e-6)

    assert all(on_ranks(2, written))


def test_what_one_rank_alone_is_given_wrongly() -> None:
    def body(rank: int) -> list[str]:
        wrong = rank == 0
        layout = sd.SequenceLayout.contiguous(24)
        return [
            caught(lambda: sd.SequenceLayout.contiguous(24, lengths=[9, 9, 9] if wrong else None)),
            caught(lambda: sd.SequenceLayout.contiguous(24, cu_seqlens=[0, 3.5, 24] if wrong else None)),  # type: ignore[list-item]
            caught(lambda: sd.SequenceLayout.zigzag(-1 if wrong else 24)),
            caught(lambda: sd.SequenceLayout.balanced(IntervalMask.causal(24, 24), chunks=9 if wrong else 2)),
            caught(lambda: sd.halo(torch.ones(1, 5 if wrong else 8, 4), 2, layout=layout)),
            caught(lambda: sd.halo(torch.ones(1, 8, 4), 3 if wrong else 2, layout=layout)),
        ]

    for messages in on_ranks(3, body):
        assert all(message != "nothing" for message in messages), messages


def test_heads_of_the_first_tensor_are_never_repeated() -> None:
    def body(rank: int) -> str:
        layout, x = sd.SequenceLayout.contiguous(24), torch.ones(1, 6, 2, 8)
        return caught(lambda: sd.interval_attention(x, x, x, IntervalMask.causal(), layout=layout, method="heads"))

    assert all("tensors[0]: expected shape [B, T, H, D], H a multiple of 4" in message for message in on_ranks(4, body))
