"""Interval attention: the generic tests, and what is true of it alone."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import subquad
from subquad import IntervalMask
from subquad.testing import Sample, Sampler, Task, assert_same_bits, backend_params, generic_tests, strategies
from subquad.testing.case import Case
from subquad.testing.specs.interval_attention import SPEC, SPECS, draw, random_mask

EXAMPLES = {"native": 40, "simt": 12, "triton": 6, "reference": 10}
KERNELS = ("native", "simt", "triton")


@generic_tests(*SPECS)
def test_generic(task: Task, device: str) -> None:
    task.run(device)


def tensors(*shape: int, heads: tuple[int, int] = (2, 2), seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """q, k, v of shape [B, T, H, D]; shape is (B, Tq, Tk, D)."""
    sampler = Sampler(dtype, seed=seed)
    b, tq, tk, d = shape
    return (
        sampler.normal(b, tq, heads[0], d),
        sampler.normal(b, tk, heads[1], d),
        sampler.normal(b, tk, heads[1], d),
    )


@st.composite
def masks(draw_: st.DrawFn, sampler: Sampler, tq: int, tk: int, batch: int, heads: int) -> IntervalMask:
    kind = draw_(st.sampled_from(("causal", "full", "sliding", "sink", "random", "lifetime")))
    if kind == "random":
        return random_mask(sampler, draw_(st.sampled_from((1, batch))), draw_(st.sampled_from((1, heads))), tq, tk)
    window = draw_(st.integers(0, tk + 3))
    mask = {
        "causal": IntervalMask.causal(tq, tk),
        "full": IntervalMask.full(tq, tk),
        "sliding": IntervalMask.sliding(window, tq, tk),
        "sink": IntervalMask.sink(draw_(st.integers(0, tk)), window, tq, tk),
        "lifetime": IntervalMask.causal(tq, tk),
    }[kind]
    if kind == "lifetime":
        first = sampler.integers(0, tq + 1, 1, 1, tk).int()
        mask = mask.with_key_lifetime(first, first + sampler.integers(0, tq + 1, 1, 1, tk).int())
    return mask


@st.composite
def problems(draw_: st.DrawFn, small: bool) -> Sample:
    """Everything free: lengths, heads, head dimensions, mask, bias, sinks, dtype."""
    sampler = Sampler(draw_(strategies.dtypes(SPEC)), seed=draw_(strategies.seeds()))
    top = 40 if small else 200
    tq, tk = draw_(strategies.extents(1, top)), draw_(strategies.extents(1, top))
    batch, kv_heads, group = draw_(st.integers(1, 2)), draw_(st.integers(1, 2)), draw_(st.sampled_from((1, 2, 3, 7)))
    heads = kv_heads * group
    d, dv = draw_(strategies.extents(1, 40 if small else 130)), draw_(strategies.extents(1, 40 if small else 130))
    mask = draw_(masks(sampler, tq, tk, batch, heads))
    bias = draw_(st.sampled_from((None, (tk,), (batch, tk), (1, heads, tk))))
    slopes = draw_(st.sampled_from((None, None, (heads,), (batch, heads))))
    return draw(
        sampler, "random", mask, batch, tq, tk, heads, kv_heads, d, dv,
        bias=bias, sinks=draw_(st.sampled_from((None, 0.0, 10.0))), slopes=slopes,
        softcap=draw_(st.sampled_from((0.0, 0.0, 0.5, 20.0))), return_lse=draw_(st.booleans()),
    )  # fmt: skip


# Largest error of an element, in units of the largest element or of 1: gradients may cancel to nothing (one visible key).
ATOL = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@backend_params("interval_attention")
def test_random_problems(backend: str) -> None:
    @settings(max_examples=EXAMPLES[backend])
    @given(problems(backend in ("triton", "simt")))
    def run(sample: Sample) -> None:
        case = Case(SPEC, backend, sample["q"].dtype)
        oracle_case = Case(SPEC, "reference", torch.float64)
        results = [*case.call(sample), *case.gradients(sample).values()]
        upstream = case.upstream(tuple(results[: len(case.call(sample))]))
        leaves = oracle_case.leaves(case.wide(sample))
        outputs = case.reference(sample, **leaves)
        reached = [(y, g.double()) for y, g in zip(outputs, upstream, strict=True) if y.requires_grad]
        grads = torch.autograd.grad([y for y, _ in reached], list(leaves.values()), [g for _, g in reached])
        for actual, expected in zip(results, [*outputs, *grads], strict=True):
            visible = torch.isfinite(expected)
            assert torch.equal(torch.isfinite(actual), visible)
            wide, oracle = actual.detach().double()[visible], expected.detach()[visible]
            if wide.numel():
                limit = ATOL[sample["q"].dtype] * max(1.0, float(oracle.abs().max()))
                assert float((wide - oracle).abs().max()) <= limit, sample.kwargs["mask"]

    run()


@backend_params("interval_attention")
@pytest.mark.parametrize("causal", [True, False])
def test_equals_scaled_dot_product_attention(backend: str, causal: bool) -> None:
    q, k, v = tensors(2, 45, 45, 24, heads=(4, 2))
    mask = IntervalMask.causal() if causal else IntervalMask.full()
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(subquad.interval_attention(q, k, v, mask, backend=backend), expected)


@backend_params("interval_attention")
def test_sink_logits_as_a_column(backend: str) -> None:
    """gpt-oss: the sink is one more column of the scores, dropped after the softmax. Each sink is near its row's lse, so that
    dropping or doubling it changes the result by more than a fifth."""
    q, k, v = tensors(1, 33, 50, 16, heads=(4, 2))
    mask = IntervalMask.sliding(20)
    _, bare = subquad.interval_attention(q, k, v, mask, return_lse=True, backend="reference")
    sinks = bare.mean((0, 1)) + torch.tensor([-0.5, 0.0, 0.4, 0.8])
    assert ((sinks - bare).abs() < 2).float().mean() > 0.95
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) / 4
    scores = scores.masked_fill(~mask.to_dense(33, 50), -torch.inf)

    def column(copies: int) -> torch.Tensor:
        extra = sinks[None, :, None, None].expand(1, 4, 33, copies)
        p = torch.cat([scores, extra], -1).softmax(-1)[..., :50]
        return torch.einsum("bhts,bshd->bthd", p, v.repeat_interleave(2, 2))

    out = subquad.interval_attention(q, k, v, mask, sink_logits=sinks, backend=backend)
    torch.testing.assert_close(out, column(1), atol=1e-5, rtol=1e-5)
    for wrong in (0, 2):
        assert (column(wrong) - column(1)).norm() > 0.2 * column(1).norm()


@backend_params("interval_attention")
def test_softcap_as_gemma_has_it(backend: str) -> None:
    """Scores up to 40 under a cap of 5, with gradients."""
    q, k, v = (x.requires_grad_() for x in tensors(2, 33, 50, 16, heads=(4, 2)))
    mask = IntervalMask.causal()
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * 2.5
    assert scores.abs().max() > 30
    scores = (5 * torch.tanh(scores / 5)).masked_fill(~mask.to_dense(33, 50), -torch.inf)
    want = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v.repeat_interleave(2, 2))
    out = subquad.interval_attention(q, k, v, mask, scale=2.5, softcap=5.0, backend=backend)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    weight = Sampler(seed=9).normal(*out.shape)
    found, wanted = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, want))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


@backend_params("interval_attention")
@pytest.mark.parametrize("causal", [True, False])
def test_alibi_is_a_bias_by_distance(backend: str, causal: bool) -> None:
    """The last row stands at the last key; causal ALiBi is a bias of the keys, up to a constant of each row."""
    q, k, v = tensors(2, 20, 45, 24, heads=(4, 2))
    mask = IntervalMask.causal() if causal else IntervalMask.full()
    slopes = torch.tensor([0.5, 0.1, 0.0, -0.2])
    distance = (torch.arange(20)[:, None] + 25 - torch.arange(45)).abs()
    bias = (-slopes[:, None, None] * distance).masked_fill(~mask.to_dense(20, 45)[0], -torch.inf)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias.expand(2, -1, -1, -1), enable_gqa=True
    ).transpose(1, 2)
    for given_slopes in (slopes, slopes.expand(2, 4)):
        out = subquad.interval_attention(q, k, v, mask, alibi_slopes=given_slopes, backend=backend)
        torch.testing.assert_close(out, expected)
    if causal:
        by_key = slopes[None, :, None] * torch.arange(45.0)
        torch.testing.assert_close(
            subquad.interval_attention(q, k, v, mask, key_bias=by_key, backend=backend), expected
        )


def three_layers(x: torch.Tensor, mask: IntervalMask, backend: str) -> torch.Tensor:
    """A stack in which what a token sees spreads from layer to layer."""
    for layer in range(3):
        weights = Sampler(seed=layer).normal(3, 16, 16, std=0.3)
        q, k, v = ((x @ w).unflatten(-1, (2, 8)) for w in weights)
        x = x + subquad.interval_attention(q, k, v, mask, backend=backend).flatten(-2)
    return x


CLOSED = {
    "prompt of an image question": (IntervalMask.mma(40, [(5, 15)], [(15, 22)]), 0, 22),
    "condition": (IntervalMask.easycontrol(20, [10, 10]), 20, 30),
    "frames": (IntervalMask.frame_sink(10, 4, 1, 4), 0, 24),
    "document": (IntervalMask.packed(torch.tensor([0, 12, 12, 30, 40])), 12, 30),
    "prefix": (IntervalMask.prefix_lm(9, 40), 0, 9),
}


@backend_params("interval_attention", "native", "reference")
@pytest.mark.parametrize("name", CLOSED)
def test_closed_sets_are_closed(name: str, backend: str) -> None:
    """What is outside a closed set cannot reach it, through three layers, to the bit."""
    mask, low, high = CLOSED[name]
    assert mask.is_closed(low, high)
    x = Sampler(seed=9).normal(1, 40, 16)
    other = torch.where((torch.arange(40) >= low)[:, None] & (torch.arange(40) < high)[:, None], x, x + 1.0)
    before, after = three_layers(x, mask, backend), three_layers(other, mask, backend)
    assert_same_bits(after[:, low:high], before[:, low:high], name)
    assert not torch.equal(after, before)


@backend_params("interval_attention", "native", "reference")
def test_an_open_set_is_reached(backend: str) -> None:
    """The image alone is not closed: it sees its question."""
    mask = IntervalMask.mma(40, [(5, 15)], [(15, 22)])
    assert not mask.is_closed(0, 15)
    x = Sampler(seed=9).normal(1, 40, 16)
    other = x.clone()
    other[:, 15:] += 1.0
    assert not torch.equal(three_layers(other, mask, backend)[:, :15], three_layers(x, mask, backend)[:, :15])


@backend_params("interval_attention")
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("where", ["k", "v", "q"])
def test_nan_stays_where_it_is_seen(where: str, softcap: float, backend: str) -> None:
    """A NaN, at every place in turn of a tile, reaches the rows that see it and no other, gradients included."""
    t = 37
    mask = IntervalMask.sink(2, 7)
    dense = mask.to_dense(t, t)[0, 0]
    for at in (0, 3, 18, t - 1):
        args = dict(zip("qkv", (x.clone() for x in tensors(1, t, t, 8)), strict=True))
        args[where][0, at] = float("nan")
        leaves = {n: x.requires_grad_() for n, x in args.items()}
        out = subquad.interval_attention(**leaves, mask=mask, softcap=softcap, backend=backend)
        reached = dense[:, at] if where != "q" else torch.arange(t) == at
        assert torch.equal(out.isnan().any(-1).any(-1)[0], reached)
        if backend == "reference":  # dense products: its gradients are not what this is about
            continue
        finite = torch.where(reached[None, :, None, None], 0.0, 1.0)
        grads = torch.autograd.grad(out, list(leaves.values()), finite.expand_as(out).contiguous())
        seen = dense[reached].any(0)  # keys that a poisoned row sees
        assert not grads[0][0, ~reached].isnan().any(), "dq of rows that do not see the NaN"
        for grad in grads[1:]:
            assert not grad[0, ~seen].isnan().any(), "gradients of keys that no poisoned row sees"


@backend_params("interval_attention")
def test_causality_by_nan(backend: str) -> None:
    """With NaN in all keys and values from a position on, earlier rows keep their bits."""
    q, k, v = tensors(1, 41, 41, 8)
    clean = subquad.interval_attention(q, k, v, IntervalMask.causal(), backend=backend)
    for at in (1, 16, 40):
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[:, at:], bad_v[:, at:] = float("nan"), float("inf")
        out = subquad.interval_attention(q, bad_k, bad_v, IntervalMask.causal(), backend=backend)
        torch.testing.assert_close(out[:, :at], clean[:, :at])
        assert not out[:, at:].isfinite().any()


@backend_params("interval_attention")
def test_rows_that_see_nothing(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(1, 6, 20, 8))
    mask = IntervalMask.sink(0, 0)
    out, lse = subquad.interval_attention(q, k, v, mask, return_lse=True, backend=backend)
    assert not out.count_nonzero() and bool((lse == -torch.inf).all())
    for grad in torch.autograd.grad(out.sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum(), (q, k, v)):
        assert not grad.count_nonzero() and grad.isfinite().all()
    sinks = torch.tensor([0.5, -3.0], requires_grad=True)
    out, lse = subquad.interval_attention(q, k, v, mask, sink_logits=sinks, return_lse=True, backend=backend)
    assert not out.count_nonzero()
    torch.testing.assert_close(lse, sinks.expand(1, 6, 2), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), sinks)[0], torch.full((2,), 6.0))


@backend_params("interval_attention")
def test_garbage_indices_stay_inside(backend: str) -> None:
    """Index tensors changed behind the mask's back are clamped, not followed."""
    mask = IntervalMask.from_dense(torch.ones(9, 20, dtype=torch.bool))
    assert mask.starts is not None and mask.ends is not None
    mask.starts[0, 0, :3] = torch.tensor([[-(2**31)], [2**31 - 1], [7]])
    mask.ends[0, 0, :3] = torch.tensor([[2**31 - 1], [-5], [3]])
    q, k, v = tensors(1, 9, 20, 8)
    out = subquad.interval_attention(q, k, v, mask, backend=backend)
    full = subquad.interval_attention(q, k, v, IntervalMask.full(), backend=backend)
    torch.testing.assert_close(out[:, [0, *range(3, 9)]], full[:, [0, *range(3, 9)]])
    assert not out[:, 1:3].count_nonzero()


