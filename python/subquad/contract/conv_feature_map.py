"""Contract of the convolution fused with the feature map."""

from __future__ import annotations

from typing import Any

import torch

from ._contract import Contract, Operator, new_like, new_like_or_empty

_ARGS = (
    "Tensor x, Tensor conv_weight, Tensor fm_weight, Tensor? conv_bias, Tensor? initial_state, Tensor? cu_seqlens, "
    "Tensor? sequence, int groups, bool silu, int kind, bool fullspace, float eps"
)


def _forward(
    x: torch.Tensor,
    conv_weight: torch.Tensor,
    fm_weight: torch.Tensor,
    bias: Any,
    state: Any,
    cu_seqlens: Any,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`final_state` is empty unless it was asked for, which is the last argument."""
    width, f = fm_weight.shape[1:]
    fullspace = rest[-3]
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = (sequences, x.shape[2], conv_weight.shape[1] - 1) if rest[-1] else (0,)
    shape = (*x.shape[:2], conv_weight.shape[0] // width, 2 * f if fullspace else f)
    return x.new_empty(shape), x.new_empty(final)


def _backward(
    grad_phi: torch.Tensor, grad_final: Any, x: torch.Tensor, conv_weight: torch.Tensor, fm_weight: torch.Tensor,
    bias: Any, state: Any, *_: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    return (*map(new_like, (x, conv_weight, fm_weight)), *(new_like_or_empty(a, x) for a in (bias, state)))


CONTRACT = Contract(
    {
        "conv_feature_map_fwd": Operator(
            f"({_ARGS}, bool output_final_state) -> (Tensor, Tensor)",
            _forward,
            outputs=("phi", "final"),
            backward="conv_feature_map_bwd",
            differentiable=("x", "conv_weight", "fm_weight", "conv_bias", "initial_state"),
            switches={"final": "output_final_state"},
            strided=("x",),
        ),
        "conv_feature_map_bwd": Operator(
            f"(Tensor grad_phi, Tensor? grad_final, {_ARGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _backward
        ),
    },
    family="lawcat",
)
