"""Operators on shards against one process: layouts, packed sequences, masks, gates, states; ranks are threads."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import subquad
import subquad.distributed as sd
from subquad import IntervalMask, RopeSpec

from .programs.common import LIMIT, error, same
from .threads import on_ranks

SIZES = pytest.mark.parametrize("size", [1, 2, 3, 5])
TOKENS = 61
PACKED = [0, 3, 20, 21, 22, 22, 50, 61]
CLOSE = {torch.float32: LIMIT, torch.bfloat16: 2e-2}


def uneven(size: int) -> list[int]:
    weights = [1 + (3 * r) % 5 for r in range(size)]
    cuts = [TOKENS * sum(weights[:r]) // sum(weights) for r in range(size + 1)]
    return [b - a for a, b in itertools.pairwise(cuts)]


def gaps(size: int) -> list[int]:
    """Ranks without tokens between those that have them."""
    return [TOKENS] if size == 1 else [TOKENS - 5, *[0] * (size - 2), 5]


LAYOUTS: dict[str, Callable[[int], sd.SequenceLayout]] = {
    "even": lambda size: sd.SequenceLayout.contiguous(TOKENS),
    "uneven": lambda size: sd.SequenceLayout.contiguous(TOKENS, lengths=uneven(size)),
    "gaps": lambda size: sd.SequenceLayout.contiguous(TOKENS, lengths=gaps(size)),
    "zigzag": lambda size: sd.SequenceLayout.zigzag(TOKENS),
    "packed": lambda size: sd.SequenceLayout.contiguous(TOKENS, lengths=uneven(size), cu_seqlens=PACKED),
    "packed-zigzag": lambda size: sd.SequenceLayout.zigzag(TOKENS, cu_seqlens=torch.tensor(PACKED)),
    "packed-at-borders": lambda size: sd.SequenceLayout.contiguous(TOKENS, cu_seqlens=_edges(size)),
}
KINDS = pytest.mark.parametrize("kind", LAYOUTS)


def _edges(size: int) -> list[int]:
    parts = [TOKENS // size + (r < TOKENS % size) for r in range(size)]
    return [sum(parts[:r]) for r in range(size + 1)]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(
    size: int,
    layout_of: Callable[[int], sd.SequenceLayout],
    rows: dict[str, torch.Tensor],
    whole: dict[str, torch.Tensor],
    one: Callable[..., torch.Tensor],
    many: Callable[..., torch.Tensor],
    bits: bool = False,
) -> None:
    """Results and all gradients of one process and of shards. `rows` are cut, `whole` is on every rank."""
    inputs = {name: x.clone().requires_grad_() for name, x in (rows | whole).items()}
    expected = one(**inputs)
    weight = normal(*expected.shape, seed=99).to(expected.dtype)
    wanted = dict(zip(inputs, torch.autograd.grad((expected * weight).sum(), list(inputs.values())), strict=True))

    def body(rank: int) -> Any:
        layout = layout_of(size)
        local = {name: layout.shard(x).requires_grad_() for name, x in rows.items()}
        local |= {name: x.clone().requires_grad_() for name, x in whole.items()}
        y = many(layout=layout, **local)
        grads = torch.autograd.grad((y * layout.shard(weight)).sum(), list(local.values()))
        return layout.positions(), y.detach(), dict(zip(local, grads, strict=True))

    @functools.cache
    def exact() -> dict[str, torch.Tensor]:
        wide = {name: x.double().requires_grad_() for name, x in (rows | whole).items()}
        with subquad.use_backend("reference"):
            loss = (one(**wide) * weight.double()).sum()
            return dict(zip(wide, torch.autograd.grad(loss, list(wide.values())), strict=True))

    found = on_ranks(size, body)
    limit = CLOSE[expected.dtype]
    for at, y, _ in found:
        if bits:
            assert torch.equal(y, expected[:, at])
        torch.testing.assert_close(y, expected[:, at], rtol=0, atol=limit * float(expected.detach().abs().max()))
    for name, grad in wanted.items():
        total = torch.zeros_like(grad, dtype=torch.float32)
        for at, _, grads in found:  # a rank's part, or its part of a sum
            total[(slice(None), at) if name in rows else ...] += grads[name].float()
        assert same(total, grad.float(), lambda n=name: exact()[n], limit), f"{name}: {error(total, grad):.1e}"


def batch_of(kind: str) -> int:
    return 1 if "packed" in kind else 2


def bounds_of(kind: str, size: int) -> torch.Tensor | None:
    if kind == "packed-at-borders":
        return torch.tensor(_edges(size))
    return torch.tensor(PACKED) if "packed" in kind else None


# --- convolutions ----------------------------------------


@SIZES
@KINDS
@pytest.mark.parametrize("taps", [1, 4, 8])
def test_convolution_has_the_bits_of_one_process(size: int, kind: str, taps: int) -> None:
    cu = bounds_of(kind, size)
    options: dict[str, Any] = {"activation": "silu", "channel_groups": 2, "head_dim": 8}
    compare(
        size,
        LAYOUTS[kind],
        {"x": normal(batch_of(kind), TOKENS, 16, seed=1), "residual": normal(batch_of(kind), TOKENS, 32, seed=4)},
        {"weight": normal(32, taps, seed=2), "bias": normal(32, seed=3)},
        lambda **x: subquad.causal_conv1d(**x, cu_seqlens=cu, **options)[0],
        lambda **x: sd.causal_conv1d(**x, **options),
        bits=True,
    )


@SIZES
@KINDS
def test_conv_feature_map(size: int, kind: str) -> None:
    cu = bounds_of(kind, size)
    compare(
        size,
        LAYOUTS[kind],
        {"x": normal(batch_of(kind), TOKENS, 2, 8, seed=1)},
        {"conv_weight": normal(32, 4, seed=2), "fm_weight": normal(4, 8, 6, seed=3)},
        lambda **x: subquad.conv_feature_map(**x, cu_seqlens=cu)[0],
        lambda **x: sd.conv_feature_map(**x),
        bits=True,
    )


# --- gated linear attention ----------------------------------------

GATES = ("channel", "head", "none")


@SIZES
@KINDS
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("method", ["all_gather", "scan"])
@pytest.mark.parametrize("normalize", [False, True])
def test_gated_linear_attention(size: int, kind: str, gate: str, method: str, normalize: bool) -> None:
    batch, cu = batch_of(kind), bounds_of(kind, size)
    rows = {
        "q": normal(batch, TOKENS, 4, 8, seed=1).abs(),
        "k": normal(batch, TOKENS, 2, 8, seed=2).abs(),
        "v": normal(batch, TOKENS, 1, 5, seed=3),
    }
    if gate != "none":
        shape = (batch, TOKENS, 2, 8) if gate == "channel" else (batch, TOKENS, 2)
        rows["g"] = -0.1 * normal(*shape, seed=4).abs()
    compare(
        size,
        LAYOUTS[kind],
        rows,
        {},
        lambda **x: subquad.gated_linear_attention(**x, cu_seqlens=cu, normalize=normalize)[0],
        lambda **x: sd.gated_linear_attention(**x, method=method, normalize=normalize)[0],
    )


@SIZES
@pytest.mark.parametrize("kind", ["uneven", "gaps", "zigzag", "packed", "packed-zigzag"])
@pytest.mark.parametrize("normalize", [False, True])
def test_states_and_their_gradients(size: int, kind: str, normalize: bool) -> None:
    states_and_their_gradients(size, kind, normalize)


def states_and_their_gradients(size: int, kind: str, normalize: bool) -> None:
    """Initial states of the sequences that begin on a rank, the state after each rank's last token, and gradients into both."""
    batch, cu = batch_of(kind), bounds_of(kind, size)
    q, k, v = (
        normal(batch, TOKENS, 2, 8, seed=1).abs(),
        normal(batch, TOKENS, 2, 8, seed=2).abs(),
        normal(batch, TOKENS, 2, 5, seed=3),
    )
    g = -0.1 * normal(batch, TOKENS, 2, 8, seed=4).abs()
    count = batch if cu is None else len(cu) - 1
    s0 = normal(count, 2, 8, 6 if normalize else 5, seed=5).abs()
    inputs = [x.clone().requires_grad_() for x in (q, k, v, g, s0)]
    options: dict[str, Any] = {"normalize": normalize, "output_final_state": True}
    o1, last = subquad.gated_linear_attention(*inputs[:4], initial_state=inputs[4], cu_seqlens=cu, **options)
    assert isinstance(last, torch.Tensor)
    w, ws = normal(*o1.shape, seed=7), normal(*last.shape, seed=8)
    wanted = torch.autograd.grad((o1 * w).sum() + (last * ws).sum(), inputs)

    def body(rank: int) -> Any:
        layout = LAYOUTS[kind](size)
        local = [layout.shard(x).requires_grad_() for x in (q, k, v, g)]
        mine = [] if layout.lengths[rank] == 0 else layout.mine
        if cu is None:
            state, ends = s0.clone().requires_grad_(), [run for run in mine[-1:] if run.high == TOKENS]
            rows = torch.arange(batch)
        else:  # one row for every piece here, of which those that came from elsewhere are not read
            own = [b for run in layout.mine for b in [run.low + c for c in run.cuts[:-1]]]
            rows = torch.tensor(
                [max(i for i, c in enumerate(PACKED[:-1]) if c <= p and (PACKED[i + 1] > c)) for p in own]
            )
            state, ends = s0[rows].clone().requires_grad_(), []
        o, after = sd.gated_linear_attention(*local, layout=layout, initial_state=state, **options)
        assert isinstance(after, torch.Tensor)
        loss = (o * layout.shard(w)).sum()
        if cu is None and ends:
            loss = loss + (after * ws).sum()
            torch.testing.assert_close(after, last.detach(), rtol=0, atol=LIMIT * float(last.detach().abs().max()))
        if cu is not None:
            piece = 0
            for run in layout.mine:
                for begin, end in zip(run.cuts, run.cuts[1:], strict=False):
                    stop = run.low + end
                    if end > begin and stop in PACKED:
                        at = max(i for i, c in enumerate(PACKED[1:]) if c == stop and PACKED[i] < c)
                        torch.testing.assert_close(
                            after[piece], last[at].detach(), rtol=0, atol=LIMIT * float(last.detach().abs().max())
                        )
                        loss = loss + (after[piece] * ws[at]).sum()
                    piece += 1
        return layout.positions(), o.detach(), torch.autograd.grad(loss, [*local, state]), rows

    found = on_ranks(size, body)
    total = torch.zeros_like(s0)
    for at, o, grads, rows in found:
        torch.testing.assert_close(o, o1[:, at].detach(), rtol=0, atol=LIMIT * float(o1.detach().abs().max()))
        for grad, one in zip(grads[:4], wanted[:4], strict=True):
            torch.testing.assert_close(grad, one[:, at], rtol=0, atol=LIMIT * float(one.abs().max()))
        total.index_add_(0, rows, grads[4])
    empty = torch.zeros(count, dtype=torch.bool) if cu is None else cu.diff() == 0  # an empty sequence is on no rank
    torch.testing.assert_close(total[~empty], wanted[4][~empty], rtol=0, atol=LIMIT * float(wanted[4].abs().max()))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_state_without_tokens_is_what_was_given(size: int, normalize: bool, packed: bool) -> None:
    """On every rank, with its gradient; as in one process."""
    s0 = normal(1, 2, 8, 6 if normalize else 5, seed=5).abs()

    def body(rank: int) -> None:
        layout = sd.SequenceLayout.contiguous(0, cu_seqlens=[0, 0] if packed else None)
        q, k, v = (torch.ones(1, 0, 2, d) for d in (8, 8, 5))
        state = s0.clone().requires_grad_()
        options: dict[str, Any] = {"initial_state": state, "output_final_state": True, "normalize": normalize}
        o, after = sd.gated_linear_attention(q, k, v, layout=layout, **options)
        assert o.shape == (1, 0, 2, 5) and isinstance(after, torch.Tensor) and torch.equal(after, s0)
        w = normal(*s0.shape, seed=6)
        assert torch.equal(torch.autograd.grad((after * w).sum(), state)[0], w)

    on_ranks(size, body)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("kind", ["uneven", "gaps", "packed"])
