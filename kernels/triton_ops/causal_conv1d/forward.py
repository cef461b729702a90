"""Forward kernels: the convolution, its final state, and one decoding step."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._common.activations import activate
from .._common.convolution import convolve, place
from .._common.numerics import cast
from .layout import VARIES, output_channels, tile_of_program, whole_sequence


class Residual(NamedTuple):
    """[B, T, channels] that is added to the result, or None."""

    ptr: Any
    stride_b: Any
    stride_t: Any


class State(NamedTuple):
    """A pool of states [count, inputs, length]."""

    ptr: Any
    stride_n: Any
    stride_c: Any
    stride_l: Any
    count: Any
    length: Any


@triton.jit(do_not_specialize=VARIES)
def causal_conv1d_fwd_kernel(
    conv, packed, residual, y_ptr, time, tiles, sequences,
    TAPS: tl.constexpr, SILU: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    b, _, rows, c, mask = tile_of_program(time, tiles, conv.channels, ROWS, COLS)
    tokens = place(rows, time, packed, sequences, b)
    ci = c
    if GROUPED:
        h = c // conv.head_dim
        ci = h // conv.groups * conv.head_dim + (c - h * conv.head_dim)
    z = convolve(conv.x + b * conv.stride_b, conv, tokens, ci, c, conv.channels, mask, TAPS)  # [ROWS, COLS]
    if SILU:
        z = activate(z, 0)
    if residual.ptr is not None:
        offsets = rows.to(tl.int64)[:, None] * residual.stride_t + c[None, :]
        z += tl.load(residual.ptr + b * residual.stride_b + offsets, mask, other=0.0).to(tl.float32)
    offsets = (b * time + rows)[:, None] * conv.channels + c[None, :]
    tl.store(y_ptr + offsets, cast(z, y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["time"])
def causal_conv1d_final_kernel(conv, cu_ptr, final_ptr, time, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.cdiv(conv.inputs, BLOCK)
    n = tl.program_id(0) // columns
    c = (tl.program_id(0) - n * columns) * BLOCK + tl.arange(0, BLOCK)
    start, length = whole_sequence(cu_ptr, n, time)
    x_ptr = conv.x
    if cu_ptr is None:
        x_ptr += n.to(tl.int64) * conv.stride_b
    base = (n.to(tl.int64) * conv.inputs + c) * (TAPS - 1)
    for k in tl.static_range(TAPS - 1):
        t = c * 0 + length - (TAPS - 1) + k  # blocks, for a mask must not mix scalars and blocks in the interpreter
        x = tl.load(x_ptr + (start + t).to(tl.int64) * conv.stride_t + c, (c < conv.inputs) & (t >= 0), other=0.0)
        if conv.state is not None:
            past = tl.load(conv.state + base + k + length, (c < conv.inputs) & (t < 0), other=0.0)
            x = tl.where(t >= 0, x, past)
        tl.store(final_ptr + base + k, x, c < conv.inputs)


@triton.jit(do_not_specialize=["tokens"])
def causal_conv1d_update_kernel(
    conv, state, residual_ptr, seqlens_ptr, indices_ptr, y_ptr, tokens,
    TAPS: tl.constexpr, SILU: tl.constexpr, GROUPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y of the next `tokens` tokens of every row, then the state; a ring where `seqlens_ptr` says how many came before."""
    columns = tl.cdiv(conv.inputs, BLOCK)
    b = tl.program_id(0) // columns
    ci = (tl.program_id(0) - b * columns) * BLOCK + tl.arange(0, BLOCK)
    b = b.to(tl.int64)
    used = ci < conv.inputs
    n = b
    if indices_ptr is not None:
        n = tl.load(indices_ptr + b).to(tl.int64)
    zero = ci * 0  # masks are made of blocks, for the interpreter does not mix them with scalars
    n += zero
    live = (n >= 0) & (n < state.count)
    position = tokens * 0
    if seqlens_ptr is not None:
        position = tl.load(seqlens_ptr + b)
        position = position - position // state.length * state.length
        position = tl.where(position < 0, position + state.length, position)
    state_ptr = state.ptr + (tl.where(live, n, 0) * state.stride_n + ci.to(tl.int64) * state.stride_c)
    x_ptr = conv.x + (b * tokens * conv.inputs + ci)
    for t in range(tokens):
        for g in range(conv.groups):
            c = output_channels(ci, g, conv, GROUPED)
            z = tl.zeros([BLOCK], tl.float32)
            if conv.bias is not None:
                z += tl.load(conv.bias + c, used, other=0.0).to(tl.float32)
            for i in tl.static_range(TAPS):
                back = zero + t - (TAPS - 1 - i)  # below 0: in the state
                slot = state.length + back
                if seqlens_ptr is not None:
                    slot = position + state.length + back
                    slot = slot - slot // state.length * state.length
                new = tl.load(x_ptr + back.to(tl.int64) * conv.inputs, used & (back >= 0), other=0.0)
                old = tl.load(state_ptr + slot.to(tl.int64) * state.stride_l, used & live & (back < 0), other=0.0)
                x = tl.where(back >= 0, new.to(tl.float32), old.to(tl.float32))
                z += x * tl.load(conv.weight + c.to(tl.int64) * TAPS + i, used, other=0.0).to(tl.float32)
            if SILU:
                z = activate(z, 0)
            offsets = (b * tokens + t) * conv.channels + c
            if residual_ptr is not None:
                z += tl.load(residual_ptr + offsets, used, other=0.0).to(tl.float32)
            tl.store(y_ptr + offsets, cast(tl.where(live, z, 0.0), y_ptr.dtype.element_ty), used)
    tl.debug_barrier()  # all of the old state has been read
    if seqlens_ptr is not None:
        for t in range(tokens):
            slot = zero + position + t
            slot = slot - slot // state.length * state.length
            value = tl.load(x_ptr + (zero + t).to(tl.int64) * conv.inputs, used, other=0.0)
            tl.store(state_ptr + slot.to(tl.int64) * state.stride_l, value, used & live)
            tl.debug_barrier()  # a long call comes round to the same slot
    else:
        for i in range(state.length):
            source = zero + i + tokens
            old = tl.load(
                state_ptr + source.to(tl.int64) * state.stride_l, used & live & (source < state.length), other=0.0
            )
            new = tl.load(
                x_ptr + (source - state.length).to(tl.int64) * conv.inputs, used & (source >= state.length), other=0.0
            )
            tl.debug_barrier()
            tl.store(
                state_ptr + (zero + i).to(tl.int64) * state.stride_l,
                tl.where(source < state.length, old, new),
                used & live,
            )
            tl.debug_barrier()  # slots are written after they were read, by whichever thread
