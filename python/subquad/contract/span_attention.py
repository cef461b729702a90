"""Contract of attention to spans."""

from __future__ import annotations

from typing import Any

import torch

from ._contract import Contract, Operator, new_like, new_like_or_empty

MAX_HEAD_DIM = 256

_ARGS = (
    "Tensor q, Tensor k, Tensor v, Tensor start, Tensor end, Tensor? gate, Tensor? base_out, Tensor? base_lse, "
    "Tensor? key_mask"
)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor, end: torch.Tensor, gate: Any, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    softmaxes = 1 if gate is None else start.shape[3]
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty((*q.shape[:3], softmaxes), dtype=torch.float32)


def _backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    gate: torch.Tensor | None,
    base_out: torch.Tensor | None,
    base_lse: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, ...]:
    small = [new_like_or_empty(x, lse) for x in (gate, base_lse)]
    return (*map(new_like, (q, k, v)), small[0], new_like_or_empty(base_out, q), small[1])


CONTRACT = Contract(
    {
        "span_attention_fwd": Operator(
            f"({_ARGS}, Tensor? block_table, float scale) -> (Tensor, Tensor)",
            _forward,
            outputs=("out", "lse"),
            backward="span_attention_bwd",
            differentiable=("q", "k", "v", "gate", "base_out", "base_lse"),
            strided=("q", "k", "v"),
        ),
        "span_attention_bwd": Operator(
            f"(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, {_ARGS}, float scale) -> "
            "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
            _backward,
            strided=("q", "k", "v"),
            cuda=False,
        ),
    },
    few=16,  # the CUDA C++ kernel splits the spans
    family="superlinear",
)
