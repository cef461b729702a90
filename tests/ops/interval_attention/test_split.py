"""Few rows over many keys on a CPU: the keys are cut into ranges, whose sums are merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import subquad
from subquad import IntervalMask, RopeSpec
from subquad.testing import Sampler, assert_same_bits, backend_params

RANGE = 1024  # keys of a range
MANY_HEADS = 64  # from so many on, ranges are no items of their own
LENGTHS = (RANGE - 1, RANGE, RANGE + 1, 3 * RANGE + 5)
LARGEST = torch.finfo(torch.float32).max
ATOL = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def tensors(
    batch: int, tq: int, tk: int, heads: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.Tensor]:
    """q, k and v; keys of 16, values of 24 elements."""
    sampler = Sampler(dtype, seed=seed)
    shapes = ((tq, heads[0], 16), (tk, heads[1], 16), (tk, heads[1], 24))
    return [sampler.normal(batch, *shape) for shape in shapes]


def oracle(qkv: list[torch.Tensor], mask: IntervalMask, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and log-sum-exp in float64."""
    options = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    out, lse = subquad.interval_attention(
        *(x.double() for x in qkv), mask, return_lse=True, backend="reference", **options
    )
    return out, lse


def assert_is_oracle(qkv: list[torch.Tensor], mask: IntervalMask, backend: str, **options: Any) -> None:
    out, lse = subquad.interval_attention(*qkv, mask, return_lse=True, backend=backend, **options)
    expected = oracle(qkv, mask, **options)
    limit = ATOL[out.dtype]
    torch.testing.assert_close(out.double(), expected[0], atol=limit, rtol=limit, msg=lambda m: f"{mask}: {m}")
    torch.testing.assert_close(lse.double(), expected[1], atol=1e-5, rtol=1e-5, msg=lambda m: f"{mask}: {m}")


def of_keys(visible: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[int, int], IntervalMask]:
    """All rows see the same keys, those whose places are `visible`."""
    return lambda tq, tk: IntervalMask.from_dense(visible(torch.arange(tk)).expand(tq, tk))


