"""What the tiles of the Triton kernels make special: several tiles of rows and keys, seen in part and wholly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import subquad
from subquad import IntervalMask
from subquad.masks import plan
from subquad.testing import Sampler, backend_params


def runs(tq: int, tk: int, *, whole: bool) -> IntervalMask:
    """Two runs a row that move along; with `whole`, a block that all rows of a tile see."""
    t, j = torch.arange(tq)[:, None], torch.arange(tk)
    dense = ((j >= t // 2) & (j < t // 2 + 20)) | (j % 97 > 90)
    if whole:
        dense |= (j >= 64) & (j < 140) & (t < 200)
    dense[tq // 3] = False
    return IntervalMask.from_dense(dense)


CASES: dict[str, tuple[int, int, int, int, IntervalMask]] = {
    "causal": (150, 150, 2, 1, IntervalMask.causal()),
    "causal, more keys": (70, 210, 2, 2, IntervalMask.causal()),
    "causal, more queries": (210, 70, 2, 2, IntervalMask.causal()),
    "full": (70, 100, 2, 1, IntervalMask.full()),
    "window": (200, 200, 1, 1, IntervalMask.sliding(45)),
    "window wider than a tile": (290, 290, 1, 1, IntervalMask.sliding(130)),
    "sinks": (200, 230, 1, 1, IntervalMask.sink(40, 70)),
    "sinks alone": (140, 200, 1, 1, IntervalMask.sink(5, 0)),
    "planned": (150, 190, 2, 2, runs(150, 190, whole=False)),
    "planned, whole tiles": (270, 200, 2, 1, runs(270, 200, whole=True)),
    "lifetimes": (
        130,
        140,
        1,
        1,
        IntervalMask.full(130, 140).with_key_lifetime(
            torch.arange(140).int()[None, None] // 2, torch.arange(140).int()[None, None] + 30
        ),
    ),
}


CAPPED = ("causal, more keys", "window wider than a tile", "planned, whole tiles", "lifetimes")
QUICK = ("window wider than a tile", "sinks", "planned, whole tiles", "lifetimes")


@backend_params("interval_attention", "triton")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(pytest.param(n, torch.float32, marks=[pytest.mark.quick] * (n in QUICK), id=n) for n in CASES),
        ("causal", torch.bfloat16),
        ("planned, whole tiles", torch.bfloat16),
    ],
)
def test_tiles(name: str, dtype: torch.dtype, backend: str) -> None:
    check(name, dtype, backend)


@backend_params("interval_attention", "triton")
@pytest.mark.parametrize("name", CAPPED)
def test_caps_and_slopes_in_tiles(name: str, backend: str) -> None:
    heads = CASES[name][2]
    check(name, torch.float32, backend, softcap=0.6, alibi_slopes=torch.linspace(0.02, -0.01, heads), scale=0.4)


def check(name: str, dtype: torch.dtype, backend: str, **options: Any) -> None:
    """Results and gradients, against the reference in float64."""
    tq, tk, heads, kv_heads, mask = CASES[name]
    sampler = Sampler(dtype)
    args: list[torch.Tensor] = [sampler.normal(1, n, h, 16) for n, h in ((tq, heads), (tk, kv_heads), (tk, kv_heads))]
    results = []
    for which, tensors in ((backend, args), ("reference", [x.double() for x in args])):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out: Any = subquad.interval_attention(*leaves, mask, return_lse=True, backend=which, **options)
        seen = out[1] != -torch.inf
        upstream = torch.randn(out[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(out[0].dtype)
        loss = (out[0] * upstream).sum() + out[1][seen].sum()
        results.append([out[0], out[1][seen], *torch.autograd.grad(loss, leaves)])
    for actual, expected in zip(*results, strict=True):
        limit = (2e-5 if dtype is torch.float32 else 3e-2) * max(1.0, float(expected.abs().max()))
        assert float((actual.double() - expected).abs().max()) <= limit


def far_apart(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x with its tokens (1) or heads (2), the last of which begins beyond element 2^31; only touched pages take memory."""
    near, far = x.shape[3 - dim] * x.shape[3], 2**31 // (x.shape[dim] - 1) + 16
    memory = torch.empty((x.shape[dim] - 1) * far + near, dtype=x.dtype)
    strides = (0, far, x.shape[3], 1) if dim == 1 else (0, x.shape[3], far, 1)
    return memory.as_strided(x.shape, strides).copy_(x)


