"""Contract of the feature maps."""

from __future__ import annotations

import torch

from ._contract import Contract, Operator, new_like, new_like_or_empty

MAX_DIM = 256

_ARGS = "Tensor x, Tensor? weight, int kind, bool fullspace, float eps"


def _forward(x: torch.Tensor, weight: torch.Tensor | None, kind: int, fullspace: bool, eps: float) -> torch.Tensor:
    width = x.shape[3] if weight is None else weight.shape[2]
    return x.new_empty((*x.shape[:3], 2 * width if fullspace else width))


CONTRACT = Contract(
    {
        "feature_map_fwd": Operator(
            f"({_ARGS}) -> Tensor",
            _forward,
            backward="feature_map_bwd",
            differentiable=("x", "weight"),
            strided=("x",),
        ),
        "feature_map_bwd": Operator(
            f"(Tensor grad_out, {_ARGS}) -> (Tensor, Tensor)",
            lambda grad_out, x, weight, *_: (new_like(x), new_like_or_empty(weight, x)),
        ),
    },
    family="lawcat",
)
