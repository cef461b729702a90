"""Functions called with DTensors: results, gradients, placements; nothing is sent where whole heads or rows are on a rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import subquad
import subquad.distributed
from subquad import IntervalMask

from .threads import on_ranks

SIZE = 3
B, T, H, K, V = SIZE, 7, 2 * SIZE, 8, 4
WHOLE, ROWS, TOKENS, HEADS, STATES = Replicate(), Shard(0), Shard(1), Shard(2), Shard(1)


def linear(q: Any, k: Any, v: Any, g: Any = None, s0: Any = None, z0: Any = None) -> Any:
    if s0 is None:
        return subquad.gated_linear_attention(q, k, v, g)[0]
    o, state = subquad.gated_linear_attention(
        q, k, v, g, initial_state=(s0, z0), output_final_state=True, normalize=True
    )
    assert isinstance(state, tuple)
    return o, *state


def attention(q: Any, k: Any, v: Any, sinks: Any = None) -> Any:
    return subquad.interval_attention(q, k, v, IntervalMask.sink(2, 4), sink_logits=sinks)


def biased(q: Any, k: Any, v: Any, bias: Any, slopes: Any) -> Any:
    return subquad.interval_attention(
        q, k, v, IntervalMask.causal(), key_bias=bias, alibi_slopes=slopes.detach(), softcap=3.0, return_lse=True
    )


def convolved(x: Any, weight: Any, bias: Any, state: Any, residual: Any) -> Any:
    options: dict[str, Any] = {"channel_groups": 2, "head_dim": 2} if len(weight) > x.shape[2] else {}
    return subquad.causal_conv1d(
        x, weight, bias, initial_state=state, residual=residual, activation="silu", output_final_state=True, **options
    )


def mapped(x: Any, weight: Any, fm_weight: Any, bias: Any) -> Any:
    return subquad.conv_feature_map(x, weight, fm_weight, bias)[0]


def shapes(q: int, k: int, v: int) -> list[tuple[int, ...]]:
    return [(B, T, q, K), (B, T, k, K), (B, T, v, V)]


LINEAR = [*shapes(2 * H, H, H), (B, T, H, K), (B, H, K, V), (B, H, K)]
CONVOLUTION = [(B, T, H), (2 * H, 4), (2 * H,), (B, H, 3), (B, T, 2 * H)]
CONV_MAP = [(B, T, H, K), (H * K, 4), (H, K, 3)]
Case = tuple[Callable[..., Any], list[tuple[int, ...]], list[Any], Any]
CASES: dict[str, Case] = {
    "linear, heads": (linear, LINEAR, [HEADS] * 4 + [STATES] * 2, HEADS),
    "linear, rows": (linear, LINEAR, [ROWS] * 6, ROWS),
    "linear, plain, one key head": (linear, shapes(2 * H, 1, H), [HEADS, WHOLE, HEADS], HEADS),
    "linear, gates of heads": (linear, [*shapes(H, H, H), (B, T, H)], [HEADS] * 4, HEADS),
    "attention, heads": (attention, [*shapes(2 * H, H, H), (2 * H,)], [HEADS] * 3 + [Shard(0)], HEADS),
    "attention, rows": (attention, [*shapes(2 * H, H, H), (2 * H,)], [ROWS] * 3 + [WHOLE], ROWS),
    "attention, one key head": (attention, shapes(H, 1, 1), [HEADS, WHOLE, WHOLE], HEADS),
    "attention, bias": (biased, [*shapes(H, H, H), (B, T), (H,)], [ROWS] * 4 + [WHOLE], ROWS),
    "attention, bias of heads": (
        biased, [*shapes(H, H, H), (1, H, T), (1, H)], [HEADS] * 3 + [STATES] * 2, HEADS
    ),
    "feature map, heads": (subquad.feature_map, [(B, T, H, K), (H, K, 3)], [HEADS, Shard(0)], HEADS),
    "feature map, rows": (subquad.feature_map, [(B, T, H, K), (H, K, 3)], [ROWS, WHOLE], ROWS),
    "convolution, rows": (convolved, CONVOLUTION, [ROWS, WHOLE, WHOLE, ROWS, ROWS], ROWS),
    "convolution, heads": (convolved, CONVOLUTION, [HEADS, Shard(0), Shard(0), STATES, HEADS], HEADS),
    "conv and map, rows": (mapped, [*CONV_MAP, (H * K,)], [ROWS, WHOLE, WHOLE, WHOLE], ROWS),
    "conv and map, heads": (mapped, [*CONV_MAP, (H * K,)], [HEADS, Shard(0), Shard(0), Shard(0)], HEADS),
    "feature map, tokens": (subquad.feature_map, [(B, SIZE, H, K)], [TOKENS], TOKENS),
}  # fmt: skip


def drawn(sizes: list[tuple[int, ...]], fn: Callable[..., Any]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(size, generator=generator) for size in sizes]
    if fn is linear:  # weights of one sign, decays
        made = [x if i == 2 else x.abs() for i, x in enumerate(made)]
        made[3:4] = [-0.1 * x for x in made[3:4]]
    return made


def whole(x: torch.Tensor) -> torch.Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


def compare(fn: Callable[..., Any], sizes: list[tuple[int, ...]], placements: list[Any], out: Any) -> None:
    plain = [x.requires_grad_() for x in drawn(sizes, fn)]
    expected = fn(*plain)
    first = expected[0] if isinstance(expected, tuple) else expected
    weight = torch.linspace(-1, 1, first.numel()).view_as(first)
    grads = torch.autograd.grad((first * weight).sum(), plain, allow_unused=True)

    def body(rank: int) -> None:
        mesh = init_device_mesh("cpu", (SIZE,), mesh_dim_names=("tp",))
        pairs = zip(plain, placements, strict=True)
        given = [distribute_tensor(x.detach(), mesh, [p]).requires_grad_() for x, p in pairs]
        with CommDebugMode() as sent:
            found = fn(*given)
        results = found if isinstance(found, tuple) else (found,)
        if out is not None:
            assert results[0].placements == (out,) and sent.get_total_counts() == 0
        for a, b in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
            close(whole(a), b.detach())
        own = distribute_tensor(weight, mesh, results[0].placements)
        for a, b in zip(torch.autograd.grad((results[0] * own).sum(), given, allow_unused=True), grads, strict=True):
            assert (a is None) is (b is None)
            if b is not None:
                close(whole(a), b)

    on_ranks(SIZE, body)


@pytest.mark.parametrize("name", CASES)
def test_dtensors(name: str) -> None:
    """Results without a gradient are among them: the state and the log-sum-exp."""
    fn, sizes, placements, out = CASES[name]
    compare(fn, sizes, placements, out)


NO_FIT: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], list[Any]]] = {
    "linear": (linear, shapes(2 * H, 2, 2), [HEADS, WHOLE, WHOLE]),
    "attention": (attention, shapes(2 * H, 2, 2), [HEADS, WHOLE, WHOLE]),
    "convolution": (
        convolved, [(B, T, H), (H, 4), (H,), (B, H, 3), (B, T, H)], [HEADS, Shard(0), Shard(0), STATES, HEADS]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_FIT)
def test_what_does_not_fit(name: str) -> None:
    """Two key heads on three ranks: queries are brought together, never paired with others' keys. And channels in no groups."""
    compare(*NO_FIT[name], None)


def test_a_mesh_of_two_dimensions() -> None:
    """Rows over one, heads over the other."""
    sizes = [(4, T, 8, K), (4, T, 4, K), (4, T, 4, V)]
    plain = drawn(sizes, linear)
    expected = linear(*plain)

    def body(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        given = [distribute_tensor(x, mesh, [ROWS, HEADS]) for x in plain]
        with CommDebugMode() as sent:
            found = linear(*given)
        assert found.placements == (ROWS, HEADS) and sent.get_total_counts() == 0
        close(whole(found), expected)

    on_ranks(4, body)
