"""`superlinear_attention` against its definition: every nasty case, on every backend; gradients in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

import subquad
from subquad import SuperlinearConfig
from subquad.recipes import SuperlinearAux
from subquad.testing import backend_params
from subquad.testing.compare import assert_same_bits

from ..span_search.dense import README, RELEASED, exact
from .dense import attend, error, superlinear, with_backends

CLOSE = 2e-6


def drawn(batch: int, tokens: int, keys: int, heads: int, kv_heads: int, d: int, dv: int | None = None) -> Any:
    """q_search, q, k, v; scores of the search are exact in float32."""
    q_search, k = exact(batch, tokens, heads, d), exact(batch, keys, kv_heads, d)
    return (
        q_search,
        torch.randn(batch, tokens, heads, d),
        k,
        torch.randn(batch, keys, kv_heads, d if dv is None else dv),
    )


def compared(x: Any, config: SuperlinearConfig, backend: str, tolerance: float = CLOSE, **options: Any) -> Any:
    """Places equal, out and gate close; returns what was found."""
    given = dict(options)
    keep, positions = given.get("attention_mask"), given.get("cache_position")
    if positions is not None:
        positions = positions.expand(x[1].shape[:2])
    firsts = None
    if "cu_seqlens" in given:
        firsts = [a for a, b in pairwise(given["cu_seqlens"].tolist()) for _ in range(b - a)]
    expected = superlinear(*x, config, positions, keep, given.get("search_keys"), firsts)
    out, aux = subquad.superlinear_attention(*x, config=config, return_aux=True, backend=backend, **options)
    assert isinstance(aux, SuperlinearAux)
    for name in ("anchor", "start", "end"):
        assert torch.equal(getattr(aux.search, name).long(), getattr(expected, name)), name
    assert error(aux.gate, expected.gate) < tolerance
    assert error(out, expected.out) < tolerance
    assert_same_bits(subquad.superlinear_attention(*x, config=config, backend=backend, **options), out)
    return out, aux


CONFIGS = [
    SuperlinearConfig(),
    README,
    SuperlinearConfig(num_spans=1),
    SuperlinearConfig(num_spans=8, sw_index=1),
    replace(RELEASED, sw_index=1),
    SuperlinearConfig(sw_index=1, inv_search_power_int=3, backward_factor=3.0, span_power=0.67, forward_factor=0.5),
    SuperlinearConfig(sw_index=9),
    SuperlinearConfig(route_per="group", sw_index=2, search_scale=0.125),
    SuperlinearConfig(sm_scale=0.7),
    SuperlinearConfig(length_mode="ref_f32", sw_index=1),
]


@with_backends()
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_configurations(config: SuperlinearConfig, backend: str) -> None:
    compared(drawn(2, 45, 45, 4, 2, 8), config, backend)


@with_backends()
@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("config", [SuperlinearConfig(), README], ids=["no-window", "window"])
def test_short_rows(config: SuperlinearConfig, tokens: int, backend: str) -> None:
    x = drawn(2, tokens, tokens, 2, 1, 8)
    out, _ = compared(x, config, backend)
    torch.testing.assert_close(out[:, 0], x[3][:, 0].repeat_interleave(2, 1))  # the first query sees itself


@with_backends()
def test_a_window_over_everything_is_causal_attention(backend: str) -> None:
    x = drawn(1, 40, 40, 2, 2, 8)
    out, aux = compared(x, SuperlinearConfig(sw_index=6), backend)
    causal = torch.nn.functional.scaled_dot_product_attention(*(y.transpose(1, 2) for y in x[1:]), is_causal=True)
    torch.testing.assert_close(out, causal.transpose(1, 2), atol=CLOSE, rtol=CLOSE)
    assert (aux.search.anchor == -1).all() and (aux.gate == 1 / 3).all()


@with_backends()
@pytest.mark.parametrize(
    "config",
    [
        SuperlinearConfig(sw_index=46340),  # a window beyond 2^31
        SuperlinearConfig(sw_index=65535),  # of 2^32 - 1
        SuperlinearConfig(sw_index=2, search_power=0.01, inv_search_power_int=None),  # of 3^100
        SuperlinearConfig(sw_index=1, backward_factor=1e10),
        SuperlinearConfig(sw_index=1, forward_factor=3e8),  # a sum with the anchor beyond 2^31
        SuperlinearConfig(backward_factor=1e30, forward_factor=1e30, length_mode="ref_f32"),
    ],
    ids=range(6),
)
def test_sizes_beyond_32_bits(config: SuperlinearConfig, backend: str) -> None:
    compared(drawn(1, 50, 50, 2, 1, 8), config, backend)


@with_backends()
def test_anchors_beside_the_window(backend: str) -> None:
    """Spans that reach ahead are cut off: no key counts twice, and the slots' log-sum-exps say so."""
    config = SuperlinearConfig(sw_index=2, forward_factor=4.0)
    x = drawn(1, 50, 50, 2, 1, 8)
    _, aux = compared(x, config, backend)
    at, j = torch.arange(50)[:, None, None, None], torch.arange(50)
    start, end = aux.search.start[..., None], aux.search.end[..., None]
    near, span = (j <= at) & (j > at - config.window_len()), (j >= start) & (j <= end)
    assert not (near & span).any() and (end[..., 0] == at[..., 0] - config.window_len()).any()
    _, lse = attend(x[1], x[2], x[3], near | span, None)
    torch.testing.assert_close(aux.lse.double(), lse, atol=CLOSE, rtol=CLOSE)