@backend_params("interval_attention")
@pytest.mark.parametrize("tq", [1, 20])
@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize(("where", "value"), [("v", torch.nan), ("k", torch.nan), ("k", torch.inf), ("k", 3e38)])
def test_bias_of_minus_infinity_masks(where: str, value: float, softcap: float, tq: int, backend: str) -> None:
    """Whatever the hidden keys and values hold; a product with 3e38 overflows, though all elements are finite."""
    hidden = torch.arange(30) % 3 == 0
    args = dict(zip("qkv", tensors(1, tq, 30, 8), strict=True))
    args[where][:, hidden] = value
    bias = torch.where(hidden, -torch.inf, 0.0)
    leaves = {n: x.requires_grad_() for n, x in args.items()}
    mask = IntervalMask.full()
    out = subquad.interval_attention(**leaves, mask=mask, key_bias=bias, softcap=softcap, backend=backend)
    seen = {"q": args["q"], **{n: args[n][:, ~hidden] for n in "kv"}}
    expected = subquad.interval_attention(**seen, mask=mask, softcap=softcap, backend="reference")
    torch.testing.assert_close(out, expected)
    if backend == "reference":  # dense products: its gradients are not what this is about
        return
    grads = torch.autograd.grad(out.sum(), list(leaves.values()))
    for grad, other in zip(grads, torch.autograd.grad(expected.sum(), list(leaves.values())), strict=True):
        torch.testing.assert_close(grad, other, atol=1e-5, rtol=1e-4)


