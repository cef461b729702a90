"""The peers' convolutions with arguments of several dtypes: Mamba keeps weights in float32 beside bfloat16 inputs."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import subquad.compat.causal_conv1d
import subquad.compat.fla
from subquad.testing import Sampler

DTYPES = (torch.bfloat16, torch.float16)


def tensors(dtype: torch.dtype, batch: int = 2, time: int = 9) -> tuple[torch.Tensor, ...]:
    """x [B, T, D] narrow; weight [D, W] and bias [D] that no narrow dtype holds."""
    sampler = Sampler()
    x = sampler.normal(batch, time, 5).to(dtype)
    return x, sampler.normal(5, 4), sampler.normal(5)


def dao(x: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
    y = subquad.compat.causal_conv1d.causal_conv1d_fn(x.transpose(1, 2), *rest, **options)
    assert isinstance(y, torch.Tensor)
    return y.transpose(1, 2)


def fla(x: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
    return subquad.compat.fla.causal_conv1d(x, *rest, **options)[0]


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("narrow_bias", [False, True])
@pytest.mark.parametrize("function", [dao, fla])
def test_float32_weights_are_not_rounded(function: Any, narrow_bias: bool, dtype: torch.dtype, cast: bool) -> None:
    """The float32 result, rounded once; gradients in the dtypes of their arguments. Autocast does not round weights either."""
    x, weight, bias = tensors(dtype)
    bias = bias.to(dtype) if narrow_bias else bias
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    wide = [t.float().clone().requires_grad_() for t in (x, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16) if cast else contextlib.nullcontext():
        y = function(*leaves, activation="silu")
    expected, _ = subquad.causal_conv1d(*wide, activation="silu")
    assert y.dtype is dtype
    assert torch.equal(y, expected.to(dtype))
    upstream = Sampler(dtype, seed=3).normal(*y.shape)
    grads = torch.autograd.grad(y, leaves, upstream)
    for name, leaf, grad, other in zip(
        ("x", "weight", "bias"), leaves, grads, torch.autograd.grad(expected, wide, upstream.float()), strict=True
    ):
        assert grad.dtype is leaf.dtype, name
        assert torch.equal(grad, other.to(leaf.dtype)), name
    assert not torch.equal(y, function(x, weight.to(dtype), bias.to(dtype), activation="silu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_beside_float32_weights(dtype: torch.dtype) -> None:
    """Whole sequences and their final states, then steps, in a pool, in a ring: raw inputs in x's dtype, to the bit."""
    conv = subquad.compat.causal_conv1d
    x, weight, bias = tensors(dtype)
    wide, _ = subquad.causal_conv1d(x.float(), weight, bias)
    for ring in (False, True):
        pool = torch.full((4, 5, 3), torch.nan, dtype=dtype)
        places = torch.tensor([2, 0], dtype=torch.int32)
        pool[places.long()] = 0.0
        for t in range(x.shape[1]):
            y = conv.causal_conv1d_update(
                x[:, t], pool, weight, bias, conv_state_indices=places,
                cache_seqlens=torch.full((2,), t, dtype=torch.int32) if ring else None,
            )  # fmt: skip
            assert y.dtype is dtype and torch.equal(y, wide[:, t].to(dtype))
        assert pool.dtype is dtype and pool[[1, 3]].isnan().all()
        assert torch.equal(pool[places.long()], x[:, -3:].transpose(1, 2))
    result = conv.causal_conv1d_fn(x.transpose(1, 2), weight, bias, return_final_states=True)
    assert torch.equal(result[1], x[:, -3:].transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_of_fla_beside_float32_weights(dtype: torch.dtype) -> None:
    x, weight, bias = tensors(dtype)
    wide, _ = subquad.causal_conv1d(x.float(), weight, bias)
    cache = torch.zeros(2, 5, 4, dtype=dtype)
    for t in range(x.shape[1]):
        y, cache = subquad.compat.fla.causal_conv1d_update(x[:, t], cache, weight=weight, bias=bias)
        assert y.dtype is dtype and torch.equal(y, wide[:, t].to(dtype))


def test_what_is_no_float_is_refused_by_name() -> None:
    x, weight, bias = tensors(torch.bfloat16)
    for wrong in ((x, weight.int(), bias), (x, weight, bias.int()), (x.int(), weight, bias)):
        with pytest.raises(TypeError, match=r"^(x|weight|bias): expected"):
            fla(*wrong)


def test_float64_states_of_linear_attention() -> None:
    q, k, v = (Sampler(torch.float64).normal(1, 5, 2, 8) for _ in range(3))
    state = torch.zeros(1, 2, 8, 8)
    o, final = subquad.compat.fla.chunk_gla(
        q, k, v, -torch.ones(1, 5, 2, 8), initial_state=state, output_final_state=True
    )
    assert o.dtype is torch.float64 and final.dtype is torch.float64


@pytest.mark.parametrize("index", [(3, 3, 3, 1, 1, 1, 1, 2, 2), (1, 1, 0, 0, 0, 1, 1, 1, 1)])
def test_any_change_of_the_number_begins_a_sequence(index: tuple[int, ...]) -> None:
    """Also to a smaller number, or to one that was there before."""
    x, weight, bias = tensors(torch.float32)
    ids = torch.tensor([index, (0,) * 9], dtype=torch.int32)
    found = dao(x, weight, bias, seq_idx=ids)
    lengths = ids[0].unique_consecutive(return_counts=True)[1].tolist()
    alone = [dao(part, weight, bias) for part in x[:1].split(lengths, 1)]
    torch.testing.assert_close(found, torch.cat([torch.cat(alone, 1), dao(x[1:], weight, bias)]))


@pytest.mark.parametrize("returned", [False, True])
def test_final_states_are_written_where_the_caller_says(returned: bool) -> None:
    x, weight, bias = tensors(torch.float32)
    out = torch.full((2, 3, 5), torch.nan).transpose(1, 2)
    result = subquad.compat.causal_conv1d.causal_conv1d_fn(
        x.transpose(1, 2), weight, bias, return_final_states=returned, final_states_out=out
    )
    assert torch.equal(out, x[:, -3:].transpose(1, 2))
    assert result[1] is out if returned else isinstance(result, torch.Tensor)


def test_memory_for_final_states_is_checked_first() -> None:
    x, weight, bias = tensors(torch.float32)
    freed = torch.zeros(2, 5, 3)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"^final_states_out: expected a tensor with memory"):
        dao(x, weight, bias, final_states_out=freed)
    with pytest.raises(TypeError, match=r"^final_states_out: expected a torch\.Tensor, got list"):
        dao(x, weight, bias, final_states_out=[freed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_have_memory_of_their_own(dtype: torch.dtype) -> None:
    """Also where a copy of them is advanced, for the weights have another dtype."""
    weight, state = torch.ones(5, 4, dtype=dtype), torch.zeros(2, 5, 4)
    for wrong, x in ((state, state[..., 0]), (state[:1].expand(2, 5, 4), torch.zeros(2, 5))):
        with pytest.raises(ValueError, match=r"^conv_state: expected (memory|elements) of"):
            subquad.compat.causal_conv1d.causal_conv1d_update(x, wrong, weight)


def test_what_is_no_tensor_is_refused_by_name() -> None:
    x, rows, peers = torch.zeros(1, 5, 2, 8), torch.zeros(2, 5), subquad.compat.fla
    calls = {
        "q": lambda: peers.chunk_gla([1], x, x, x),
        "g": lambda: peers.chunk_gla(x, x, x, [1]),
        "initial_state": lambda: peers.chunk_gla(x, x, x, x, initial_state="zero"),
        "cu_seqlens": lambda: peers.fused_recurrent_gla(x, x, x, x, cu_seqlens=[0, 5], reverse=True),
        "g_gamma": lambda: peers.chunk_simple_gla(x, x, x, g_gamma=[1.0]),
        "x": lambda: peers.causal_conv1d_update([1], torch.zeros(2, 5, 3), weight=torch.ones(5, 3)),
        "residual": lambda: peers.causal_conv1d_update(rows, torch.zeros(2, 5, 3), [1], torch.ones(5, 3)),
        "seq_idx": lambda: dao(torch.zeros(1, 4, 5), torch.ones(5, 3), seq_idx=torch.zeros(1, 4)),
    }
    for name, wrong in calls.items():
        with pytest.raises(TypeError, match=rf"^{name}: expected"):
            wrong()
