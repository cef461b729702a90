"""Contract of the product with quantised weights."""

from __future__ import annotations

from typing import Any

import torch

from ._contract import Contract, Operator

MAX_FEW = 16  # tokens up to which a call streams the codes; more of them meet panels of dequantised rows


def _forward(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _backward(grad_y: torch.Tensor, weight: torch.Tensor, columns: int, _format: int) -> torch.Tensor:
    return grad_y.new_empty((grad_y.shape[0], columns))


CONTRACT = Contract(
    {
        "quantised_linear_fwd": Operator(
            "(Tensor x, Tensor weight, Tensor? bias, int columns, int format) -> Tensor",
            _forward,
            outputs=("y",),
            backward="quantised_linear_bwd",
            differentiable=("x", "bias"),
        ),
        "quantised_linear_bwd": Operator(
            "(Tensor grad_y, Tensor weight, int columns, int format) -> Tensor", _backward
        ),
    },
    few=MAX_FEW,
)
