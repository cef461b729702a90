"""Rows of a causal depthwise convolution: where their sequences begin, their taps, and the sum of these."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

MAX_TAPS = 8


class Conv(NamedTuple):
    """x [B, T, inputs] with a contiguous last dimension, weight [channels, TAPS], bias [channels] or None, and the state before
    every sequence [N, inputs, TAPS - 1] or None."""

    x: Any
    stride_b: Any
    stride_t: Any
    weight: Any
    bias: Any
    state: Any
    inputs: Any
    channels: Any
    groups: Any
    head_dim: Any


class Packed(NamedTuple):
    """int32 bounds of packed sequences [N + 1] and the sequence of every token [T], or None."""

    cu_seqlens: Any
    sequence: Any


class Tokens(NamedTuple):
    """Rows of x in their sequences: which, how many tokens of it came before, how many there are from this one on."""

    rows: Any
    sequence: Any
    before: Any
    left: Any


def conv_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    groups: int,
    head_dim: int,
) -> Conv:
    """Checked tensors as kernels take them: without a state where there is no tap for it."""
    channels, taps = weight.shape
    state = initial_state if taps > 1 else None
    return Conv(x, x.stride(0), x.stride(1), weight, bias, state, x.shape[2], channels, groups, head_dim)


@triton.jit
def place(rows, time, packed, sequences, batch):
    """`Tokens` of rows of one batch row; bounds are not trusted."""
    if packed.cu_seqlens is not None:
        inside = (rows >= 0) & (rows < time)
        n = tl.load(packed.sequence + rows, inside, other=0)
        n = tl.minimum(tl.maximum(n, 0), sequences - 1).to(tl.int64)
        start = tl.load(packed.cu_seqlens + n, inside, other=0)
        end = tl.load(packed.cu_seqlens + n + 1, inside, other=0)
        start = tl.minimum(tl.maximum(start, 0), rows)
        end = tl.minimum(tl.maximum(end, rows + 1), time)
        return Tokens(rows, n, rows - start, end - rows)
    else:
        return Tokens(rows, (rows * 0).to(tl.int64) + batch, rows, time - rows)


@triton.jit
def tap(x_ptr, conv, tokens, c, mask, TAPS: tl.constexpr, J: tl.constexpr):
    """[rows, c] of the input J tokens back: x, or the state where the sequence had not begun (0 without one)."""
    inside = (tokens.before >= J)[:, None]
    offsets = (tokens.rows - J).to(tl.int64)[:, None] * conv.stride_t + c[None, :]
    x = tl.load(x_ptr + offsets, mask & inside, other=0.0).to(tl.float32)
    if conv.state is not None and J > 0:
        slot = TAPS - 1 - J + tokens.before
        offsets = (tokens.sequence[:, None] * conv.inputs + c[None, :]) * (TAPS - 1) + slot[:, None]
        x = tl.where(inside, x, tl.load(conv.state + offsets, mask & (inside == 0), other=0.0).to(tl.float32))
    return x


@triton.jit
def convolve(x_ptr, conv, tokens, ci, c, limit, mask, TAPS: tl.constexpr):
    """fp32 [rows, c] before the activation, oldest tap first: output channels c below `limit` of input channels ci.

    A tap that does not exist is not multiplied.
    """
    z = tl.zeros(mask.shape, tl.float32)
    if conv.bias is not None:
        z += tl.load(conv.bias + c, c < limit, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(TAPS):
        x = tap(x_ptr, conv, tokens, ci, mask, TAPS, TAPS - 1 - i)
        w = tl.load(conv.weight + c.to(tl.int64) * TAPS + i, c < limit, other=0.0).to(tl.float32)[None, :]
        if conv.state is not None:
            z += x * w
        else:
            z = tl.where((tokens.before >= TAPS - 1 - i)[:, None], z + x * w, z)
    return z