@with_backends()
@pytest.mark.parametrize("config", [SuperlinearConfig(), README, CONFIGS[7]], ids=["no-window", "window", "group"])
def test_padding_and_holes(config: SuperlinearConfig, backend: str) -> None:
    """Left padding of its own in every row, holes, a row of padding alone; padding is NaN and 0 comes out of it."""
    x = drawn(4, 40, 40, 4, 2, 8)
    keep = (torch.arange(40) >= torch.tensor([[0], [13], [5], [0]])) & (torch.rand(4, 40) > 0.2)
    keep[2, :31], keep[3] = False, False
    out, aux = compared(x, config, backend, attention_mask=keep)
    empty = aux.lse == -torch.inf
    assert (out[3] == 0).all() and empty[3].all() and (out[2, :31] == 0).all()
    dirty = [*x[:2], *(y.masked_fill(~keep[:, :, None, None], torch.nan) for y in x[2:])]
    wider = torch.nn.functional.pad(keep, (0, 7), value=True)
    again = subquad.superlinear_attention(*dirty, config=config, attention_mask=wider, backend=backend)
    assert torch.equal(again, out)


@with_backends()
def test_gates_at_their_extremes(backend: str) -> None:
    """One slot alone is one-hot; scores of 1e4 saturate; +inf is chosen and finite, NaN never."""
    x = drawn(1, 40, 40, 1, 1, 8)
    _, aux = compared(x, SuperlinearConfig(sw_index=2), backend)
    single = (aux.search.anchor >= 0).sum(-1) == 1
    assert single.any() and (aux.gate[single] == torch.tensor([1.0, 0.0, 0.0])).all()
    _, aux = compared((x[0] * 4e3, *x[1:]), SuperlinearConfig(), backend, 1e-4)
    assert aux.search.score.max() > 1e4
    k = x[2].clone()
    far = 40 - subquad.stripe_offsets(40, SuperlinearConfig())
    k[0, far[3], 0], k[0, far[4], 0, 2] = torch.inf, torch.nan
    q_search = x[0].abs() + 1.0
    _, aux = subquad.superlinear_attention(
        q_search, *x[1:2], x[2], x[3], search_keys=k, return_aux=True, backend=backend
    )
    assert aux.search.anchor[0, -1, 0, 0] == far[3] and far[4] not in aux.search.anchor[0, -1, 0]
    assert aux.gate[0, -1, 0].tolist() == [1.0, 0.0, 0.0]