def test_all_exchanges_have_the_same_bits(size: int, kind: str) -> None:
    batch = batch_of(kind)
    q, k, v = (normal(batch, TOKENS, 2, 8, seed=s).abs() for s in (1, 2, 3))
    g = -normal(batch, TOKENS, 2, 8, seed=4).abs()

    def body(rank: int) -> list[torch.Tensor]:
        layout = LAYOUTS[kind](size)
        found = []
        for method in ("all_gather", "scan"):  # the threaded group has no point-to-point: the ring is run by processes
            local = [layout.shard(x).requires_grad_() for x in (q, k, v, g)]
            o, state = sd.gated_linear_attention(*local, layout=layout, method=method, output_final_state=True)
            assert isinstance(state, torch.Tensor)
            found.append(
                torch.cat(
                    [x.flatten() for x in (o.detach(), state.detach(), *torch.autograd.grad(o.square().sum(), local))]
                )
            )
        return found

    for one, other in on_ranks(size, body):
        assert torch.equal(one, other)


@pytest.mark.parametrize("gate", [-2000.0, -1e-6, 0.05, float("-inf")])
def test_gates_at_their_limits(gate: float) -> None:
    rows = {n: normal(1, TOKENS, 2, 8, seed=i).abs() for i, n in enumerate(("q", "k", "v"))}
    g = torch.full((1, TOKENS, 2, 8), -0.01)
    g[:, 30] = gate
    expected = subquad.gated_linear_attention(**rows, g=g)[0]

    def body(rank: int) -> Any:
        layout = LAYOUTS["uneven"](3)
        return layout.positions(), sd.gated_linear_attention(
            **{n: layout.shard(x) for n, x in rows.items()}, g=layout.shard(g), layout=layout
        )[0]

    for at, o in on_ranks(3, body):
        torch.testing.assert_close(o, expected[:, at], rtol=0, atol=LIMIT * float(expected.abs().max()))


