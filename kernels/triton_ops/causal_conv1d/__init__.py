"""Causal depthwise convolution over time, forward, backward and one decoding step; LAWCAT, arXiv 2509.18467.

y[t, c] = act(bias[c] + sum_j weight[c, W-1-j] x[t-j, map(c)]) + residual[t, c]. A program owns a tile of tokens and channels and
reads it once per tap, of which the cache serves all but one. Taps before the sequence come from its state or are selected away.
dweight and dbias are partial sums of one tile each, which a second kernel adds up in order. Arithmetic is fp32, rounded once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton

from .._common.aot import AotCase
from .._common.checks import check_integers, check_packed, check_rows, require
from .._common.convolution import MAX_TAPS, Packed, conv_of
from .backward import causal_conv1d_bwd_kernel, causal_conv1d_dstate_kernel, causal_conv1d_reduce_kernel
from .forward import Residual, State, causal_conv1d_final_kernel, causal_conv1d_fwd_kernel, causal_conv1d_update_kernel

ROWS, COLS = 64, 64
_TILE = {"ROWS": ROWS, "COLS": COLS, "num_warps": 4, "enable_fp_fusion": True}
BACK_ROWS = 32  # with more per thread, the backward of silu with a state spills
_BACK_TILE = {**_TILE, "ROWS": BACK_ROWS, "num_warps": 8}
_FLAT = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}


def check_channels(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    groups: int,
    head_dim: int,
    weight_name: str = "weight",
    bias_name: str = "bias",
) -> int:
    """The number of taps, after the checks that all operators share."""
    require(x.dim() == 3, "x", "3 dimensions", x)
    taps = f"[D, W] with W in 1..{MAX_TAPS}"
    require(weight.dim() == 2 and 1 <= weight.shape[1] <= MAX_TAPS, weight_name, taps, weight)
    fits = groups >= 1 and head_dim >= 1 and x.shape[2] % head_dim == 0 and weight.shape[0] == x.shape[2] * groups
    require(fits, weight_name, f"{groups} times the channels of x, in heads of {head_dim}", weight)
    check_packed(weight_name, weight, tuple(weight.shape), x)
    check_packed(bias_name, bias, (weight.shape[0],), x)
    return weight.shape[1]


def check_sequences(
    x: torch.Tensor,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    sequence: torch.Tensor | None,
    taps: int,
) -> int:
    """The number of sequences, after the checks of what has one entry for each."""
    check_rows("x", x, tuple(x.shape), x)
    if cu_seqlens is None or sequence is None:
        sequences = x.shape[0]
    else:
        sequences = cu_seqlens.shape[0] - 1
        require(
            x.shape[0] == 1 and (sequences > 0 or x.shape[1] == 0), "cu_seqlens", "[N + 1] for a batch of 1", cu_seqlens
        )
        check_integers("cu_seqlens", cu_seqlens, sequences + 1)
        check_integers("sequence", sequence, x.shape[1])
    check_packed("initial_state", state, (sequences, x.shape[2], taps - 1), x)
    return sequences


def causal_conv1d_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    residual: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    sequence: torch.Tensor | None,
    groups: int,
    head_dim: int,
    silu: bool,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the final state (empty unless asked for).

    Args:
        x: `[B, T, D / groups]`, fp32, bf16 or fp16, last dimension contiguous.
        weight, bias: `[D, W]` with W in 1..8, `[D]`, contiguous, in x's dtype.
        initial_state: `[N, D / groups, W - 1]`, contiguous, in x's dtype.
        residual: `[B, T, D]` in x's dtype, last dimension contiguous.
        cu_seqlens, sequence: int32 `[N + 1]` and the sequence of every token, int32 `[T]`; B is 1.
        groups, head_dim: output channel (h * groups + g) * head_dim + e reads input channel h * head_dim + e.
        silu: whether there is an activation.
        output_final_state: whether to compute the second result.

    Returns:
        (y `[B, T, D]`, final state `[N, D / groups, W - 1]` or `[0]`).

    Raises:
        ValueError: for shapes, dtypes or strides outside the above.
    """
    taps = check_channels(x, weight, bias, groups, head_dim)
    sequences = check_sequences(x, initial_state, cu_seqlens, sequence, taps)
    batch, time = x.shape[:2]
    channels = weight.shape[0]
    check_rows("residual", residual, (batch, time, channels), x)
    y = x.new_empty((batch, time, channels))
    if y.numel():
        tiles = triton.cdiv(time, ROWS)
        added = Residual(None, 0, 0) if residual is None else Residual(residual, *residual.stride()[:2])
        causal_conv1d_fwd_kernel[(batch * tiles * triton.cdiv(channels, COLS),)](
            conv_of(x, weight, bias, initial_state, groups, head_dim), Packed(cu_seqlens, sequence), added, y,
            time, tiles, sequences, TAPS=taps, SILU=silu, GROUPED=groups > 1, **_TILE,
        )  # fmt: skip
    return y, final_state(x, weight, initial_state, cu_seqlens, sequences) if output_final_state else x.new_empty((0,))


