"""Ten groups of inputs that break gated sparse kernels, on every backend, in every dtype, with every number of tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import subquad
from subquad._backends import BACKENDS
from subquad.testing import Sample, Sampler, assert_close, assert_same_bits, backend_params
from subquad.testing.case import Case
from subquad.testing.specs.cats_mlp import SPEC, draw

TOKENS = (0, 1, 2, 3, 5, 16, 17)
# The dtype is a matter of loads and stores, the number of tokens one of tiles: every value of each is enough for interpreter,
# emulator and reference, 17 (dense products) in two dtypes. The native kernels, which take no time, get all pairs.
PAIRS = {torch.float32: (0, 1, 3, 16, 17), torch.bfloat16: (2, 5, 17), torch.float16: (1, 5, 16)}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SPARSE = 16  # most tokens that the sparse kernels take


def everywhere(test: Any) -> Any:
    """Run a test for every backend with every dtype and every number of tokens."""
    cases = [
        pytest.param(
            backend, dtype, n, id=f"{n}-{NAMES[dtype]}-{backend}", marks=pytest.mark.backend("cats_mlp", backend)
        )
        for backend in BACKENDS
        for dtype, few in PAIRS.items()
        for n in (TOKENS if backend == "native" else few)
    ]
    return pytest.mark.parametrize(("backend", "dtype", "tokens"), cases)(test)


def new(case: Case, tokens: int | tuple[int, ...], **options: Any) -> Sample:
    """A random problem, tiny for Triton's interpreter."""
    hidden, neurons = (8, 12) if case.backend == "triton" else (20, 40)
    shape = {"hidden": hidden, "neurons": neurons, "threshold": 0.3, **options}
    return draw(Sampler(case.dtype, seed=tokens if isinstance(tokens, int) else 7), "nasty", tokens, **shape)


def right(case: Case, sample: Sample, **args: torch.Tensor | None) -> torch.Tensor:
    """The result, after comparing it with the float64 oracle."""
    sample = sample.replace(**args)
    (actual,), (expected,) = case.call(sample), case.reference(case.wide(sample))
    assert_close(actual, expected, SPEC.tol.forward[case.dtype])
    return actual