# --- interval attention ----------------------------------------

CU = torch.tensor([0, 9, 40, 41, 61])
MASKS: dict[str, Callable[[], IntervalMask]] = {
    "causal": IntervalMask.causal,
    "full": IntervalMask.full,
    "sliding": lambda: IntervalMask.sliding(9),
    "wide": lambda: IntervalMask.sliding(40),
    "sink": lambda: IntervalMask.sink(3, 9),
    "packed": lambda: IntervalMask.packed(CU, window=7, sink_tokens=2),
    "prefix": lambda: IntervalMask.prefix_lm(17, TOKENS),
    "lookahead": lambda: IntervalMask.lookahead(torch.randint(0, 12, (TOKENS,), generator=torch.Generator().manual_seed(3)), 10),
    "bits": lambda: IntervalMask.from_dense(torch.rand(2, 4, TOKENS, TOKENS, generator=torch.Generator().manual_seed(4)) < 0.05),
    "lifetimes": lambda: IntervalMask.sink(2, 30, TOKENS, TOKENS).with_key_lifetime(
        torch.arange(TOKENS, dtype=torch.int32).view(1, 1, -1) // 2, torch.full((1, 1, TOKENS), 50, dtype=torch.int32)
    ),
}  # fmt: skip


@SIZES
@pytest.mark.parametrize("kind", ["even", "uneven", "gaps", "zigzag"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("extras", [False, True])
def test_interval_attention(size: int, kind: str, mask: str, extras: bool) -> None:
    made = MASKS[mask]()
    rows = {n: normal(2, TOKENS, h, 8, seed=i) for i, (n, h) in enumerate((("q", 4), ("k", 2), ("v", 2)))}
    whole: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if extras:  # far from 0, so that a sink logit that is dropped or counted twice shows
        rows["key_bias"] = normal(2, TOKENS, seed=8)
        whole["sink_logits"] = torch.tensor([10.0, -10.0, 3.0, 0.0])
        options["softcap"] = 2.0
    compare(
        size,
        LAYOUTS[kind],
        rows,
        whole,
        lambda **x: subquad.interval_attention(**x, mask=made, **options),
        lambda **x: sd.interval_attention(**x, mask=made, **options),
    )


@pytest.mark.parametrize("kind", ["uneven", "zigzag"])
def test_rotations_per_interval(kind: str) -> None:
    shift = torch.randint(0, 9, (1, 1, 13, 3), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    mask = IntervalMask.pine(20, [13, 8, 10], 10, shift=shift)
    rope = RopeSpec(10000.0 ** -(torch.arange(4) / 4), 8)
    rows = {n: normal(1, TOKENS, h, 8, seed=i) for i, (n, h) in enumerate((("q", 4), ("k", 2), ("v", 2)))}
    compare(
        3,
        LAYOUTS[kind],
        rows,
        {},
        lambda **x: subquad.interval_attention(**x, mask=mask, q_shift=rope),
        lambda **x: sd.interval_attention(**x, mask=mask, q_shift=rope),
    )


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["even", "uneven", "gaps", "zigzag"])
def test_by_heads_has_the_bits_of_one_process(size: int, kind: str) -> None:
    mask = IntervalMask.sink(3, 9)
    rows = {n: normal(2, TOKENS, h, 8, seed=i) for i, (n, h) in enumerate((("q", 8), ("k", 4), ("v", 4)))}
    compare(
        size,
        LAYOUTS[kind],
        rows,
        {},
        lambda **x: subquad.interval_attention(**x, mask=mask),
        lambda **x: sd.interval_attention(**x, mask=mask, method="heads"),
        bits=True,
    )


def test_what_a_layout_keeps_of_inference_mode_serves_training() -> None:
    """An exchange is made by the first call that needs it."""
    mask, whole = IntervalMask.packed(torch.tensor(PACKED), window=9), normal(1, TOKENS, 2, 8, seed=1)

    def body(rank: int) -> None:
        layout = sd.SequenceLayout.contiguous(TOKENS, cu_seqlens=PACKED)
        x = layout.shard(whole).requires_grad_()

        def calls() -> list[torch.Tensor]:
            return [sd.halo(x, 3, layout=layout), sd.interval_attention(x, x, x, mask, layout=layout)]

        with torch.inference_mode():
            before = calls()
        after = calls()
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert torch.autograd.grad(sum(y.sum() for y in after), x)[0].any()

    on_ranks(2, body)