def final_state(
    x: torch.Tensor,
    weight: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    sequences: int,
) -> torch.Tensor:
    """The last inputs `[N, D / groups, W - 1]` of every sequence, of checked arguments."""
    taps = weight.shape[1]
    final = x.new_empty((sequences, x.shape[2], taps - 1))
    if final.numel():
        causal_conv1d_final_kernel[(sequences * triton.cdiv(x.shape[2], _FLAT["BLOCK"]),)](
            conv_of(x, weight, None, initial_state, 1, 1), cu_seqlens, final, x.shape[1], TAPS=taps, **_FLAT
        )
    return final


def causal_conv1d_bwd(
    grad_y: torch.Tensor,
    grad_final: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    sequence: torch.Tensor | None,
    groups: int,
    head_dim: int,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dweight, dbias, dstate); the last two are empty where the forward had no such argument.

    Args: as `causal_conv1d_fwd`; grad_y `[B, T, D]` and grad_final `[N, D / groups, W - 1]` contiguous in x's dtype.

    Returns:
        Contiguous tensors of the shapes and dtype of x, weight, bias and initial_state.

    Raises:
        ValueError: as `causal_conv1d_fwd`.
    """
    taps = check_channels(x, weight, bias, groups, head_dim)
    sequences = check_sequences(x, initial_state, cu_seqlens, sequence, taps)
    batch, time, inputs = x.shape
    channels = weight.shape[0]
    check_packed("grad_y", grad_y, (batch, time, channels), x)
    check_packed("grad_final", grad_final, (sequences, inputs, taps - 1), x)
    return conv_backward(
        grad_y, grad_final, x, weight, bias, initial_state, cu_seqlens, sequence, groups, head_dim, silu, sequences
    )


def conv_backward(
    grad_y: torch.Tensor,
    grad_final: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    sequence: torch.Tensor | None,
    groups: int,
    head_dim: int,
    silu: bool,
    sequences: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `causal_conv1d_bwd` returns, of checked arguments; grad_y may also be fp32."""
    batch, time, inputs = x.shape
    channels, taps = weight.shape
    dx, dweight = x.new_empty((batch, time, inputs)), x.new_empty((channels, taps))
    dbias = x.new_empty((channels if bias is not None else 0,))
    dstate = x.new_empty((sequences, inputs, taps - 1) if initial_state is not None else (0,))
    tiles = triton.cdiv(time, BACK_ROWS)
    partials = x.new_empty((batch * tiles, taps + 1, channels), dtype=torch.float32)
    conv = conv_of(x, weight, bias, initial_state, groups, head_dim)
    flags = {"TAPS": taps, "SILU": silu, "GROUPED": groups > 1}
    through = grad_final if taps > 1 else None
    any_rows = grad_y.numel() > 0
    if any_rows:
        causal_conv1d_bwd_kernel[(batch * tiles * triton.cdiv(inputs, COLS),)](
            conv, Packed(cu_seqlens, sequence), grad_y, through, dx, partials, time, tiles, sequences, **flags, **_BACK_TILE
        )  # fmt: skip
    if channels:
        causal_conv1d_reduce_kernel[((taps + 1) * triton.cdiv(channels, _FLAT["BLOCK"]),)](
            partials, dweight, None if bias is None else dbias, channels, batch * tiles if any_rows else 0, TAPS=taps, **_FLAT
        )  # fmt: skip
    if dstate.numel():
        causal_conv1d_dstate_kernel[(sequences * triton.cdiv(inputs, _FLAT["BLOCK"]),)](
            conv, cu_seqlens, grad_y, through, dstate, time, **flags, **_FLAT
        )
    return dx, dweight, dbias, dstate


