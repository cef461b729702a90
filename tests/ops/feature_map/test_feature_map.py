"""Feature maps: the generic tests, and what is true of them alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import subquad
from subquad.contract import HANDLES
from subquad.reference.feature_map import KINDS, feature_map
from subquad.testing import (
    Sample,
    Sampler,
    Task,
    assert_close,
    assert_same_bits,
    backend_params,
    generic_tests,
    strategies,
)
from subquad.testing.checks import CHECKS
from subquad.testing.specs.feature_map import SPEC, SPECS, draw

EXAMPLES = {"native": 60, "simt": 15, "triton": 10, "reference": 15}
WIDEST = {"native": 256, "simt": 70, "triton": 70, "reference": 256}
STEM = "feature_map"


@generic_tests(*SPECS)
def test_generic(task: Task, device: str) -> None:
    task.run(device)


@pytest.mark.quick
@backend_params(STEM)
def test_a_row_beyond_whole_tiles(backend: str) -> None:
    sample = draw(Sampler(), "tiles", 1, 65, 1, 20, 12)
    spec = dataclasses.replace(SPEC, samples=lambda _: [sample])
    for check in ("forward", "gradients"):
        Task(spec, CHECKS[check], backend, torch.float32).run()


@st.composite
def problems(draw_: st.DrawFn, widest: int) -> Sample:
    """Everything free: shape, dtype, weight, kind, halves, eps, layout of x."""
    sampler = Sampler(draw_(strategies.dtypes(SPEC)), seed=draw_(strategies.seeds()))
    kind = draw_(st.sampled_from(KINDS))
    sample = draw(
        sampler,
        "random",
        draw_(st.integers(1, 3)),
        draw_(strategies.extents(1, 70)),
        draw_(st.integers(1, 3)),
        draw_(strategies.extents(1, widest)),
        draw_(st.one_of(st.none(), strategies.extents(1, widest))),
        kind=kind,
        fullspace=kind == "hedgehog2" or draw_(st.booleans()),
        eps=draw_(st.sampled_from((0.0, 1e-12, 0.05))),
    )
    if draw_(st.booleans()):
        sample = sample.replace(x=sample["x"].transpose(1, 2).contiguous().transpose(1, 2))
    # Whether an entry at eps is clamped may differ between float32 and float64, and then its gradient does.
    y = feature_map(
        sample["x"].double(),
        None if sample.args["weight"] is None else sample["weight"].double(),
        **{**sample.kwargs, "eps": 0.0},
    )
    eps = sample.kwargs["eps"]
    return sample if not eps or ((y - eps).abs() > 1e-5 * eps).all() else sample.with_options(eps=0.0)


@backend_params(STEM)
def test_random_problems(backend: str) -> None:
    @settings(max_examples=EXAMPLES[backend])
    @given(problems(WIDEST[backend]))
    def run(sample: Sample) -> None:
        fixed = dataclasses.replace(SPEC, samples=lambda _: [sample])
        for check in ("forward", "gradients"):
            Task(fixed, CHECKS[check], backend, sample["x"].dtype).run()

    run()


def case(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, T, H, d] and weight [H, d, f] of the five extents."""
    batch, time, heads, d, f = shape
    sample = draw(Sampler(dtype), "case", batch, time, heads, d, f)
    return sample["x"] * std, sample["weight"]


@backend_params(STEM)
@pytest.mark.parametrize("kind", ["softmax", "hedgehog2"])
def test_sums(backend: str, kind: str) -> None:
    """Each half of a softmax sums to 1; the halves of hedgehog2 together do."""
    x, weight = case(2, 9, 2, 24, 20)
    phi = subquad.feature_map(x, weight, kind=kind, backend=backend)
    assert bool((phi > 0).all())
    if kind == "softmax":
        torch.testing.assert_close(phi.unflatten(-1, (2, 20)).sum(-1), torch.ones(2, 9, 2, 2), rtol=0, atol=1e-6)
    else:
        torch.testing.assert_close(phi.sum(-1), torch.ones(2, 9, 2), rtol=0, atol=1e-6)


