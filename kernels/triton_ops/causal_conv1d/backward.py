"""Backward kernels: dx with one tile's part of dweight and dbias, their sums in order, and dstate."""

from __future__ import annotations

import triton
import triton.language as tl

from .._common.activations import activate_grad
from .._common.convolution import Tokens, convolve, place, tap
from .._common.numerics import cast
from .layout import VARIES, output_channels, tile_of_program, whole_sequence


@triton.jit(do_not_specialize=VARIES)
def causal_conv1d_bwd_kernel(
    conv, packed, grad_ptr, grad_final_ptr, dx_ptr, partial_ptr, time, tiles, sequences,
    TAPS: tl.constexpr, SILU: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dx, and this tile's part of dweight and dbias."""
    b, tile, rows, ci, mask = tile_of_program(time, tiles, conv.inputs, ROWS, COLS)
    x_ptr = conv.x + b * conv.stride_b
    tokens = place(rows, time, packed, sequences, b)
    dx = tl.zeros([ROWS, COLS], tl.float32)
    partial_ptr += (b * tiles + tile) * (TAPS + 1) * conv.channels
    for g in range(conv.groups):
        c = output_channels(ci, g, conv, GROUPED)
        used = ci < conv.inputs
        for j in tl.static_range(TAPS):  # what row + j, in the same sequence, says about row
            late = mask & (tokens.left > j)[:, None]
            offsets = (b * time + rows + j)[:, None] * conv.channels + c[None, :]
            dz = tl.load(grad_ptr + offsets, late, other=0.0).to(tl.float32)  # [ROWS, COLS]
            if SILU:
                later = Tokens(rows + j, tokens.sequence, tokens.before + j, tokens.left - j)
                z = convolve(x_ptr, conv, later, ci, c, conv.channels, late, TAPS)
                dz *= activate_grad(z, 0)
            w = tl.load(conv.weight + c.to(tl.int64) * TAPS + (TAPS - 1 - j), used, other=0.0).to(tl.float32)
            dx = tl.where(late, dx + dz * w[None, :], dx)
            if j == 0:
                for i in tl.static_range(TAPS):
                    x = tap(x_ptr, conv, tokens, ci, mask, TAPS, TAPS - 1 - i)
                    product = tl.where(mask, dz * x, 0.0)
                    if conv.state is None:
                        product = tl.where((tokens.before >= TAPS - 1 - i)[:, None], product, 0.0)
                    tl.store(partial_ptr + i * conv.channels + c, tl.sum(product, 0), used)
                tl.store(partial_ptr + TAPS * conv.channels + c, tl.sum(tl.where(mask, dz, 0.0), 0), used)
    if grad_final_ptr is not None:
        column = TAPS - 1 - tokens.left
        offsets = (tokens.sequence[:, None] * conv.inputs + ci[None, :]) * (TAPS - 1) + column[:, None]
        dx += tl.load(grad_final_ptr + offsets, mask & (column >= 0)[:, None], other=0.0).to(tl.float32)
    offsets = (b * time + rows)[:, None] * conv.inputs + ci[None, :]
    tl.store(dx_ptr + offsets, cast(dx, dx_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["blocks"])
def causal_conv1d_reduce_kernel(
    partial_ptr, dweight_ptr, dbias_ptr, channels, blocks, TAPS: tl.constexpr, BLOCK: tl.constexpr
):
    columns = tl.cdiv(channels, BLOCK)
    row = tl.program_id(0) // columns
    c = (tl.program_id(0) - row * columns) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    step = (TAPS + 1) * channels.to(tl.int64)
    for k in range(blocks):
        total += tl.load(partial_ptr + k * step + row * channels + c, c < channels, other=0.0)
    if row < TAPS:
        tl.store(dweight_ptr + c.to(tl.int64) * TAPS + row, cast(total, dweight_ptr.dtype.element_ty), c < channels)
    elif dbias_ptr is not None:
        tl.store(dbias_ptr + c, cast(total, dbias_ptr.dtype.element_ty), c < channels)


@triton.jit(do_not_specialize=["time"])
def causal_conv1d_dstate_kernel(
    conv, cu_ptr, grad_ptr, grad_final_ptr, dstate_ptr, time,
    TAPS: tl.constexpr, SILU: tl.constexpr, GROUPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(conv.inputs, BLOCK)
    n = tl.program_id(0) // columns
    ci = (tl.program_id(0) - n * columns) * BLOCK + tl.arange(0, BLOCK)
    start, length = whole_sequence(cu_ptr, n, time)
    b = (n * 0 if cu_ptr is not None else n).to(tl.int64)
    used = ci < conv.inputs
    lengths = ci * 0 + length
    base = (n.to(tl.int64) * conv.inputs + ci) * (TAPS - 1)
    for k in tl.static_range(TAPS - 1):
        total = tl.zeros([BLOCK], tl.float32)
        for g in range(conv.groups):
            c = output_channels(ci, g, conv, GROUPED)
            for r in tl.static_range(k + 1):  # rows of x that column k is a tap of
                live = used & (lengths > r)
                dz = tl.load(grad_ptr + (b * time + start + r) * conv.channels + c, live, other=0.0).to(tl.float32)
                if SILU:
                    before = tl.zeros([1], tl.int32) + r
                    tokens = Tokens(start + before, (before * 0).to(tl.int64) + n, before, length - before)
                    z = convolve(conv.x + b * conv.stride_b, conv, tokens, ci, c, conv.channels, live[None, :], TAPS)
                    dz *= activate_grad(tl.sum(z, 0), 0)
                w = tl.load(conv.weight + c.to(tl.int64) * TAPS + (k - r), used, other=0.0).to(tl.float32)
                total = tl.where(live, total + w * dz, total)
        if grad_final_ptr is not None:
            through = used & (lengths <= k)
            total += tl.load(grad_final_ptr + base + k - length, through, other=0.0).to(tl.float32)
        tl.store(dstate_ptr + base + k, cast(total, dstate_ptr.dtype.element_ty), used)