@with_backends()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_and_large_scores(dtype: torch.dtype, backend: str) -> None:
    x = [y.to(dtype) for y in drawn(1, 40, 40, 2, 1, 8)]
    x[0] = x[0] * 256
    expected = superlinear(*x, README)
    out = subquad.superlinear_attention(*x, config=README, backend=backend)
    assert out.dtype is dtype and error(out, expected.out) < (4e-3 if dtype is torch.float16 else 3e-2)


@with_backends()
def test_positions_in_any_order(backend: str) -> None:
    x = drawn(2, 6, 90, 4, 2, 8)
    positions = torch.tensor([[9, 3, 3, 70, 0, 41], [0, 1, 88, 88, 2, 60]])
    out, _ = compared(x, README, backend, cache_position=positions)
    compared(x, README, backend, cache_position=positions[0])
    dirty = [y.clone() for y in x[2:]]
    for y in dirty:
        y[0, 71:], y[1, 89:] = torch.nan, torch.nan
    assert torch.equal(
        subquad.superlinear_attention(*x[:2], *dirty, config=README, cache_position=positions, backend=backend), out
    )


@with_backends()
@pytest.mark.parametrize("size", [1, 7, 64])
def test_chunks_are_the_whole(size: int, backend: str) -> None:
    """A prompt in chunks, as keys that grow and as a static cache with NaN behind the chunk."""
    tokens = 30 if size == 1 else 130
    x = drawn(1, tokens, tokens, 2, 1, 8)
    whole = subquad.superlinear_attention(*x, config=README, backend=backend)
    for begin in range(0, tokens, size):
        end = min(begin + size, tokens)
        chunk, at = [y[:, begin:end] for y in x[:2]], torch.arange(begin, end)
        grown = subquad.superlinear_attention(*chunk, *(y[:, :end] for y in x[2:]), config=README, backend=backend)
        assert error(grown, whole[:, begin:end]) < CLOSE
        static = [torch.cat([y[:, :end], torch.full_like(y[:, end:], torch.nan)], 1) for y in x[2:]]
        found = subquad.superlinear_attention(*chunk, *static, config=README, cache_position=at, backend=backend)
        assert error(found, whole[:, begin:end]) < CLOSE


@with_backends()
def test_packed_rows(backend: str) -> None:
    """Sequences of 0 and 1 tokens; each as it is by itself."""
    bounds = [0, 0, 1, 1, 2, 20, 60]
    x = drawn(1, 60, 60, 2, 1, 8)
    out, _ = compared(x, README, backend, cu_seqlens=torch.tensor(bounds))
    for begin, end in pairwise(bounds):
        alone = subquad.superlinear_attention(*(y[:, begin:end] for y in x), config=README, backend=backend)
        assert error(out[:, begin:end], alone) < CLOSE


SHAPES = [(1, 16, 1), (3, 40, 2), (5, 80, 5), (16, 96, 8), (2, 256, 4), (1, 17, 3)]


@with_backends()
@pytest.mark.parametrize(("group", "d", "num_spans"), SHAPES)
def test_groups_widths_and_counts(group: int, d: int, num_spans: int, backend: str) -> None:
    config = SuperlinearConfig(sw_index=1, num_spans=num_spans, forward_factor=1.0)
    tolerance = CLOSE * max(1.0, d / 128)  # more terms of a score, more roundings
    compared(drawn(1, 40, 40, group * 2, 2, d, max(1, d - 5)), config, backend, tolerance)


@with_backends()
def test_separate_search_keys(backend: str) -> None:
    x = drawn(1, 30, 30, 2, 1, 8)
    q_search, keys = exact(1, 30, 2, 12), exact(1, 30, 1, 12)
    compared((q_search, *x[1:]), README, backend, search_keys=keys)


@with_backends()
@pytest.mark.filterwarnings("ignore:subquad")
def test_fractional_factors_far_out(backend: str) -> None:
    """Spans that are longer than factor * tokens ** power by one: their last key counts."""
    config = SuperlinearConfig(backward_factor=0.3, forward_factor=0.3)
    compared(drawn(1, 2, 10_795, 1, 1, 4), config, backend)