@backend_params(STEM)
@pytest.mark.parametrize("kind", KINDS)
def test_saturated(backend: str, kind: str) -> None:
    """Logits far apart: one feature takes all, the others are eps and have no gradient; nothing overflows."""
    rows = [[0.0, 3e4, -3e4, 50.0], [-200.0, -3e4, -300.0, -100.0], [200.0, 3e4, 300.0, 100.0]]
    x = torch.tensor(rows).reshape(1, 3, 1, 4).requires_grad_()
    if kind in ("exp", "elu1", "relu"):
        x = (x.detach() * 1e-3).requires_grad_()
    phi = subquad.feature_map(x, kind=kind, backend=backend)
    (grad,) = torch.autograd.grad(phi, x, torch.ones_like(phi))
    assert bool(phi.isfinite().all()) and bool(grad.isfinite().all())
    expected = feature_map(x.detach().double(), kind=kind)
    assert_close(phi, expected.float(), 1e-5)
    if kind == "softmax":
        assert phi[0, 0, 0].tolist() == pytest.approx([1e-12, 1.0, 1e-12, 1e-12, 1e-12, 1e-12, 1.0, 1e-12])
        assert not grad[0, 0].count_nonzero()


@backend_params(STEM)
def test_equal_logits(backend: str) -> None:
    """All equal, however large: a uniform distribution."""
    for value in (0.0, 1e4, -3e38):
        phi = subquad.feature_map(torch.full((1, 2, 1, 8), value), backend=backend)
        assert_same_bits(phi, torch.full((1, 2, 1, 16), 0.125))


@backend_params(STEM)
@pytest.mark.parametrize("kind", ["softmax", "exp", "relu", "hedgehog2"])
def test_clamped_entries_have_no_gradient(backend: str, kind: str) -> None:
    """Clamped exactly to eps, and the gradient is that of the map with those entries taken out of the sum."""
    x, weight = case(1, 7, 2, 16, 12)
    eps = 0.0625 if kind in ("softmax", "hedgehog2") else 0.5
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    phi = subquad.feature_map(*leaves, kind=kind, eps=eps, backend=backend)
    at_eps = phi == eps
    assert 0 < int(at_eps.sum()) < phi.numel() and bool((phi >= eps).all())
    upstream = torch.linspace(-1, 1, phi.numel()).view(phi.shape)
    grads = torch.autograd.grad(phi, leaves, upstream)
    free = x.clone().requires_grad_(), weight.clone().requires_grad_()
    wanted = torch.autograd.grad(feature_map(*free, kind=kind, eps=0.0), free, upstream.masked_fill(at_eps, 0.0))
    for grad, expected in zip(grads, wanted, strict=True):
        assert_close(grad, expected, 5e-6)


@backend_params(STEM)
def test_elu1_is_not_clamped(backend: str) -> None:
    x = torch.full((1, 1, 1, 3), -20.0)
    phi = subquad.feature_map(x, kind="elu1", fullspace=False, eps=0.1, backend=backend)
    torch.testing.assert_close(phi, torch.full_like(phi, math.exp(-20.0)))


@backend_params(STEM)
def test_eps_below_fp16_is_zero(backend: str) -> None:
    """The default eps rounds to 0 in float16; 1e-7 does not."""
    x = torch.tensor([0.0, 200.0]).half().reshape(1, 1, 1, 2)
    assert subquad.feature_map(x, fullspace=False, backend=backend).flatten().tolist() == [0.0, 1.0]
    assert float(subquad.feature_map(x, fullspace=False, eps=1e-7, backend=backend).min()) > 0.0


@backend_params(STEM)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_row(backend: str, kind: str) -> None:
    """Forward in the row of that token and head, backward in its dx and in the dweight of that head."""
    x, weight = case(2, 5, 2, 12, 9)
    x[1, 2, 0, 3] = math.nan
    leaves = x.requires_grad_(), weight.requires_grad_()
    phi = subquad.feature_map(*leaves, kind=kind, backend=backend)
    bad = torch.zeros(2, 5, 2, dtype=torch.bool)
    bad[1, 2, 0] = True
    assert torch.equal(phi.isnan().all(-1), bad) and torch.equal(phi.isnan().any(-1), bad)
    dx, dweight = torch.autograd.grad(phi, leaves, torch.ones_like(phi))
    assert kind == "relu" or torch.equal(dx.isnan().any(-1), bad)  # its slope is finite everywhere
    assert not bool(dx[~bad].isnan().any())
    assert bool(dweight[0].isnan().any()) and not bool(dweight[1].isnan().any())