DECODING: dict[str, IntervalMask] = {
    "full": IntervalMask.full(),
    "window": IntervalMask.sink(3, 170),
    "runs": IntervalMask.from_dense((torch.arange(300) % 37 < 30).expand(2, 300)),
    "lifetime": IntervalMask.full(2, 300).with_key_lifetime(
        torch.zeros(1, 1, 300).int(), torch.arange(300).int()[None, None] % 3
    ),
}


@backend_params("interval_attention", "native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(3, 3), (2, 1)])
@pytest.mark.parametrize("name", DECODING)
def test_decoding(name: str, heads: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    """One or two rows per key head: keys, of any strides, are read where they stand."""
    mask = DECODING[name]
    q, k, v = tensors(2, 2, 300, 70, heads=heads, dtype=dtype)
    if heads == (2, 1):
        q, mask = q[:, :1], mask if mask.tq is None else IntervalMask.from_dense(mask.to_dense()[:, :, :1])
    dense = mask.to_dense(q.shape[1], 300)[0, 0]
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((2, 300, heads[1], 140), torch.nan, dtype=dtype)
    v = wide[..., 3:73].copy_(v)
    v[:, ~dense.any(0)] = torch.nan
    bias = torch.where(torch.arange(300) % 11 == 5, -torch.inf, torch.linspace(-1, 1, 300))
    sinks = torch.linspace(-1, 1, heads[0])
    for options in ({}, {"sink_logits": sinks}, {"key_bias": bias}, {"key_bias": bias, "sink_logits": sinks}):
        keys = dense & (bias != -torch.inf) if "key_bias" in options else dense
        k[:, ~keys.any(0)] = torch.nan
        out, lse = subquad.interval_attention(q, k, v, mask, return_lse=True, backend=backend, **options)
        visible = IntervalMask.from_dense(keys)
        clean = [torch.where(keys.any(0)[None, :, None, None], x, 0.0).double() for x in (k, v)]
        options = {n: x.double().nan_to_num(neginf=0.0) for n, x in options.items()}
        expected = subquad.interval_attention(
            q.double(), *clean, visible, return_lse=True, backend="reference", **options
        )
        limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(out.double(), expected[0], atol=limit, rtol=limit)
        torch.testing.assert_close(lse.double(), expected[1], atol=limit, rtol=limit)


@backend_params("interval_attention", "native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [3, 9])
def test_gradients_do_not_depend_on_the_batch(batch: int, dtype: torch.dtype, backend: str) -> None:
    """With few heads the keys are cut into ranges, taken apart or together: a sequence has the same bits alone."""
    q, k, v = (x.requires_grad_() for x in tensors(batch, 150, 400, 24, heads=(2, 1), dtype=dtype))
    upstream = Sampler(dtype, seed=5).normal(batch, 150, 2, 24)

    def gradients(s: slice) -> tuple[torch.Tensor, ...]:
        out = subquad.interval_attention(q[s], k[s], v[s], IntervalMask.causal(), backend=backend)
        assert isinstance(out, torch.Tensor)
        return torch.autograd.grad(out, (q, k, v), upstream[s])

    whole = gradients(slice(None))
    for i in (0, batch - 1):
        for name, a, b in zip("qkv", whole, gradients(slice(i, i + 1)), strict=True):
            assert_same_bits(a[i], b[i], f"d{name}")


@backend_params("interval_attention", *KERNELS)
def test_large_scores(backend: str) -> None:
    """Scores of +-1e4 neither overflow nor lose the normalisation."""
    q, k, v = tensors(1, 20, 40, 16)
    out, lse = subquad.interval_attention(q * 60, k * 60, v, IntervalMask.causal(), return_lse=True, backend=backend)
    expected, wide = subquad.interval_attention(
        *(x.double() for x in (q * 60, k * 60, v)), IntervalMask.causal(), return_lse=True, backend="reference"
    )
    torch.testing.assert_close(out, expected.float(), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(lse, wide.float())


def test_autocast_casts_q_k_v() -> None:
    q, k, v = tensors(1, 20, 20, 8)
    sinks = torch.randn(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = subquad.interval_attention(q, k.bfloat16(), v, IntervalMask.causal(), sink_logits=sinks)
    low = (x.bfloat16() for x in (q, k, v))
    assert_same_bits(out, subquad.interval_attention(*low, IntervalMask.causal(), sink_logits=sinks))


def test_splitting_the_keys_and_merging_by_lse() -> None:
    """Two halves of the keys, mixed by their log-sum-exp, are the whole: values and gradients."""
    q, k, v = (x.requires_grad_() for x in tensors(1, 30, 50, 8))
    whole = subquad.interval_attention(q, k, v, IntervalMask.full())
    parts = [
        subquad.interval_attention(q, k[:, s], v[:, s], IntervalMask.full(), return_lse=True)
        for s in (slice(0, 20), slice(20, 50))
    ]
    weights = torch.stack([lse for _, lse in parts]).softmax(0)
    mixed = sum(w[..., None] * out for w, (out, _) in zip(weights, parts, strict=True))
    assert isinstance(mixed, torch.Tensor)
    torch.testing.assert_close(mixed, whole)
    upstream = torch.randn_like(whole)
    for a, b in zip(
        torch.autograd.grad(mixed, (q, k, v), upstream), torch.autograd.grad(whole, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


_MEMORY = """
import torch, subquad

def peak():  # MiB; ru_maxrss would count the process that started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

q, k, v = (torch.randn(1, 32768, {heads}, 64) for _ in range(3))
mask = subquad.IntervalMask.{mask}
subquad.interval_attention(q[:, :256], k[:, :256], v[:, :256], mask, backend="native")
before = peak()
out = subquad.interval_attention(q, k, v, mask, backend="native")
print(peak() - before - out.nbytes / 2**20)
"""


@pytest.mark.slow
@backend_params("interval_attention", "native")
@pytest.mark.parametrize(("heads", "mask"), [(1, "causal()"), (8, "sink(4, 1020)")])
def test_memory_of_a_long_sequence(heads: int, mask: str, backend: str) -> None:
    """Forward at 32768 tokens: inputs, outputs and at most 64 MB."""
    code = _MEMORY.format(heads=heads, mask=mask)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 64, f"{result.stdout.strip()} MiB beyond inputs and outputs"


WRONG: dict[str, tuple[str, type[Exception], dict[str, Any]]] = {
    "q is a list": ("q", TypeError, {"q": [1.0]}),
    "q is int": ("q", TypeError, {"q": torch.zeros(1, 4, 2, 8, dtype=torch.int32)}),
    "q has 3 dimensions": ("q", ValueError, {"q": torch.zeros(1, 4, 8)}),
    "k of another dtype": ("k", TypeError, {"k": torch.zeros(1, 6, 2, 8, dtype=torch.bfloat16)}),
    "k of another batch": ("k", ValueError, {"k": torch.zeros(2, 6, 2, 8)}),
    "k of another head dimension": ("k", ValueError, {"k": torch.zeros(1, 6, 2, 9)}),
    "heads that do not divide": ("k", ValueError, {"k": torch.zeros(1, 6, 3, 8), "v": torch.zeros(1, 6, 3, 8)}),
    "v of another length": ("v", ValueError, {"v": torch.zeros(1, 5, 2, 8)}),
    "head dimension 513": ("q", ValueError, {"q": torch.zeros(1, 4, 2, 513), "k": torch.zeros(1, 6, 2, 513)}),
    "mask is a tensor": ("mask", TypeError, {"mask": torch.ones(4, 6)}),
    "mask of other sizes": ("mask", ValueError, {"mask": IntervalMask.causal(5, 6)}),
    "mask of another batch": ("mask", ValueError, {"mask": IntervalMask.from_dense(torch.ones(3, 1, 4, 6) > 0)}),
    "mask of other heads": ("mask", ValueError, {"mask": IntervalMask.from_dense(torch.ones(1, 3, 4, 6) > 0)}),
    "infinite scale": ("scale", ValueError, {"scale": float("inf")}),
    "scale beyond float32": ("scale", ValueError, {"scale": 1e39}),
    "scale is nan": ("scale", ValueError, {"scale": float("nan")}),
    "scale is a tensor": ("scale", TypeError, {"scale": torch.ones(())}),
    "sinks of another length": ("sink_logits", ValueError, {"sink_logits": torch.zeros(3)}),
    "sinks are ints": ("sink_logits", TypeError, {"sink_logits": torch.zeros(2, dtype=torch.int64)}),
    "bias of another length": ("key_bias", ValueError, {"key_bias": torch.zeros(5)}),
    "slopes of another length": ("alibi_slopes", ValueError, {"alibi_slopes": torch.zeros(3)}),
    "slopes of another batch": ("alibi_slopes", ValueError, {"alibi_slopes": torch.zeros(2, 2)}),
    "slopes are ints": ("alibi_slopes", TypeError, {"alibi_slopes": torch.zeros(2, dtype=torch.int64)}),
    "slopes with a gradient": ("alibi_slopes", ValueError, {"alibi_slopes": torch.zeros(2, requires_grad=True)}),
    "negative softcap": ("softcap", ValueError, {"softcap": -1.0}),
    "infinite softcap": ("softcap", ValueError, {"softcap": float("inf")}),
    "softcap is nan": ("softcap", ValueError, {"softcap": float("nan")}),
    "softcap below float32": ("softcap", ValueError, {"softcap": 1e-40}),
    "softcap is None": ("softcap", TypeError, {"softcap": None}),
    "shift without a mask that has one": (
        "q_shift",
        ValueError,
        {"q_shift": subquad.RopeSpec(torch.ones(2), 4)},
    ),
    "return_lse is a string": ("return_lse", TypeError, {"return_lse": "yes"}),
    "unknown backend": ("backend", ValueError, {"backend": "gpu"}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(case: str) -> None:
    name, kind, change = WRONG[case]
    args: dict[str, Any] = {
        "q": torch.zeros(1, 4, 2, 8),
        "k": torch.zeros(1, 6, 2, 8),
        "v": torch.zeros(1, 6, 2, 8),
        "mask": IntervalMask.causal(),
    }
    with pytest.raises(kind, match=f"^{name}: "):
        subquad.interval_attention(**(args | change))
