"""What the kernels of gated linear attention take, in named tuples: heads, sequences, what a walk left, constants.

A number inside a tuple is specialised (1 becomes a constant), `do_not_specialize` or not: numbers that vary from call to call
are plain arguments of a kernel and enter a tuple there. Functions return no tuple that may hold None: Triton 3.6 cannot.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Heads(NamedTuple):
    """[B, T, H, width]; `stride_c` of the last dimension, which gates alone have (0: one gate per head)."""

    ptr: Any
    stride_b: Any
    stride_t: Any
    stride_h: Any
    stride_c: Any


class Rows(NamedTuple):
    """A matrix [tokens, width]: one head of one batch row."""

    ptr: Any
    stride: Any
    stride_c: Any
    width: Any


class Sequences(NamedTuple):
    """Packed sequences: int64 bounds [N + 1], the sequence of every chunk, the first chunk of every sequence; or None."""

    cu_seqlens: Any
    of_chunk: Any
    first_chunk: Any


class States(NamedTuple):
    """S [N, HS, K, V] and z [N, HS, K], fp32, contiguous."""

    s: Any
    z: Any


class Walked(NamedTuple):
    """What a walk over the sequences left: gates summed in every chunk [B, T, HG, W] and to its middle [chunks, HG, W]; S and z
    before every chunk."""

    g_cum: Any
    g_mid: Any
    s: Any
    z: Any


class RowGrads(NamedTuple):
    """Gradient of the results [B, T, H, V], denominators and their gradients [B, T, H]."""

    o: Any
    den: Any
    dden: Any


class Shape(NamedTuple):
    """The numbers of a call that kernels calculate with."""

    tokens: Any
    states: Any
    dk: Any
    dv: Any
    scale: Any
    eps: Any


class Chunk(NamedTuple):
    """Tokens [start, end of the sequence) of batch row `batch` from chunk number `number` on, and the state head."""

    number: Any
    batch: Any
    start: Any
    end: Any
    head: Any


class Flags(NamedTuple):
    """Constants of a call. Shares: state heads that read one head of k, of v, of g; GROUP: query heads of a state."""

    GROUP: int
    K_SHARE: int
    V_SHARE: int
    G_SHARE: int
    GATE: int  # 0: none, 1: one per head, 2: one per channel
    NORMALIZE: bool
    PRECISION: str


# Launches have one axis, for the others end at 65,535.


@triton.jit
def place_of_walk(dk, dv, BK: tl.constexpr, BV: tl.constexpr):
    """First value column, number of the state among those of all sequences, and first key channel of a program."""
    columns, states = tl.cdiv(dv, BV), tl.num_programs(0) // tl.cdiv(dv, BV) // tl.cdiv(dk, BK)
    rest = tl.program_id(0) // columns
    return tl.program_id(0) % columns * BV, rest % states, rest // states * BK


@triton.jit
def place_of_chunk(sequences, count, chunks, tokens, C: tl.constexpr):
    """Number of the chunk, and of the program among those of the chunk; `count` sequences, packed or of `chunks` each."""
    slots = count * chunks if sequences.cu_seqlens is None else tokens // C + count
    return (tl.program_id(0) % slots).to(tl.int64), tl.program_id(0) // slots


@triton.jit
def rows_of_head(x, b, h, width):
    """Head h of batch row b."""
    return Rows(x.ptr + b * x.stride_b + h.to(tl.int64) * x.stride_h, x.stride_t, x.stride_c, width)


@triton.jit
def rows_of_query(q, stride_h, h):
    """The h-th query head after that of `q`."""
    return Rows(q.ptr + tl.cast(h, tl.int64) * stride_h, q.stride, 1, q.width)
