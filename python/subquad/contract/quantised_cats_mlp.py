"""Contract of the CATS gated MLP on quantised weights."""

from __future__ import annotations

from typing import Any

import torch

from ._contract import Contract, Operator, new_like


def _forward(x: torch.Tensor, w_gate: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return new_like(x), x.new_empty((*x.shape[:-1], w_gate.shape[0]), dtype=torch.bool)


CONTRACT = Contract(
    {
        "quantised_cats_mlp_fwd": Operator(
            "(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor? down_scales, Tensor threshold, Tensor? b_gate, "
            "Tensor? b_up, Tensor? b_down, int gate_format, int up_format, int down_format, int activation, bool inclusive, "
            "bool union_mask) -> (Tensor, Tensor)",
            _forward,
            outputs=("y", "mask"),
            differentiable=("x", "b_gate", "b_up", "b_down"),
        )
    },
    # A few tokens read codes and little else: CUDA C++ leads.
    cuda=("native", "triton", "reference"),
    trained_by="cats_activation",
)