def causal_conv1d_update_(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    conv_state_indices: torch.Tensor | None,
    groups: int,
    head_dim: int,
    silu: bool,
) -> torch.Tensor:
    """y of the next tokens; conv_state is brought up to date in place.

    Args:
        x: `[B, s, D / groups]`, contiguous.
        conv_state: `[P, D / groups, L]` with L >= W - 1, any strides, in x's dtype.
        weight, bias, groups, head_dim, silu: as `causal_conv1d_fwd`.
        residual: `[B, s, D]`, contiguous, in x's dtype.
        cache_seqlens: int32 `[B]`: conv_state is a ring, and this many tokens came before.
        conv_state_indices: int32 `[B]`, the state of each row; outside 0..P-1 skips it.

    Returns:
        y `[B, s, D]`.

    Raises:
        ValueError: for shapes, dtypes or strides outside the above.
    """
    taps = check_channels(x, weight, bias, groups, head_dim)
    batch, tokens, inputs = x.shape
    channels = weight.shape[0]
    check_packed("x", x, tuple(x.shape), x)
    fits = conv_state.dim() == 3 and conv_state.dtype == x.dtype and conv_state.shape[1] == inputs
    fits = fits and conv_state.shape[2] >= taps - 1 and (conv_state_indices is not None or conv_state.shape[0] == batch)
    require(fits, "conv_state", f"[{batch} or P, {inputs}, L >= {taps - 1}] in {x.dtype}", conv_state)
    check_packed("residual", residual, (batch, tokens, channels), x)
    check_integers("cache_seqlens", cache_seqlens, batch)
    check_integers("conv_state_indices", conv_state_indices, batch)
    y = x.new_empty((batch, tokens, channels))
    if y.numel():
        count, _, length = conv_state.shape
        pool = State(conv_state, conv_state.stride(0), conv_state.stride(1), conv_state.stride(2), count, length)
        causal_conv1d_update_kernel[(batch * triton.cdiv(inputs, _FLAT["BLOCK"]),)](
            conv_of(x, weight, bias, None, groups, head_dim), pool, residual,
            cache_seqlens if length > 0 else None, conv_state_indices, y, tokens,
            TAPS=taps, SILU=silu, GROUPED=groups > 1, **_FLAT,
        )  # fmt: skip
    return y


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _aot_args(launcher: str, dtype: torch.dtype, full: bool) -> tuple[Any, ...]:
    """Queries of a 7B model, 2048 tokens; `full`: every option, with eight heads of outputs per head of inputs."""
    time, channels, taps, groups = 2048, 4096, 4, 8 if full else 1
    new = partial(_meta, dtype=dtype)
    x, weight, state = new(1, time, channels // groups), new(channels, taps), new(3, channels // groups, taps - 1)
    bias, residual = (new(channels), new(1, time, channels)) if full else (None, None)
    cu, sequence = (_meta(4, dtype=torch.int32), _meta(time, dtype=torch.int32)) if full else (None, None)
    layout = (groups, 128 if full else channels, full)
    if launcher == "fwd":
        return x, weight, bias, state if full else None, residual, cu, sequence, *layout, full
    if launcher == "bwd":
        grad = new(1, time, channels)
        return grad, state if full else None, x, weight, bias, state if full else None, cu, sequence, *layout
    rows, lengths = (new(16, 1, channels // groups), _meta(16, dtype=torch.int32)) if full else (x[:, :1], None)
    pool = new(16 if full else 1, channels // groups, taps)
    return rows, pool, weight, bias, new(16, 1, channels) if full else None, lengths, lengths, *layout


# 11 words with everything on, among 255 registers: silu is recomputed for each of the rows that a tap joins.
_SPILLS = {"causal_conv1d_bwd_kernel": "all options at once: a dozen words, beside W * W loads of x per element"}
_STEP_SPILLS = {"causal_conv1d_update_kernel": "one word in float32 on sm_90, where 96 registers let a fifth block in"}
# Every weight, state and sequence bound is read per channel or per token, in whatever width: "options".
AOT = [
    AotCase(
        f"{name} {launcher} options{' all' if full else ''}",
        function,
        partial(_aot_args, launcher, dtype, full),
        _SPILLS if full else _STEP_SPILLS,
    )
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for full in (False, True)
    for launcher, function in (
        ("fwd", causal_conv1d_fwd),
        ("bwd", causal_conv1d_bwd),
        ("update", causal_conv1d_update_),
    )
]

__all__ = ["AOT", "causal_conv1d_bwd", "causal_conv1d_fwd", "causal_conv1d_update_"]