@backend_params(STEM)
@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127])
def test_lengths(backend: str, time: int) -> None:
    x, weight = case(1, time, 2, 16, 6)
    run_against_reference(backend, x, weight)


@backend_params(STEM, "native", "simt")
def test_many_chunks(backend: str) -> None:
    """More tokens than 16 chunks of 256: the chunks grow, and their sums are added in one order."""
    x, weight = case(3, 1400, 1, 4, 3)
    run_against_reference(backend, x, weight)


@backend_params(STEM)
def test_two_chunks(backend: str) -> None:
    """The second chunk is short: each token counts once in the weight's gradient."""
    x, weight = case(2, 150, 1, 4, 3)
    run_against_reference(backend, x, weight)


@backend_params(STEM)
def test_infinite_weight_beside_rows_that_do_not_exist(backend: str) -> None:
    """The last tile is padded with rows of zeros, and 0 * inf must not reach the weight's gradient."""
    x, weight = torch.full((1, 5, 1, 3), 0.5), torch.full((1, 3, 2), 0.25)
    weight[0, :, 1] = math.inf
    leaves = x.requires_grad_(), weight.requires_grad_()
    phi = subquad.feature_map(*leaves, kind="elu1", fullspace=False, backend=backend)
    assert bool(phi[..., 1].isposinf().all()) and bool(phi[..., 0].isfinite().all())
    (dweight,) = torch.autograd.grad(phi, weight, torch.ones_like(phi))
    torch.testing.assert_close(dweight, torch.full_like(dweight, 2.5))