def packed(tq: int, tk: int) -> IntervalMask:
    """Two sequences; the first one's keys end behind the first range, where there are as many."""
    cu, cu_k = torch.tensor([0, tq // 2, tq]), torch.tensor([0, min(RANGE + 3, tk // 2), tk])
    return IntervalMask.packed(cu, cu_k)


def runs(tq: int, tk: int) -> IntervalMask:
    """Each row has its own runs of keys."""
    return IntervalMask.from_dense((torch.arange(tk) + 41 * torch.arange(tq)[:, None]) % 97 < 60)


def lifetimes(tq: int, tk: int) -> IntervalMask:
    """Keys of the second range die before the last rows, others come to life."""
    keys = torch.arange(tk)
    first, stop = keys % 3 == 1, torch.where(keys // RANGE == 1, tq - 2, tq)
    return IntervalMask.causal(tq, tk).with_key_lifetime(first.int()[None, None], stop.clamp(min=0).int()[None, None])


MASKS: dict[str, Callable[[int, int], IntervalMask]] = {
    "causal": lambda tq, tk: IntervalMask.causal(),
    "full": lambda tq, tk: IntervalMask.full(),
    "sinks and window": lambda tq, tk: IntervalMask.sink(4, RANGE + 7),
    "window that ends with the range": lambda tq, tk: IntervalMask.sliding(RANGE),
    "short window": lambda tq, tk: IntervalMask.sink(1, 6),
    "packed": packed,
    "runs": runs,
    "lifetimes": lifetimes,
    "first range hidden": of_keys(lambda j: j >= RANGE),
    "last range hidden": of_keys(lambda j: j < (j[-1] // RANGE) * RANGE),
    "only the second range": of_keys(lambda j: j // RANGE == 1),
    "two keys beside the border": of_keys(lambda j: (j == RANGE - 1) | (j == RANGE)),
    "one key before the border": of_keys(lambda j: j == RANGE - 1),
    "one key behind the border": of_keys(lambda j: j == RANGE),
    "nothing": of_keys(lambda j: j < 0),
}


def options_of(heads: int, tk: int) -> Iterator[dict[str, torch.Tensor]]:
    """Without and with sinks of -10, 0 and 10 by turns; with biases that hide some keys as well."""
    sinks = 10.0 * (torch.arange(heads) % 3 - 1)
    bias = torch.where(torch.arange(tk) % 11 == 5, -torch.inf, torch.linspace(-2, 2, tk))
    yield from ({}, {"sink_logits": sinks}, {"key_bias": bias, "sink_logits": sinks})


@backend_params("interval_attention", "native")
@pytest.mark.parametrize("tk", LENGTHS)
@pytest.mark.parametrize("name", MASKS)
def test_few_rows(name: str, tk: int, backend: str) -> None:
    for batch, tq, heads in ((2, 1, (2, 2)), (2, 3, (6, 2)), (1, 16, (8, 1))):
        mask = MASKS[name](tq, tk)
        for options in options_of(heads[0], tk):
            assert_is_oracle(tensors(batch, tq, tk, heads), mask, backend, **options)


@backend_params("interval_attention", "native")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sinks and window", "runs", "first range hidden", "nothing"])
def test_few_rows_of_16_bits(name: str, dtype: torch.dtype, backend: str) -> None:
    tk = LENGTHS[-1]
    for tq, heads in ((1, (2, 2)), (5, (3, 1)), (16, (8, 1))):
        for options in options_of(heads[0], tk):
            assert_is_oracle(tensors(1, tq, tk, heads, dtype), MASKS[name](tq, tk), backend, **options)


@backend_params("interval_attention", "native")
def test_queries_rotated_for_each_interval(backend: str) -> None:
    """Each interval of a row has its own query, in every range."""
    tq, tk = 5, LENGTHS[-1]
    mask = IntervalMask.from_dense((torch.arange(tk) + 100 * torch.arange(tq)[:, None]) % 900 < 700)
    assert mask.starts is not None
    mask = mask.with_shift(Sampler(seed=3).integers(-40, 40, *mask.starts.shape).int())
    rope = RopeSpec(1.0 / 100 ** (torch.arange(0, 16, 2) / 16), 16)
    assert_is_oracle(tensors(2, tq, tk, (6, 2)), mask, backend, q_shift=rope, sink_logits=torch.linspace(-2, 9, 6))


@backend_params("interval_attention", "native")
def test_keys_of_any_strides(backend: str) -> None:
    """A cache [B, H, T, D], and values with others beside them."""
    q, k, v = tensors(2, 2, LENGTHS[-1], (6, 2))
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    v = torch.full((*v.shape[:3], 60), torch.nan)[..., 7:31].copy_(v)
    assert_is_oracle([q, k, v], IntervalMask.causal(), backend)


@backend_params("interval_attention", "native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tq", [1, 4])
def test_the_sink_counts_once(tq: int, dtype: torch.dtype, backend: str) -> None:
    """Sinks near the log-sum-exp of their rows: dropping or doubling one, or one per range, changes the result by a fifth."""
    qkv, mask = tensors(1, tq, LENGTHS[-1], (4, 1), dtype), IntervalMask.sink(4, 2 * RANGE)
    bare, lse = oracle(qkv, mask)
    sinks = lse.mean((0, 1)).float() + torch.tensor([-0.5, 0.0, 0.4, 0.8])

    def sunk(copies: int) -> torch.Tensor:
        return bare / (1 + copies * (sinks.double() - lse).exp())[..., None]

    for wrong in (0, 2, 3, 4):
        assert (sunk(wrong) - sunk(1)).norm() > 0.2 * sunk(1).norm()
    out, found = subquad.interval_attention(*qkv, mask, sink_logits=sinks, return_lse=True, backend=backend)
    assert (out.double() - sunk(1)).norm() < (1e-5 if dtype is torch.float32 else 1e-2) * sunk(1).norm()
    torch.testing.assert_close(found.double(), torch.logaddexp(lse, sinks.double()), atol=1e-5, rtol=1e-5)


@backend_params("interval_attention", "native")
@pytest.mark.parametrize("sinks", [None, torch.tensor([30.0, -30.0, 0.0])])
def test_largest_score_and_log_of_the_sum(sinks: torch.Tensor | None, backend: str) -> None:
    """What the backward pass takes: as for rows that are not split, the sink among the scores; 0 and inf of an empty row."""
    tk = LENGTHS[-1]
    q, k, v = tensors(1, 2, tk, (3, 1))
    dense = torch.stack([torch.arange(tk) >= RANGE, torch.zeros(tk, dtype=torch.bool)])
    mask = IntervalMask.from_dense(dense)
    lowered = mask.lower(2, tk)
    _, lse, stats = torch.ops.subquad.interval_attention_fwd(
        q[:, :, :, None], k, v, *lowered, None, sinks, None, 0.25, 0.0, []
    )
    scores = torch.einsum("thd,sd->ths", q[0].double(), k[0, :, 0].double()) / 4
    scores = scores.masked_fill(~dense[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None].expand(2, 3, 1)], -1)
    top = scores.amax(-1)
    expected = torch.stack([top, scores.logsumexp(-1) - top], -1)
    if sinks is None:
        expected[1] = torch.tensor([0.0, torch.inf])
    torch.testing.assert_close(stats[0].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[0].double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)


@backend_params("interval_attention", "native")
def test_gradients_behind_a_split_forward(backend: str) -> None:
    qkv, mask = tensors(1, 3, LENGTHS[-1], (4, 2)), IntervalMask.sink(4, 2 * RANGE)
    leaves = [*qkv, torch.linspace(-1, 8, 4)]

    def gradients(inputs: list[torch.Tensor], backend: str) -> tuple[torch.Tensor, ...]:
        *args, sinks = (x.detach().requires_grad_() for x in inputs)
        both = subquad.interval_attention(*args, mask, sink_logits=sinks, return_lse=True, backend=backend)
        upstream = [Sampler(seed=i).normal(*x.shape).to(x.dtype) for i, x in enumerate(both)]
        return torch.autograd.grad(both, (*args, sinks), upstream)

    expected = gradients([x.double() for x in leaves], "reference")
    for actual, wide in zip(gradients(leaves, backend), expected, strict=True):
        torch.testing.assert_close(actual.double(), wide, atol=1e-5, rtol=1e-4)


@backend_params("interval_attention", "native")
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("heads", [(1, 1), (8, 1)])
def test_nan_stays_where_it_is_seen(heads: tuple[int, int], where: str, backend: str) -> None:
    """A NaN at either side of a border and at the ends reaches the rows that see it, and no other."""
    tq, tk = 3, LENGTHS[-1]
    dense = torch.stack([torch.arange(tk) < RANGE, torch.arange(tk) >= RANGE, torch.arange(tk) % (tk - 1) == 0])
    mask = IntervalMask.from_dense(dense)
    qkv = tensors(1, tq, tk, heads)
    clean = subquad.interval_attention(*qkv, mask, backend=backend)
    for at in (0, RANGE - 1, RANGE, 2 * RANGE, tk - 1):
        args = dict(zip("qkv", (x.clone() for x in qkv), strict=True))
        args[where][0, at] = torch.nan
        out, lse = subquad.interval_attention(**args, mask=mask, return_lse=True, backend=backend)
        assert torch.equal(out.isnan().all(-1)[0], dense[:, at, None].expand(tq, heads[0]))
        assert torch.equal(out.isnan().any(-1), out.isnan().all(-1))
        assert torch.equal(lse.isnan(), out.isnan().all(-1) & (where == "k"))
        torch.testing.assert_close(out[0, ~dense[:, at]], clean[0, ~dense[:, at]])


@backend_params("interval_attention", "native")
def test_nan_is_seen_behind_scores_of_minus_infinity(backend: str) -> None:
    """A range whose scores are all -inf has a sum of 0, but was seen: 0 times NaN is NaN, as where nothing is split."""
    q, k, v = tensors(1, 2, LENGTHS[-1], (1, 1))
    q.fill_(1e30), k[:, :RANGE].fill_(-1e30), k[:, RANGE:].fill_(1e-30)
    v[0, 5] = torch.nan
    out, lse = subquad.interval_attention(q, k, v, IntervalMask.full(), return_lse=True, backend=backend)
    assert bool(out.isnan().all()) and bool(lse.isfinite().all())
    out = subquad.interval_attention(q, k, v.nan_to_num(), IntervalMask.full(), backend=backend)
    torch.testing.assert_close(out, v[:, RANGE:].mean(1, keepdim=True).expand_as(out), atol=1e-5, rtol=1e-5)


FIRST, SECOND = (torch.arange(2 * RANGE + 9) // RANGE == i for i in range(2))
INFINITE = torch.full((2 * RANGE + 9,), -torch.inf)

# (bias, sinks of two heads)
EXTREMES: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]] = {
    "lowest in the first range": (torch.where(FIRST, -LARGEST, 0.0), None),
    "lowest in the second range": (torch.where(SECOND, -LARGEST, 0.0), None),
    "highest in the second range": (torch.where(SECOND, LARGEST, 0.0), None),
    "all lowest": (torch.where(FIRST, -LARGEST, -LARGEST), None),
    "lowest or infinite": (torch.where(FIRST, -torch.inf, -LARGEST), None),
    "hidden in the first range": (torch.where(FIRST, -torch.inf, 0.5), torch.tensor([2.0, -torch.inf])),
    "hidden": (INFINITE, None),
    "hidden, with sinks": (INFINITE, torch.tensor([LARGEST, -torch.inf])),
    "largest sinks": (None, torch.tensor([LARGEST, -LARGEST])),
    "sinks among lowest": (torch.where(FIRST, -LARGEST, -3e38), torch.tensor([-LARGEST, -3e38])),
}


@backend_params("interval_attention", "native")
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name: str, backend: str) -> None:
    """As the float32 reference, which works in natural units."""
    bias, sinks = EXTREMES[name]
    options: dict[str, Any] = {"key_bias": bias, "sink_logits": sinks, "return_lse": True}
    for tq in (1, 5):
        qkv = tensors(1, tq, 2 * RANGE + 9, (2, 1))
        results = (
            subquad.interval_attention(*qkv, IntervalMask.full(), backend=b, **options) for b in (backend, "reference")
        )
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


@backend_params("interval_attention", "native")
def test_nan_and_infinite_sinks_reach_their_head_only(backend: str) -> None:
    qkv = tensors(1, 2, LENGTHS[-1], (3, 1))
    for sink in (torch.nan, torch.inf):
        sinks = torch.tensor([0.0, sink, 0.0])
        out = subquad.interval_attention(*qkv, IntervalMask.causal(), sink_logits=sinks, backend=backend)
        assert bool(out[:, :, 1].isnan().all()) and bool(out[:, :, [0, 2]].isfinite().all())


def test_the_borders_are_where_the_kernels_have_them() -> None:
    source = (Path(__file__).parents[3] / "csrc/ops/interval_attention/cpu.isa.cpp").read_text()
    for name, value in (("kRangeKeys", RANGE), ("kManyHeads", MANY_HEADS)):
        assert f"constexpr int64_t {name} = {value};" in source


@backend_params("interval_attention", "native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tq", "heads"), [(1, (2, 2)), (3, (8, 1)), (16, (8, 1))])
def test_same_bits_for_any_number_of_threads(tq: int, heads: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    qkv, sinks = tensors(2, tq, LENGTHS[-1], heads, dtype), torch.linspace(-2, 9, heads[0])
    results = []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            for mask in (IntervalMask.causal(), IntervalMask.sink(4, 900)):
                results.append(
                    subquad.interval_attention(*qkv, mask, sink_logits=sinks, return_lse=True, backend=backend)
                )
    finally:
        torch.set_num_threads(before)
    for i, result in enumerate(results[2:]):
        for actual, expected in zip(result, results[i % 2], strict=True):
            assert_same_bits(actual, expected, f"call {i + 2}")


@backend_params("interval_attention", "native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tq", "heads"), [(1, (2, 2)), (3, (8, 2))])
def test_a_row_has_the_same_bits_alone(tq: int, heads: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    """Whether ranges are items of their own (few heads), or one item takes all ranges of a head (many)."""
    batch, tk = MANY_HEADS // 2 + 1, 2 * RANGE + 70
    qkv = tensors(batch, tq, tk, heads, dtype)
    sinks, bias = torch.linspace(-2, 9, heads[0]), Sampler(seed=4).normal(batch, tk)
    dense = Sampler(seed=5).integers(0, 400, batch, tq, tk) > 0
    dense[:, :, 2 * RANGE :] &= torch.arange(batch)[:, None, None] % 3 > 0

    def attend(s: slice) -> Any:
        mask = IntervalMask.from_dense(dense[s])
        return subquad.interval_attention(
            *(x[s] for x in qkv), mask, sink_logits=sinks, key_bias=bias[s], return_lse=True, backend=backend
        )

    whole = attend(slice(None))
    for rows in (slice(0, 1), slice(17, 19), slice(batch - 1, batch)):
        for actual, expected in zip(attend(rows), whole, strict=True):
            assert_same_bits(actual, expected[rows], f"rows {rows}")