def same(case: Case, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits from the sparse kernels; torch's matrix products, used elsewhere, only come near."""
    if case.backend != "reference" and (expected.dim() < 2 or len(expected) <= SPARSE):
        assert_same_bits(actual, expected)
    else:
        assert_close(actual, expected, SPEC.tol.forward[case.dtype])


def positive_zero(tensor: torch.Tensor) -> bool:
    return not bool(tensor.count_nonzero()) and not bool(tensor.signbit().any())


@everywhere
def test_1_all_inactive(backend: str, dtype: torch.dtype, tokens: int) -> None:
    case = Case(SPEC, backend, dtype)
    sample = new(case, tokens, threshold=1e9)
    assert positive_zero(case.call(sample)[0])
    biased = new(case, tokens, threshold=1e9, bias=True)
    y = case.call(biased)[0]
    assert_same_bits(y, biased["b_down"].expand_as(y).contiguous())
    if tokens > 1:  # dead rows among live ones
        mixed = new(case, tokens, threshold=0.05)
        x = mixed["x"].clone()
        x[::2] *= 1e-3
        y = right(case, mixed, x=x)
        assert positive_zero(y[::2]) and bool(y[1::2].count_nonzero(1).all())


@everywhere
def test_2_all_active(backend: str, dtype: torch.dtype, tokens: int) -> None:
    case = Case(SPEC, backend, dtype)
    neurons = 33 if backend == "triton" else 321  # longer than one chunk, and not a multiple of any
    sample = new(case, tokens, neurons=neurons, threshold=-1.0)
    y = right(case, sample)
    assert_same_bits(case.call(sample.with_options(threshold=-math.inf))[0], y)
    x, gate, up, down = (sample[n].double() for n in ("x", "w_gate", "w_up", "w_down"))
    dense = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert_close(y, dense, SPEC.tol.forward[dtype])


@everywhere
def test_3_zero_threshold_skips_exact_zeros(backend: str, dtype: torch.dtype, tokens: int) -> None:
    case = Case(SPEC, backend, dtype)
    sample = new(case, tokens, threshold=0.0)
    gate, up = sample["w_gate"].clone(), sample["w_up"].clone()
    gate[3] = 0.0
    up[3] = math.nan  # shows whether neuron 3 was computed
    y = right(case, sample, w_gate=gate, w_up=up)
    assert bool(y.isfinite().all())
    kept = case.call(sample.with_options(inclusive=True), w_gate=gate, w_up=up)[0]
    assert bool(kept.isnan().all())
    x = torch.zeros_like(sample["x"])
    assert positive_zero(case.call(sample, x=x, w_gate=gate, w_up=up)[0])


@everywhere
def test_4_odd_thresholds(backend: str, dtype: torch.dtype, tokens: int) -> None:
    case = Case(SPEC, backend, dtype)
    sample = new(case, tokens)
    assert positive_zero(case.call(sample.with_options(threshold=math.inf))[0])
    assert positive_zero(case.call(sample.with_options(threshold=1e300))[0])  # beyond float32
    dense = case.call(sample.with_options(threshold=-1.0))[0]
    for everything in (-math.inf, -1e300):
        assert_same_bits(case.call(sample.with_options(threshold=everything))[0], dense)
    for equal in (0.1, torch.tensor(0.1), torch.tensor([0.1])):
        assert_same_bits(
            case.call(sample.with_options(threshold=equal))[0], case.call(sample.with_options(threshold=0.1))[0]
        )
    for nan in (math.nan, torch.tensor(math.nan), torch.full((sample["w_gate"].shape[0],), math.nan)):
        with pytest.raises(ValueError, match=r"^threshold: expected .*got NaN"):
            case.call(sample.with_options(threshold=nan))
    with pytest.raises(ValueError, match=r"^threshold: expected device cpu"):
        case.call(sample.with_options(threshold=torch.tensor(0.1, device="meta")))


@everywhere
def test_5_ties(backend: str, dtype: torch.dtype, tokens: int) -> None:
    """Small integers through relu are exact in every dtype: z[n, i] = n + i, threshold 3."""
    case = Case(SPEC, backend, dtype)
    neurons = hidden = 8
    x = torch.cat([torch.arange(tokens).float()[:, None], torch.ones(tokens, hidden - 1)], 1)
    gate = torch.zeros(neurons, hidden)
    gate[:, 0], gate[:, 1] = 1.0, torch.arange(neurons).float()
    up, down = torch.zeros(neurons, hidden), torch.eye(hidden)
    up[:, 2] = 1.0  # so that y is the thresholded activation itself
    tensors = {"x": x, "w_gate": gate, "w_up": up, "w_down": down}
    sample = Sample("ties", {n: t.to(dtype) for n, t in tensors.items()}, {"activation": "relu", "threshold": 3.0})
    z = torch.arange(tokens)[:, None] + torch.arange(neurons)
    assert torch.equal(case.call(sample)[0].float(), torch.where(z > 3, z, 0).float())
    assert torch.equal(case.call(sample.with_options(inclusive=True))[0].float(), torch.where(z >= 3, z, 0).float())


@everywhere
def test_6_non_finite(backend: str, dtype: torch.dtype, tokens: int) -> None:
    case = Case(SPEC, backend, dtype)
    sample = new(case, tokens, threshold=0.02)
    dead = 5
    gate, up, down = (sample[n].clone() for n in ("w_gate", "w_up", "w_down"))
    gate[dead] = 0.0
    clean = right(case, sample, w_gate=gate)
    for value in (math.inf, math.nan):  # nothing of a dead neuron may leak: 0 * inf is NaN
        up[dead] = value
        assert_same_bits(case.call(sample, w_gate=gate, w_up=up)[0], clean)
        down[:, dead] = value
        spoilt = sample.replace(w_gate=gate, w_up=up, w_down=down)
        same(case, case.call(spoilt)[0], clean)
        assert not bool(case.call(spoilt.with_options(threshold=-1.0))[0].isfinite().any())
        if dtype is torch.float32 and tokens:  # and in training
            x = sample["x"].clone().requires_grad_()
            y = case.call(spoilt.replace(x=x, w_up=sample["w_up"]))[0]
            assert_close(y.detach(), clean, SPEC.tol.forward[dtype])
            assert bool(torch.autograd.grad(y.sum(), x)[0].isfinite().all())
    if tokens > 1:
        x = sample["x"].clone()
        x[1, 2] = math.nan
        y = case.call(sample, x=x, w_gate=gate)[0]
        others = [n for n in range(tokens) if n != 1]
        assert bool(y[1].isnan().all())
        assert_same_bits(y[others], clean[others])
    minus_inf = torch.zeros(gate.shape[0], dtype=dtype)
    minus_inf[0] = -math.inf
    assert bool(case.call(sample, w_gate=gate, b_gate=minus_inf)[0].isnan().all())  # silu(-inf) is NaN, as in torch
    relu = case.call(sample.with_options(activation="relu"), w_gate=gate, b_gate=minus_inf)[0]
    assert bool(relu.isfinite().all())  # relu(-inf) is 0, hence dead


@everywhere
def test_7_ragged_sizes(backend: str, dtype: torch.dtype, tokens: int) -> None:
    case = Case(SPEC, backend, dtype)
    sizes = [(1, 1), (7, 5), (15, 31), (16, 32), (17, 33), (33, 77), (100, 1023), (4099, 5), (2, 600)]
    for hidden, neurons in sizes[1:5:2] if backend == "triton" else sizes:
        for row_major in (False, True):
            right(case, new(case, tokens, hidden=hidden, neurons=neurons, threshold="tensor", row_major=row_major))


@everywhere
def test_8_thresholds_per_channel(backend: str, dtype: torch.dtype, tokens: int) -> None:
    case = Case(SPEC, backend, dtype)
    sample = new(case, tokens, threshold="channel")
    t = sample["threshold"]
    assert t[0] < 0 and t[-1] == math.inf
    y = right(case, sample)
    up = sample["w_up"].clone()
    up[-1] = math.nan
    assert_same_bits(case.call(sample, w_up=up)[0], y)  # +inf kills its channel for good
    spaced = torch.full((2 * t.numel(),), math.nan)[::2].copy_(t)
    assert_same_bits(case.call(sample, threshold=spaced)[0], y)
    scalar = new(case, tokens, threshold=0.3)
    expanded = scalar.with_options(threshold=torch.tensor([0.3]).expand(t.numel()))
    assert_same_bits(case.call(expanded)[0], case.call(scalar)[0])


@everywhere
def test_9_rows_of_a_batch(backend: str, dtype: torch.dtype, tokens: int) -> None:
    """Row n wakes neuron n alone, or every row is the same row, or one row is dead; union shares what is awake."""
    case = Case(SPEC, backend, dtype)
    sample = new(case, tokens, threshold=0.5, hidden=18, neurons=24)
    gate = torch.zeros(24, 18, dtype=dtype)
    gate[:18].fill_diagonal_(3.0)
    x = torch.eye(18, dtype=dtype)[:tokens].contiguous()
    disjoint = right(case, sample, x=x, w_gate=gate)
    union = right(case, sample.with_options(mask_mode="union"), x=x, w_gate=gate)
    assert_close(union, disjoint, SPEC.tol.forward[dtype])  # silu(0) = 0: the neighbours' neurons add nothing
    shifted = torch.full((24,), -2.0, dtype=dtype)  # silu(-2) = -0.24: now they do
    alone = right(case, sample, x=x, w_gate=gate, b_gate=shifted)
    together = right(case, sample.with_options(mask_mode="union"), x=x, w_gate=gate, b_gate=shifted)
    assert torch.equal(alone, together) == (tokens < 2)
    if tokens > 1:
        twins = sample["x"][:1].expand(tokens, -1).contiguous()
        y = case.call(sample, x=twins)[0]
        same(case, y, y[:1].expand_as(y).contiguous())
        dead = sample["x"].clone()
        dead[1] = 0.0
        y = right(case, sample, x=dead)
        assert positive_zero(y[1])
        if tokens <= SPARSE:
            same(case, case.call(sample, x=dead[2:])[0], y[2:])


@everywhere
def test_10_layouts_and_ranges(backend: str, dtype: torch.dtype, tokens: int) -> None:
    case = Case(SPEC, backend, dtype)
    sample = new(case, tokens, threshold="tensor")
    x = sample["x"]
    y = right(case, sample)
    for variant in (x.repeat_interleave(2, 1)[:, ::2], x.t().contiguous().t(), x[None], x[:, None]):
        same(case, case.call(sample, x=variant)[0].reshape(y.shape), y)
    if tokens == 1:
        same(case, case.call(sample, x=x[0])[0], y[0])
    odd = {}
    for name in ("x", "w_gate", "w_up", "w_down"):  # one element behind an aligned address
        value = sample[name]
        shape = value.t().shape if name == "w_down" else value.shape
        flat = torch.empty(value.numel() + 1, dtype=dtype)[1:].view(shape)
        odd[name] = (flat.t() if name == "w_down" else flat).copy_(value)
    same(case, case.call(sample, **odd)[0], y)
    assert x.data_ptr() != y.data_ptr() or tokens == 0
    before = x.clone()
    case.call(sample)
    assert_same_bits(x, before)
    large = torch.full_like(x, 16.0)  # h = silu(300) * 300 exceeds the largest float16, y does not
    hidden = x.shape[1]
    heavy = {n: torch.full_like(sample[n], 300.0 / 16 / hidden) for n in ("w_gate", "w_up")}
    down = torch.full_like(sample["w_down"], 1 / 1024)
    right(case, sample, x=large, w_down=down, **heavy)


@backend_params("cats_mlp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_denormal_activations_count(backend: str, dtype: torch.dtype) -> None:
    """A gate below the normal range is neither flushed to a dead zero nor lost in the product."""
    one = torch.ones(1, 1, dtype=dtype)
    tiny = one * 2.0**-126
    y = subquad.cats_mlp(one, tiny, one * 2.0**60, one * 2.0**60, 0.0, backend=backend)
    assert y.item() == pytest.approx(2.0**-127 * 2.0**120, rel=0.01)


@backend_params("cats_mlp", "native", "triton", "simt")
def test_offsets_beyond_32_bits(backend: str) -> None:
    """Rows more than 2**31 elements apart; the memory between them is never touched and so never exists."""
    hidden, neurons, stride = 8, 3, 2**30 + 8
    case = Case(SPEC, backend, torch.bfloat16)
    sample = new(case, 2, hidden=hidden, neurons=neurons, threshold=-1.0)
    expected = right(case, sample)
    torch.use_deterministic_algorithms(False)  # poisoning would touch it
    for name in ("w_gate", "w_up", "w_down"):
        value = sample[name]
        rows = value.t() if name == "w_down" else value
        far = (
            torch.empty(2 * stride + hidden, dtype=torch.bfloat16)
            .as_strided((neurons, hidden), (stride, 1))
            .copy_(rows)
        )
        assert_same_bits(case.call(sample, **{name: far.t() if name == "w_down" else far})[0], expected, name)