def run_against_reference(backend: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    wide = x.double().requires_grad_(), weight.double().requires_grad_()
    phi, expected = subquad.feature_map(*leaves, backend=backend), feature_map(*wide)
    upstream = torch.randn(phi.shape, generator=torch.Generator().manual_seed(1))
    assert_close(phi, expected.float(), 5e-6)
    pairs = zip(
        torch.autograd.grad(phi, leaves, upstream), torch.autograd.grad(expected, wide, upstream.double()), strict=True
    )
    for grad, wanted in pairs:
        assert_close(grad, wanted.float(), 5e-6)


@backend_params(STEM)
def test_weight_alone_and_x_alone(backend: str) -> None:
    """Frozen x or frozen weight; a dtype of its own for neither."""
    x, weight = case(1, 6, 2, 8, 4, dtype=torch.bfloat16)
    x.requires_grad_()
    phi = subquad.feature_map(x, weight, backend=backend)
    (dx,) = torch.autograd.grad(phi, x, torch.ones_like(phi))
    assert dx.dtype is torch.bfloat16 and dx.shape == x.shape and phi.is_contiguous()
    with pytest.raises(TypeError, match=r"^weight: expected torch.bfloat16 as x has, got torch.float32"):
        subquad.feature_map(x, weight.float(), backend=backend)


# --- bad input ----------------------------------------

X, W = torch.ones(2, 3, 4, 5), torch.ones(4, 5, 6)
BAD = {
    "x list": ("x", [1.0], TypeError, r"x: expected a torch.Tensor, got list"),
    "x dtype": ("x", X.int(), TypeError, r"x: expected float32, .*got torch.int32"),
    "x dims": ("x", X[0], ValueError, r"x: expected shape \[B, T, H, d\], got \[3, 4, 5\]"),
    "x wide": ("x", torch.ones(1, 1, 4, 257), ValueError, r"x: expected shape .* d in 1\.\.256, got \[1, 1, 4, 257\]"),
    "x narrow": ("x", torch.ones(1, 1, 4, 0), ValueError, r"x: expected shape .* d in 1\.\.256"),
    "weight list": ("weight", [1.0], TypeError, r"weight: expected a torch.Tensor, got list"),
    "weight dims": ("weight", W[0], ValueError, r"weight: expected shape \[4, 5, f\].*got \[5, 6\]"),
    "weight heads": ("weight", W[:3], ValueError, r"weight: expected shape \[4, 5, f\].*got \[3, 5, 6\]"),
    "weight rows": ("weight", W[:, :4], ValueError, r"weight: expected shape \[4, 5, f\].*got \[4, 4, 6\]"),
    "weight empty": ("weight", W[..., :0], ValueError, r"weight: expected shape .* f in 1\.\.256"),
    "weight wide": ("weight", torch.ones(4, 5, 257), ValueError, r"weight: expected shape .* f in 1\.\.256"),
    "weight dtype": ("weight", W.half(), TypeError, r"weight: expected torch.float32 as x has, got torch.float16"),
    "weight device": ("weight", W.to("meta"), ValueError, r"weight: expected device cpu as x has, got meta"),
    "kind": ("kind", "elu", ValueError, r"kind: expected one of 'softmax', .*got 'elu'"),
    "fullspace": ("fullspace", 1, TypeError, r"fullspace: expected a bool, got int"),
    "eps text": ("eps", "0", TypeError, r"eps: expected a float, got str"),
    "eps negative": ("eps", -1e-3, ValueError, r"eps: expected a finite number that is not negative, got -0.001"),
    "eps nan": ("eps", math.nan, ValueError, r"eps: expected a finite number"),
    "eps inf": ("eps", math.inf, ValueError, r"eps: expected a finite number"),
    "backend": ("backend", "cuda", ValueError, r"backend: expected one of"),
}


@pytest.mark.parametrize(("name", "value", "kind", "message"), BAD.values(), ids=BAD)
def test_errors(name: str, value: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}"):
        subquad.feature_map(**{"x": X, "weight": W, "backend": "reference", name: value})


def test_hedgehog2_needs_both_halves() -> None:
    with pytest.raises(ValueError, match=r"^fullspace: expected True with kind 'hedgehog2'"):
        subquad.feature_map(X, W, kind="hedgehog2", fullspace=False)


G = torch.ones(2, 3, 4, 12)
RAW = {
    "x dims": ("feature_map_fwd", (X[0], None, 0, True, 0.0), "x"),
    "x wide": ("feature_map_fwd", (torch.ones(1, 1, 4, 300), None, 0, True, 0.0), "x"),
    "x strides": ("feature_map_fwd", (X.transpose(2, 3), None, 0, True, 0.0), "x"),
    "weight shape": ("feature_map_fwd", (X, W[:, :4].contiguous(), 0, True, 0.0), "weight"),
    "weight wide": ("feature_map_fwd", (X, torch.ones(4, 5, 257), 0, True, 0.0), "weight"),
    "weight dtype": ("feature_map_fwd", (X, W.bfloat16(), 0, True, 0.0), "weight"),
    "weight strides": ("feature_map_fwd", (X, torch.ones(4, 6, 5).transpose(1, 2), 0, True, 0.0), "weight"),
    "kind": ("feature_map_fwd", (X, W, 5, True, 0.0), "kind"),
    "kind low": ("feature_map_bwd", (G, X, W, -1, True, 0.0), "kind"),
    "fullspace": ("feature_map_fwd", (X, W, 4, False, 0.0), "fullspace"),
    "grad_out shape": ("feature_map_bwd", (G, X, W, 0, False, 0.0), "grad_out"),
    "grad_out dtype": ("feature_map_bwd", (G.half(), X, W, 0, True, 0.0), "grad_out"),
    "grad_out strides": ("feature_map_bwd", (G[:1].expand(2, 3, 4, 12), X, W, 0, True, 0.0), "grad_out"),
}


@backend_params(STEM, "native", "triton", "simt")
@pytest.mark.parametrize(("op", "args", "name"), RAW.values(), ids=RAW)
def test_raw_operator_never_touches_foreign_memory(backend: str, op: str, args: tuple[Any, ...], name: str) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        HANDLES[backend][op](*args)
    assert f"{name}: " in str(caught.value)
