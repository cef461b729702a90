"""The linear attention functions of flash-linear-attention, by name and argument, on our operators.

Shapes are FLA's [B, T, H, D]. Where ours can do more (grouped heads, gradients of every state, CPU tensors), these can too.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..ops.gated_linear_attention import State, gated_linear_attention

Result = tuple[torch.Tensor, Any]


def chunk_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    head_first: bool = False,
    state_v_first: bool = False,
) -> Result:
    """Linear attention with a decay per key channel: g [B, T, H, K]. See `subquad.gated_linear_attention`."""
    return _attend(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, head_first, state_v_first)


def fused_recurrent_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gk: torch.Tensor | None = None,
    gv: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    head_first: bool = False,
) -> Result:
    """As `chunk_gla`; `reverse` walks from the last token to the first. A decay per value channel is not supported."""
    if gv is not None:
        raise ValueError("gv: expected None, a decay per value channel is not supported, got a tensor")
    if not reverse:
        return _attend(q, k, v, gk, scale, initial_state, output_final_state, cu_seqlens, head_first)
    if cu_seqlens is not None:
        raise ValueError("reverse: expected False with cu_seqlens, got True")
    q, k, v, gk = (None if x is None else x.flip(1) for x in (q, k, v, gk))  # type: ignore[assignment]
    o, state = _attend(q, k, v, gk, scale, initial_state, output_final_state, None, head_first)
    return o.flip(1), state


def chunk_simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    g_gamma: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    head_first: bool = False,
) -> Result:
    """Linear attention with a decay per head: g [B, T, H], or g_gamma [H], the same at every token."""
    if g_gamma is not None:
        if g is not None:
            raise ValueError("g_gamma: expected None beside g, got a tensor")
        g = g_gamma.float().expand(*q.shape[:2], g_gamma.shape[0])
    return _attend(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, head_first)


def chunk_linear_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    head_first: bool = False,
) -> Result:
    """Linear attention without decay. With `normalize` the state is the pair (S, z [B, 1, H, K])."""
    o, state = _attend(
        q, k, v, None, scale, initial_state, output_final_state, cu_seqlens, head_first, normalize=normalize
    )
    return (o, (state[0], state[1].unsqueeze(1))) if normalize and state is not None else (o, state)


fused_recurrent_simple_gla = chunk_simple_gla
fused_recurrent_linear_attn = chunk_linear_attn
fused_chunk_linear_attn = chunk_linear_attn


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    scale: float | None,
    state: Any,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | None,
    head_first: bool,
    state_v_first: bool = False,
    normalize: bool = False,
) -> Result:
    if head_first:
        warnings.warn("head_first is ignored, as in FLA: tensors are [B, T, H, D]", stacklevel=3)
    if isinstance(state, torch.Tensor):
        state = (state.mT if state_v_first else state).float()
    elif state is not None:
        state = tuple(x.float() for x in state)
    if g is not None and g.dtype is not q.dtype:
        g = g.float()
    o, final = gated_linear_attention(
        q,
        k,
        v,
        g,
        scale=scale,
        initial_state=state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        normalize=normalize,
    )
    if state_v_first and isinstance(final, torch.Tensor):
        final = final.mT.contiguous()
    return o, final


__all__ = [
    "chunk_gla",
    "chunk_linear_attn",
    "chunk_simple_gla",
    "fused_chunk_linear_attn",
    "fused_recurrent_gla",
    "fused_recurrent_linear_attn",
    "fused_recurrent_simple_gla",
]
