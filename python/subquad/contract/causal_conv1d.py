"""Contract of the causal convolution and of its step."""

from __future__ import annotations

from typing import Any

import torch

from ._contract import Contract, Operator, new_like, new_like_or_empty

MAX_TAPS = 8

_ARGS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, {}Tensor? cu_seqlens, Tensor? sequence, "
    "int groups, int head_dim, bool silu"
)


def _forward(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, state: Any, residual: Any, cu_seqlens: Any, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`final_state` is empty unless it was asked for, which is the last argument."""
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = (sequences, x.shape[2], weight.shape[1] - 1) if rest[-1] else (0,)
    return x.new_empty((*x.shape[:2], weight.shape[0])), x.new_empty(final)


def _backward(
    grad_y: torch.Tensor, grad_final: Any, x: torch.Tensor, weight: torch.Tensor, bias: Any, state: Any, *_: Any
) -> tuple[torch.Tensor, ...]:
    return (*map(new_like, (x, weight)), *(new_like_or_empty(a, x) for a in (bias, state)))


CONTRACT = Contract(
    {
        "causal_conv1d_fwd": Operator(
            f"({_ARGS.format('Tensor? residual, ')}, bool output_final_state) -> (Tensor, Tensor)",
            _forward,
            outputs=("y", "final"),
            backward="causal_conv1d_bwd",
            differentiable=("x", "weight", "bias", "initial_state", "residual"),
            switches={"final": "output_final_state"},
            strided=("x", "residual"),
        ),
        "causal_conv1d_bwd": Operator(
            f"(Tensor grad_y, Tensor? grad_final, {_ARGS.format('')}) -> (Tensor, Tensor, Tensor, Tensor)", _backward
        ),
        "causal_conv1d_update_": Operator(
            "(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor? residual, Tensor? cache_seqlens, "
            "Tensor? conv_state_indices, int groups, int head_dim, bool silu) -> Tensor",
            lambda x, conv_state, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
            outputs=("y",),
            as_given=("conv_state",),
        ),
    },
    # It moves memory and multiplies little.
    cuda=("native", "triton", "reference"),
    family="lawcat",
)
