"""Interval attention with the largest numbers: biases and sinks that mask by finfo.min, scores near the end of float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import subquad
from subquad import IntervalMask
from subquad.testing import Sampler, backend_params

KERNELS = ("native", "simt", "triton")
LARGEST = torch.finfo(torch.float32).max
KEYS = 37
EVEN = torch.arange(KEYS) % 2 == 0
FIRST = torch.arange(KEYS) < 9

# (bias, sinks of two heads)
CASES: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]] = {
    "all lowest": (torch.full((KEYS,), -LARGEST), None),
    "all highest": (torch.full((KEYS,), LARGEST), None),
    "some lowest": (torch.where(EVEN, -LARGEST, 0.5), None),
    "some highest": (torch.where(EVEN, LARGEST, 0.5), None),
    "lowest before the rest": (torch.where(FIRST, -LARGEST, 0.0), None),
    "lowest or infinite": (torch.where(EVEN, -LARGEST, -torch.inf), None),
    "two large ones": (torch.where(EVEN, -3e38, -2e38), None),
    "neighbours": (torch.where(EVEN, -LARGEST, float(torch.tensor(-LARGEST).nextafter(torch.tensor(0.0)))), None),
    "lowest of bfloat16": (torch.full((KEYS,), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16), None),
    "lowest of float16": (torch.full((KEYS,), torch.finfo(torch.float16).min, dtype=torch.float16), None),
    "lowest of float64": (torch.full((KEYS,), torch.finfo(torch.float64).min, dtype=torch.float64), None),
    "sinks": (None, torch.tensor([LARGEST, -LARGEST])),
    "sinks among biases": (torch.full((KEYS,), -LARGEST), torch.tensor([-LARGEST, -3e38])),
    "sinks above biases": (torch.full((KEYS,), -LARGEST), torch.tensor([3e38, 0.0])),
    "sinks below biases": (torch.full((KEYS,), -2e38), torch.tensor([-LARGEST, -torch.inf])),
}


def results(
    backend: str, rows: int, name: str, mask: IntervalMask, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """out, lse and the gradients of q, k, v, bias and sinks, through both."""
    sampler = Sampler(dtype)
    q, k, v = (sampler.normal(2, t, 2, 8).requires_grad_() for t in (rows, KEYS, KEYS))
    bias, sinks = (None if x is None else x.clone().requires_grad_() for x in CASES[name])
    options: dict[str, Any] = {"key_bias": bias, "sink_logits": sinks, "return_lse": True, "backend": backend}
    out, lse = subquad.interval_attention(q, k, v, mask, **options)
    upstream = [Sampler(seed=i).normal(*x.shape).to(x.dtype) for i, x in enumerate((out, lse))]
    leaves = [x for x in (q, k, v, bias, sinks) if x is not None]
    seen = torch.where(lse == -torch.inf, 0.0, lse)  # a row that sees nothing
    return [out, lse, *torch.autograd.grad((out, seen), leaves, upstream)]


@backend_params("interval_attention", *KERNELS)
@pytest.mark.parametrize("rows", [1, 11])
@pytest.mark.parametrize("name", CASES)
def test_largest_biases_and_sinks(name: str, rows: int, backend: str) -> None:
    """As the float32 reference, which works in natural units; times log2 e these numbers would overflow."""
    for mask in (IntervalMask.full(), IntervalMask.causal()):
        actual, expected = (results(b, rows, name, mask) for b in (backend, "reference"))
        limit = 2e-5 if "float16" not in name or "bfloat16" in name else 1e-2  # a sum of 65504 is rounded at 2^-8
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, atol=limit, rtol=limit)


@backend_params("interval_attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 11])
def test_a_row_of_lowest_biases_is_that_of_none(rows: int, dtype: torch.dtype, backend: str) -> None:
    """The mean of the values, as in scaled_dot_product_attention: the scores are lost beside 3e38. Its gradients too."""
    out, lse, _dq, _dk, dv, *_ = results(backend, rows, "all lowest", IntervalMask.full(), dtype)
    sampler = Sampler(dtype)
    q, k, v = (sampler.normal(2, t, 2, 8).transpose(1, 2) for t in (rows, KEYS, KEYS))
    if dtype is not torch.float16:  # whose lowest number is near enough to see scores beside
        mask = torch.full((rows, KEYS), torch.finfo(dtype).min, dtype=dtype)
        expected = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-2)
    torch.testing.assert_close(out.float(), v.float().mean(2)[:, None].expand_as(out), atol=2e-3, rtol=2e-2)
    assert bool((lse == -LARGEST).all())
    upstream = Sampler(seed=0).normal(*out.shape).to(dtype).float()
    torch.testing.assert_close(dv.float(), (upstream.sum(1, keepdim=True) / KEYS).expand_as(dv), atol=2e-2, rtol=2e-2)


@backend_params("interval_attention")
@pytest.mark.parametrize("rows", [1, 11])
def test_scores_near_the_end_of_float32(rows: int, backend: str) -> None:
    """Products up to 3.2e38, between that and the largest float times ln 2: the first of the best keys share the weight."""
    q = torch.full((1, rows, 1, 1), 1.8e19)
    k = torch.tensor([1.8e19, 1.7e19, -1.8e19, 1.8e19, 1.0]).view(1, 5, 1, 1)
    v = torch.tensor([3.0, 100.0, 200.0, 5.0, 300.0]).view(1, 5, 1, 1).requires_grad_()
    out, lse = subquad.interval_attention(q, k, v, IntervalMask.full(), scale=1.0, return_lse=True, backend=backend)
    torch.testing.assert_close(out, torch.full_like(out, 4.0))
    torch.testing.assert_close(lse, torch.full_like(lse, 3.24e38))
    (grad,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(grad.flatten(), rows * torch.tensor([0.5, 0.0, 0.0, 0.5, 0.0]))


@backend_params("interval_attention", *KERNELS)
def test_the_cap_is_accurate(backend: str) -> None:
    """One key, whose score the log-sum-exp is: tanh to a few units in the last place, also near 0, and NaN for NaN alone."""
    x = torch.cat([torch.logspace(-30, 2, 300), torch.linspace(0.5, 0.75, 101), torch.tensor([0.0, 3e38, torch.inf])])
    x = torch.cat([x, -x, torch.tensor([torch.nan])])
    one = torch.ones(1, 1, 1, 1)
    for softcap in (1.0, 2.0**-20, 2.0**20):
        q = (x * softcap).view(1, -1, 1, 1)
        options: dict[str, Any] = {"scale": 1.0, "softcap": softcap, "return_lse": True, "backend": backend}
        _, lse = subquad.interval_attention(q, one, one, IntervalMask.full(), **options)
        expected = torch.tanh(q.double() / softcap).flatten() * softcap
        torch.testing.assert_close(lse.double().flatten(), expected, rtol=5e-7, atol=0.0, equal_nan=True)
