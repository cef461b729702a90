"""Contract of the thresholded activation and the thresholded gated unit."""

from __future__ import annotations

from ._contract import Contract, Operator, new_like

_THRESHOLD = "Tensor threshold, int activation, bool inclusive"

CONTRACT = Contract(
    {
        "cats_activation_fwd": Operator(
            f"(Tensor z, {_THRESHOLD}) -> Tensor",
            lambda z, *_: new_like(z),
            outputs=("a",),
            backward="cats_activation_bwd",
            differentiable=("z",),
            as_given=("threshold",),
        ),
        "cats_activation_bwd": Operator(
            f"(Tensor grad_a, Tensor z, {_THRESHOLD}, bool straight_through) -> Tensor",
            lambda grad_a, z, *_: new_like(z),
        ),
        "cats_glu_fwd": Operator(f"(Tensor z, Tensor u, {_THRESHOLD}) -> Tensor", lambda z, u, *_: new_like(u)),
        "cats_glu_bwd": Operator(
            f"(Tensor grad_h, Tensor z, Tensor u, {_THRESHOLD}, bool straight_through) -> (Tensor, Tensor)",
            lambda grad_h, z, u, *_: (new_like(z), new_like(u)),
        ),
    }
)
