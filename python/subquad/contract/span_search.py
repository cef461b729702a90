"""Contract of the search for spans."""

from __future__ import annotations

from typing import Any

import torch

from ._contract import Contract, Operator, new_like

MAX_HEAD_DIM = 256

_ARGS = (
    "Tensor q_search, Tensor k, Tensor position, Tensor first, Tensor last, Tensor back, Tensor ahead, Tensor offsets, "
    "Tensor? key_mask, Tensor? block_table, int num_spans, float scale, bool per_group"
)


def _forward(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    shape = (*q.shape[:3], rest[9])
    places = [q.new_empty(shape, dtype=torch.int32) for _ in range(3)]
    return (q.new_empty(shape, dtype=torch.float32), *places)


def _backward(
    grad_score: torch.Tensor, anchor: torch.Tensor, q: torch.Tensor, k: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return new_like(q), new_like(k)


CONTRACT = Contract(
    {
        "span_search_fwd": Operator(
            f"({_ARGS}) -> (Tensor, Tensor, Tensor, Tensor)",
            _forward,
            outputs=("score", "anchor", "start", "end"),
            backward="span_search_bwd",
            differentiable=("q_search", "k"),
            strided=("q_search", "k"),
        ),
        "span_search_bwd": Operator(
            "(Tensor grad_score, Tensor anchor, Tensor q_search, Tensor k, float scale) -> (Tensor, Tensor)",
            _backward,
            strided=("q_search", "k"),
            cuda=False,
        ),
    },
    few=16,  # the CUDA C++ kernel splits the stripes
    family="superlinear",
)
