"""What the kernels of interval attention take, in named tuples: heads, masks, plans and constants.

A number inside a tuple is specialised (1 becomes a constant), `do_not_specialize` or not: numbers that vary from call to call
are plain arguments of a kernel and enter a tuple there. Functions return no tuple that may hold None: Triton 3.6 cannot.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Heads(NamedTuple):
    """[B, T, H, width] with a contiguous last dimension; queries have one more, `stride_slot`, before the last."""

    ptr: Any
    stride_b: Any
    stride_t: Any
    stride_h: Any
    width: Any
    stride_slot: Any = 0


class Rows(NamedTuple):
    """A matrix [count, width], rows `stride` apart."""

    ptr: Any
    stride: Any
    count: Any
    width: Any


class Mask(NamedTuple):
    """The tensors of a mask and of biases, None where there are none; strides of batch and head are 0 where broadcast.

    starts, ends [B, H, Tq, INTERVALS], strides in heads; key_start, key_stop and key_bias [B, H, Tk] and alibi_slopes [B, H],
    strides in elements.
    """

    starts: Any
    ends: Any
    stride_b: Any
    stride_h: Any
    key_start: Any
    key_stop: Any
    key_stride_b: Any
    key_stride_h: Any
    key_bias: Any
    bias_stride_b: Any
    bias_stride_h: Any
    alibi_slopes: Any
    slope_stride_b: Any


class Offsets(NamedTuple):
    """Where a head begins in `starts` and `ends`, in `key_start` and `key_stop`, and in `key_bias`."""

    rows: Any
    keys: Any
    bias: Any


class HeadMask(NamedTuple):
    """A mask as one head sees it, and the numbers of the plain mask."""

    tensors: Mask
    offsets: Offsets
    tq: Any
    tk: Any
    sink_tokens: Any
    window: Any


class ScoreTerms(NamedTuple):
    """What makes a score of a product: cap(scale * product) - slope * distance, where cap(x) = softcap * tanh(x / softcap)."""

    scale: Any
    softcap: Any
    slope: Any  # of the head


class Plan(NamedTuple):
    """Half of `IntervalMask.plan`, or None: how many tiles are seen in part and wholly, and the list of them."""

    counts: Any
    lists: Any


class RowResults(NamedTuple):
    """What the forward gives, or its gradient: out [B, Tq, H, Dv], lse [B, Tq, H] and, for the backward, stats
    [B, Tq, H, 2]: the largest score of a row, the sink logit among them, and log of the sum of exp(score - largest), or 0 and
    inf. Contiguous; None where a kernel does not touch it."""

    out: Any
    lse: Any
    stats: Any


class Flags(NamedTuple):
    """Constants of a call. PER_KEY: lifetimes or biases of keys, which no tile is known to pass wholly; CAPPED: a softcap."""

    CAUSAL: bool
    WINDOWED: bool
    PER_KEY: bool
    CAPPED: bool
    INTERVALS: int  # of a row
    SLOTS: int  # queries per row, one for each interval, or 1
    GROUP: int  # query heads per key head
    PRECISION: str


@triton.jit
def place_of_program(tiles, heads, SIZE: tl.constexpr):
    """Batch row, head and first row or key of a program; one axis, for the others end at 65,535."""
    number = tl.program_id(0)
    return (number // tiles // heads).to(tl.int64), number // tiles % heads, number % tiles * SIZE


@triton.jit
def rows_of_head(x, b, h, count):
    """Head h of batch row b."""
    return Rows(x.ptr + b * x.stride_b + h.to(tl.int64) * x.stride_h, x.stride_t, count, x.width)


@triton.jit
def rows_of_slot(q, b, h, slot, count):
    """The queries of head h and batch row b for one interval."""
    ptr = q.ptr + b * q.stride_b + h.to(tl.int64) * q.stride_h + slot * q.stride_slot
    return Rows(ptr, q.stride_t, count, q.width)


@triton.jit
def offsets_of_head(mask, b, h, tq, INTERVALS: tl.constexpr):
    return Offsets(
        (b * mask.stride_b + h * mask.stride_h) * tq * INTERVALS,
        b * mask.key_stride_b + h.to(tl.int64) * mask.key_stride_h,
        b * mask.bias_stride_b + h.to(tl.int64) * mask.bias_stride_h,
    )


@triton.jit
def slope_of_head(mask, b, h):
    """0 without slopes."""
    if mask.alibi_slopes is not None:
        return tl.load(mask.alibi_slopes + b * mask.slope_stride_b + h)
    else:
        return tl.cast(0.0, tl.float32)
