"""Functions of flash-linear-attention (0.6), by name and argument, on our operators.

Shapes are FLA's [B, T, H, D]. Where ours can do more (normalised gates, grouped heads, gradients of every state, packed sequences
in reverse, CPU tensors), these can too. `chunk_size` and `cu_seqlens_cpu` are taken and change nothing: chunks are ours, and
bounds are not read back from a device. What a function of FLA takes and we cannot do raises.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F

from .. import _checks
from ..ops.gated_linear_attention import State, gated_linear_attention
from ._mixed import convolve, update

Result = tuple[torch.Tensor, Any]


def chunk_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    *,
    normalize: bool = False,
    eps: float = 1e-10,
    chunk_size: int | None = None,
    head_first: bool = False,
) -> Result:
    """Linear attention with a decay per key channel: g [B, T, H, K]. See `subquad.gated_linear_attention`.

    Args:
        initial_state: [N, H, K, V], or [N, H, V, K] with `state_v_first`, of any float dtype. With `normalize` the pair
            (S, z [N, 1, H, K] or [N, H, K]), or [N, H, K, V + 1] with z as its last column.

    Returns:
        (o, final state or None); S is float32, and z, the second of a pair with `normalize`, [N, 1, H, K].
    """
    _warn(head_first)
    return _attend(q, k, v, g, scale, initial_state, output_final_state, state_v_first, cu_seqlens, normalize, eps)


def fused_recurrent_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gk: torch.Tensor | None = None,
    gv: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    normalize: bool = False,
    eps: float = 1e-10,
    head_first: bool = False,
) -> Result:
    """As `chunk_gla`; `reverse` walks from the last token of every sequence to its first.

    Raises:
        ValueError: `gv`, a decay per value channel.
    """
    _warn(head_first)
    if gv is not None:
        raise ValueError("gv: expected None, a decay per value channel is not supported, got a tensor")
    return _attend(
        q, k, v, gk, scale, initial_state, output_final_state, state_v_first, cu_seqlens, normalize, eps, reverse
    )


def chunk_simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    g_gamma: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    *,
    normalize: bool = False,
    eps: float = 1e-10,
    chunk_size: int | None = None,
    head_first: bool = False,
) -> Result:
    """Linear attention with a decay per head: g [B, T, H], or g_gamma [H], the same at every token. As `chunk_gla`."""
    _warn(head_first)
    gate = _head_gate(g, g_gamma, q)
    return _attend(q, k, v, gate, scale, initial_state, output_final_state, state_v_first, cu_seqlens, normalize, eps)


def fused_recurrent_simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    g_gamma: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    normalize: bool = False,
    eps: float = 1e-10,
    head_first: bool = False,
) -> Result:
    """As `chunk_simple_gla`; `reverse` walks from the last token of every sequence to its first."""
    _warn(head_first)
    gate = _head_gate(g, g_gamma, q)
    return _attend(
        q, k, v, gate, scale, initial_state, output_final_state, state_v_first, cu_seqlens, normalize, eps, reverse
    )


def fused_chunk_simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    g_gamma: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> Result:
    """`chunk_simple_gla`."""
    return chunk_simple_gla(q, k, v, g, g_gamma, scale, initial_state, output_final_state, cu_seqlens=cu_seqlens)


def chunk_linear_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    *,
    eps: float = 1e-10,
    head_first: bool = False,
) -> Result:
    """Linear attention without decay. With `normalize` the state is the pair (S, z [N, 1, H, K])."""
    _warn(head_first)
    return _attend(q, k, v, None, scale, initial_state, output_final_state, False, cu_seqlens, normalize, eps)


def fused_recurrent_linear_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    eps: float = 1e-10,
    head_first: bool = False,
) -> Result:
    """As `chunk_linear_attn`, but not normalised by default; `reverse` walks from the last token to the first."""
    _warn(head_first)
    return _attend(q, k, v, None, scale, initial_state, output_final_state, False, cu_seqlens, normalize, eps, reverse)


fused_chunk_linear_attn = chunk_linear_attn


def _warn(head_first: bool) -> None:
    if head_first:
        warnings.warn("head_first is ignored, as in FLA: tensors are [B, T, H, D]", stacklevel=3)


def _head_gate(g: torch.Tensor | None, g_gamma: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """g, or g_gamma [H] at every token of q."""
    if g_gamma is None:
        return g
    if g is not None:
        raise ValueError("g_gamma: expected None beside g, got a tensor")
    _checks.tensor("q", q)
    _checks.tensor("g_gamma", g_gamma)
    if g_gamma.dim() != 1:
        raise ValueError(f"g_gamma: expected shape [H], got {list(g_gamma.shape)}")
    return g_gamma.float().expand(*q.shape[:2], g_gamma.shape[0])


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    scale: float | None,
    state: State | None,
    output_final_state: bool,
    state_v_first: bool,
    cu_seqlens: torch.Tensor | None,
    normalize: bool,
    eps: float,
    reverse: bool = False,
) -> Result:
    for name, x in (("q", q), ("k", k), ("v", v), ("g", g)):
        if x is not None or name != "g":
            _checks.tensor(name, x)
    if cu_seqlens is not None:
        _checks.integers("cu_seqlens", cu_seqlens, 1)
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    if isinstance(state, torch.Tensor):
        state = (state.mT if state_v_first else state).to(wide)
    elif state is not None:
        if not (
            isinstance(state, (tuple, list)) and len(state) == 2 and all(isinstance(x, torch.Tensor) for x in state)
        ):
            raise TypeError(f"initial_state: expected a tensor, or a pair of them, got {type(state).__name__}")
        s, z = state
        state = (s.mT if state_v_first else s).to(wide), z.to(wide)
    if g is not None and g.dtype is not q.dtype:
        g = g.to(wide)
    if reverse:  # of all packed sequences at once, which puts them in the opposite order too
        q, k, v, g = (None if x is None else x.flip(1) for x in (q, k, v, g))  # type: ignore[assignment]
        if cu_seqlens is not None:
            cu_seqlens = q.shape[1] - cu_seqlens.flip(0)
            state = _in_opposite_order(state)
    o, final = gated_linear_attention(
        q, k, v, g, scale=scale, initial_state=state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        normalize=normalize, eps=eps,
    )  # fmt: skip
    if reverse:
        o = o.flip(1)
        final = final if cu_seqlens is None else _in_opposite_order(final)
    if isinstance(final, tuple):
        s, z = final
        return o, (s.mT.contiguous() if state_v_first else s, z.unsqueeze(1))
    return o, final.mT.contiguous() if state_v_first and final is not None else final


def _in_opposite_order(state: State | None) -> State | None:
    if state is None or isinstance(state, torch.Tensor):
        return None if state is None else state.flip(0)
    return state[0].flip(0), state[1].flip(0)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    backend: str | None = None,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
) -> Result:
    """The short convolution, see `subquad.causal_conv1d`; `backend` is taken and changes nothing. Dtypes may differ: nothing is
    rounded but y, to x's.

    Returns:
        (y, final state [N, D, W] or None). As in FLA nobody reads the first of its columns; here it is 0.
    """
    y, final = convolve(
        x, weight, bias, initial_state=initial_state, output_final_state=output_final_state, activation=activation,
        residual=residual, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return y, None if final is None else F.pad(final, (1, 0))


def causal_conv1d_update(
    x: torch.Tensor,
    cache: torch.Tensor,
    residual: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> Result:
    """One token for every sequence: x [B, D], [B, 1, D] or [1, B, D]; `cache` [B, D, W] is updated in place.

    Returns:
        (y of the shape of x, cache).
    """
    if weight is None:
        raise TypeError("weight: expected a torch.Tensor, got None")
    for name, given in (("x", x), ("residual", residual)):
        if given is not None or name == "x":
            _checks.tensor(name, given)
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected shape [B, D], [B, 1, D] or [1, B, D], got {list(x.shape)}")
    rows = x.reshape(-1, x.shape[-1])
    more = None if residual is None else residual.reshape(-1, residual.shape[-1])
    with torch.no_grad():
        y = update(rows, cache, weight, bias, residual=more, activation=activation)
    return y.view(x.shape), cache


__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "chunk_gla",
    "chunk_linear_attn",
    "chunk_simple_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_simple_gla",
    "fused_recurrent_gla",
    "fused_recurrent_linear_attn",
    "fused_recurrent_simple_gla",
]
