"""Contract of gated linear attention and of its step."""

from __future__ import annotations

from typing import Any

import torch

from ._contract import Contract, Operator, new_like, new_like_or_empty

MAX_HEAD_DIM = 256

_ARGS = (
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? s0, Tensor? z0, Tensor? cu_seqlens, float scale, float eps, "
    "bool normalize"
)


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    s0: torch.Tensor | None,
    z0: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    eps: float,
    normalize: bool,
) -> tuple[torch.Tensor, ...]:
    b, t, heads, width = q.shape
    states = max(k.shape[2], v.shape[2], 1 if g is None else g.shape[2])
    count = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = q.new_empty((), dtype=torch.float32)
    den = wide.new_empty((b if normalize else 0, t, heads))
    z = wide.new_empty((count if normalize else 0, states, width))
    return q.new_empty((b, t, heads, v.shape[3])), den, wide.new_empty((count, states, width, v.shape[3])), z


def _local(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, ...]:
    o, den, s, z = _forward(q, k, v, g, *rest)
    sums = den.new_empty((0 if o.dtype is torch.float32 else o.shape[0], *o.shape[1:]))
    return o, den, s, z, sums, s.new_empty(s.shape[:3]), s.new_empty(s.shape[:2], dtype=torch.int64)


def _backward(
    grad_o: torch.Tensor,
    grad_s: torch.Tensor,
    grad_z: torch.Tensor | None,
    den: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    s0: torch.Tensor | None,
    z0: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, ...]:
    states, width, columns = grad_s.shape[1:]
    ds0 = grad_s.new_empty((0, states, width, columns)) if s0 is None else new_like(s0)
    dz0 = grad_s.new_empty((0, states, width)) if z0 is None else new_like(z0)
    return (*map(new_like, (q, k, v)), new_like_or_empty(g, grad_s), ds0, dz0)


CONTRACT = Contract(
    {
        # q may have no heads: then the tokens are walked for the states alone, which nobody differentiates.
        "gated_linear_attention_fwd": Operator(
            f"({_ARGS}) -> (Tensor, Tensor, Tensor, Tensor)",
            _forward,
            outputs=("o", "den", "s", "z"),
            backward="gated_linear_attention_bwd",
            differentiable=("q", "k", "v", "g", "s0", "z0"),
            switches={"z": "normalize"},
            strided=("q", "k", "v", "g"),
        ),
        # For sequences that are continued, on a CPU: a forward that knows nothing of what enters, and that added afterwards. Of
        # packed sequences the first is continued, else all. `sums`, in float32 o itself, are numerators where the decays of
        # all tokens so far are not all 0, for the first `reach` tokens; den lacks as much there.
        "gated_linear_attention_local_fwd": Operator(
            f"({_ARGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
            _local,
            outputs=("o", "den", "s", "z", "sums", "decay", "reach"),
            strided=("q", "k", "v", "g"),
            cuda=False,
            triton=False,
        ),
        "gated_linear_attention_enter_": Operator(
            "(Tensor(a!) o, Tensor(b!) den, Tensor sums, Tensor reach, Tensor q, Tensor? g, Tensor s0, Tensor? z0, float scale, "
            "float eps) -> ()",
            lambda *_: None,
            outputs=(),
            strided=("q", "g"),
            cuda=False,
            triton=False,
        ),
        "gated_linear_attention_bwd": Operator(
            f"(Tensor grad_o, Tensor grad_s, Tensor? grad_z, Tensor den, {_ARGS}) -> "
            "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
            _backward,
            cuda=False,
        ),
        "gated_linear_attention_step_": Operator(
            "(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor(a!) state, Tensor(b!)? z, Tensor? state_indices, "
            "float scale, float eps) -> Tensor",
            lambda q, k, v, *_: q.new_empty((*q.shape[:2], v.shape[2])),
            outputs=("o",),
        ),
    },
    few=64,  # the CUDA C++ kernel walks token by token
    family="lawcat",
)
