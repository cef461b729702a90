"""Contract of interval attention."""

from __future__ import annotations

from typing import Any

import torch

from ._contract import Contract, Operator, new_like

MAX_HEAD_DIM = 512

_MASK = ("starts", "ends", "key_start", "key_stop")
_ARGS = (
    "Tensor q, Tensor k, Tensor v, Tensor? starts, Tensor? ends, Tensor? key_start, Tensor? key_stop, int sink_tokens, "
    "int window, bool causal, Tensor? key_bias, Tensor? sink_logits, Tensor? alibi_slopes, float scale, float softcap, "
    "Tensor[] plan"
)


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    b, t, h = q.shape[:3]
    lse = q.new_empty((b, t, h), dtype=torch.float32)
    return q.new_empty((b, t, h, v.shape[3])), lse, lse.new_empty((b, t, h, 2))


def _backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *mask: Any,
) -> tuple[torch.Tensor, ...]:
    key_bias = mask[7]
    dkey_bias = (q.shape[0], q.shape[2], k.shape[1]) if key_bias is not None else (0,)
    return (*map(new_like, (q, k, v)), grad_lse.new_empty(dkey_bias), new_like(grad_lse))


CONTRACT = Contract(
    {
        "interval_attention_fwd": Operator(
            f"({_ARGS}) -> (Tensor, Tensor, Tensor)",
            _forward,
            outputs=("out", "lse", "stats"),  # stats: largest score and log of the sum, whose sum lse is
            backward="interval_attention_bwd",
            differentiable=("q", "k", "v", "key_bias", "sink_logits"),
            strided=("q", "k", "v"),
            as_given=_MASK,
        ),
        "interval_attention_bwd": Operator(
            f"(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor stats, {_ARGS}) -> "
            "(Tensor, Tensor, Tensor, Tensor, Tensor)",
            _backward,
            outputs=("dq", "dk", "dv", "dkey_bias", "delta"),
            cuda=False,
        ),
    },
    few=16,  # the CUDA C++ kernel splits the keys, Triton's the rows
)