@with_backends("native", "reference")
def test_the_released_configuration(backend: str) -> None:
    """A few queries on either side of the end of its window, and far out."""
    x = drawn(1, 5, 6_000, 2, 1, 16)
    at = torch.tensor([2_030, 2_031, 2_032, 4_100, 5_999])
    compared(x, RELEASED, backend, cache_position=at)


@backend_params("span_attention", "native", "triton", "simt")
def test_offsets_beyond_32_bits(backend: str) -> None:
    """Keys and values further than 2**31 elements from the first; the memory between them does not exist."""
    q, k, v = torch.randn(1, 3, 2, 8), torch.randn(1, 20, 1, 8), torch.randn(1, 20, 1, 8)
    start = torch.randint(0, 15, (1, 3, 2, 2))
    expected, _ = subquad.span_attention(q, k, v, start, start + 5, joint=True, backend=backend)
    torch.use_deterministic_algorithms(False)  # poisoning would touch it
    stride = 2**31 // 19 + 16
    for name in ("k", "v"):
        far = torch.empty(19 * stride + 8).as_strided((1, 20, 1, 8), (8, stride, 8, 1))
        far.copy_(k if name == "k" else v)
        given = (far, v) if name == "k" else (k, far)
        assert_same_bits(subquad.span_attention(q, *given, start, start + 5, joint=True, backend=backend)[0], expected)


# --- gradients ----------------------------------------


def doubles(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("config", [SuperlinearConfig(), CONFIGS[3], CONFIGS[7]], ids=["no-window", "window", "group"])
def test_gradcheck(config: SuperlinearConfig, separate: bool) -> None:
    x = doubles((2, 7, 2, 2), (2, 7, 2, 2), (2, 7, 1, 2), (2, 7, 1, 1), *([(2, 7, 1, 2)] if separate else []))
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[0, :3] = keep[1, 3] = False

    def out(q_search: Any, q: Any, k: Any, v: Any, keys: Any = None) -> torch.Tensor:
        return subquad.superlinear_attention(
            q_search, q, k, v, search_keys=keys, attention_mask=keep, config=config, backend="reference"
        )  # type: ignore[return-value]

    assert torch.autograd.gradcheck(out, x)


@with_backends()
def test_only_the_search_learns(backend: str) -> None:
    """A frozen layer with a new router: q_search alone requires a gradient, and gets that of the definition."""
    config = SuperlinearConfig(sw_index=1, search_scale=0.3)
    x = drawn(1, 30, 30, 2, 1, 8)
    q_search = x[0].clone().requires_grad_()
    weight = torch.randn(1, 30, 2, 8)
    (subquad.superlinear_attention(q_search, *x[1:], config=config, backend=backend) * weight).sum().backward()
    exact = x[0].double().requires_grad_()
    given = [y.double() for y in x[1:]]
    (subquad.superlinear_attention(exact, *given, config=config, backend="reference") * weight).sum().backward()
    assert q_search.grad is not None and exact.grad is not None and exact.grad.abs().max() > 0.01
    assert error(q_search.grad, exact.grad) < 1e-5
    assert (q_search.grad[:, :8] == 0).all()  # no choice among slots: nothing to learn


@with_backends()
def test_gradients_of_rows_that_see_nothing(backend: str) -> None:
    x = [y.requires_grad_() for y in drawn(2, 20, 20, 2, 1, 8)]
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[0, :13] = keep[1] = False
    out = subquad.superlinear_attention(*x, config=CONFIGS[3], attention_mask=keep, backend=backend)
    out.sum().backward()
    for y in x:
        assert (
            y.grad is not None and not y.grad.isnan().any() and (y.grad[1] == 0).all() and (y.grad[0, :13] == 0).all()
        )


@with_backends()
def test_runs_are_alike(backend: str) -> None:
    x = [y.requires_grad_() for y in drawn(1, 60, 60, 4, 2, 8)]
    runs = []
    for _ in range(2):
        out = subquad.superlinear_attention(*x, config=README, backend=backend)
        runs.append((out.detach(), *torch.autograd.grad(out.square().sum(), x)))
    for a, b in zip(*runs, strict=True):
        assert_same_bits(a, b)