@backend_params("interval_attention", "triton")
@pytest.mark.parametrize("dim", [1, 2], ids=["tokens", "heads"])
def test_offsets_beyond_32_bits(dim: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    torch.use_deterministic_algorithms(False)  # poisoning would touch it

    # The interpreter copies whole storages to the host and back; these are on the host, and too large to copy.
    monkeypatch.setattr(GridExecutor, "_init_args_hst", lambda self, args, kwargs: (args, kwargs))
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    args = [Sampler(torch.bfloat16, seed=i).normal(1, 5, 3, 16) for i in range(3)]
    results = []
    for tensors in (args, [far_apart(x, dim) for x in args]):
        leaves = [x.requires_grad_() for x in tensors]
        out = subquad.interval_attention(*leaves, IntervalMask.causal(), backend=backend)
        assert isinstance(out, torch.Tensor)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@backend_params("interval_attention", "triton")
def test_tiles_of_a_plan_have_one_size(backend: str) -> None:
    """Kernels may not import subquad: they repeat the sizes."""
    from subquad.kernels.interval_attention import tiles

    assert (tiles.PLAN_Q.value, tiles.PLAN_K.value) == (plan.PLAN_Q, plan.PLAN_K)


@backend_params("interval_attention", "triton")
@pytest.mark.parametrize(("where", "softcap"), [("k", 0.0), ("v", 0.0), ("q", 0.0), ("q", 2.0)])
def test_nan_in_several_tiles(where: str, softcap: float, backend: str) -> None:
    """In tiles seen in part and wholly, planned and plain: the rows that see it, and no gradient of a key they do not."""
    for mask in (IntervalMask.causal(), runs(150, 150, whole=True)):
        dense = mask.to_dense(150, 150)[0, 0]
        for at in (3, 100):
            args = dict(zip("qkv", (Sampler(seed=i).normal(1, 150, 1, 8) for i in range(3)), strict=True))
            args[where][0, at, 0, 5] = float("nan")
            leaves = {n: x.requires_grad_() for n, x in args.items()}
            out = subquad.interval_attention(**leaves, mask=mask, softcap=softcap, backend=backend)
            assert isinstance(out, torch.Tensor)
            reached = dense[:, at] if where != "q" else (torch.arange(150) == at) & dense.any(1)
            assert torch.equal(out.isnan().any(-1).any(-1)[0], reached)
            grads = torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
            assert not grads[0][0, ~reached].isnan().any()
            hidden = ~dense[reached].any(0)
            assert not grads[1][0, hidden].isnan().any() and not grads[2][0, hidden].isnan().any()


@pytest.mark.quick
@backend_params("interval_attention", "triton")
def test_intervals_with_queries_of_their_own_have_tiles_of_their_own(backend: str) -> None:
    """Sinks in the first tile of keys, the window in others: each interval is seen through its own query alone."""
    rope = subquad.RopeSpec(torch.tensor([1.0, 0.1]), 4)
    args = [Sampler(seed=i).normal(1, 2 * plan.PLAN_K + 30, 1, 8) for i in range(3)]
    results = []
    for which, tensors in ((backend, args), ("reference", [x.double() for x in args])):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = subquad.sink_attention(*leaves, sink_tokens=3, window=20, q_shift=rope, backend=which)
        assert isinstance(out, torch.Tensor)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected, atol=2e-5, rtol=1e-4)
