"""Rows of a causal depthwise convolution: where their sequences begin, their taps, and the sum of these."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spans(rows, time, cu_ptr, sequence_ptr, sequences, batch, HAS_CU: tl.constexpr):
    """Of each row: its sequence, how many tokens of it came before, how many there are from this one on."""
    if HAS_CU:
        inside = (rows >= 0) & (rows < time)
        n = tl.load(sequence_ptr + rows, inside, other=0)
        n = tl.minimum(tl.maximum(n, 0), sequences - 1).to(tl.int64)
        start = tl.load(cu_ptr + n, inside, other=0)
        end = tl.load(cu_ptr + n + 1, inside, other=0)
        start = tl.minimum(tl.maximum(start, 0), rows)
        end = tl.minimum(tl.maximum(end, rows + 1), time)
        return n, rows - start, end - rows
    else:
        return (rows * 0).to(tl.int64) + batch, rows, time - rows


@triton.jit
def tap(
    x_ptr, x_stride, state_ptr, rows, before, n, c, mask, inputs,
    TAPS: tl.constexpr, J: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """[rows, c] of the input J tokens back: x, or the state where the sequence had not begun (0 without one)."""
    inside = (before >= J)[:, None]
    offsets = (rows - J).to(tl.int64)[:, None] * x_stride + c[None, :]
    x = tl.load(x_ptr + offsets, mask & inside, other=0.0).to(tl.float32)
    if HAS_STATE and J > 0:
        slot = TAPS - 1 - J + before
        offsets = (n[:, None] * inputs + c[None, :]) * (TAPS - 1) + slot[:, None]
        x = tl.where(inside, x, tl.load(state_ptr + offsets, mask & (inside == 0), other=0.0).to(tl.float32))
    return x


@triton.jit
def convolve(
    x_ptr, x_stride, weight_ptr, bias_ptr, state_ptr, rows, before, n, ci, c, mask, inputs, channels,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """The convolution before its activation, oldest tap first; a tap that does not exist is not multiplied."""
    z = tl.zeros(mask.shape, tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + c, c < channels, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(TAPS):
        x = tap(x_ptr, x_stride, state_ptr, rows, before, n, ci, mask, inputs, TAPS, TAPS - 1 - i, HAS_STATE)
        w = tl.load(weight_ptr + c.to(tl.int64) * TAPS + i, c < channels, other=0.0).to(tl.float32)[None, :]
        if HAS_STATE:
            z += x * w
        else:
            z = tl.where((before >= TAPS - 1 - i)[:, None], z + x * w, z)
    return z


__all__ = ["convolve", "spans", "tap"]
