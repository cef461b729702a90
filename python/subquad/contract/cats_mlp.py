"""Contract of the CATS gated MLP."""

from __future__ import annotations

from ._contract import Contract, Operator, new_like

MAX_SPARSE_TOKENS = 16
MAX_UNION_TOKENS = 256  # of the CPU kernel with a union mask, which sees that many tokens at a time


def most_tokens(backend: str, device: str, union: bool, limit: int) -> int | None:
    """Up to how many tokens the operator is called, None for any number; dense products compute the rest.

    The CPU kernel has a dense path of its own. The others have none and are for `limit` tokens, at most MAX_SPARSE_TOKENS.
    """
    if backend == "native" and device == "cpu":
        return MAX_UNION_TOKENS if union else None
    return limit


CONTRACT = Contract(
    {
        "cats_mlp_fwd": Operator(
            "(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor threshold, Tensor? b_gate, Tensor? b_up, "
            "Tensor? b_down, int activation, bool inclusive, bool union_mask) -> Tensor",
            lambda x, *_: new_like(x),
            differentiable=("x", "w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down"),
            as_given=("w_gate", "w_up", "w_down", "threshold"),
        )
    },
    # One token reads weights and little else: CUDA C++ leads.
    cuda=("native", "triton", "reference"),
    trained_by="cats_activation",
)
