"""Tiles of pairs: queries and one span each, from a list in which those that end in one block of keys stand together.

A tile may hold spans that are far apart: it visits the blocks that some row needs, run after run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._common.numerics import is_finite
from .._common.paged import load_heads

NEVER = tl.constexpr(2**31 - 1)  # no block


class Flags(NamedTuple):
    """Constants of a call."""

    GROUP: int  # query heads per key head
    SPANS: int
    GATED: bool  # a softmax for every span, else one for all
    BASED: bool
    PRECISION: str


class Spans(NamedTuple):
    """start, end int32 [B, T, H, SPANS], of which nothing is trusted; gate fp32 of this shape or None; key_mask uint8 [B, N] or
    None."""

    start: Any
    end: Any
    gate: Any
    key_mask: Any


class Place(NamedTuple):
    """Of a program in the list of one key head: batch row, key head, the first pair."""

    b: Any
    kv_head: Any
    first: Any


class Tile(NamedTuple):
    """Pairs [BM]: whether they exist, (b, T + token, H + head), span, and keys [begin, stop)."""

    live: Any
    token: Any
    head: Any
    row: Any
    slot: Any
    begin: Any
    stop: Any


@triton.jit
def place_of_program(tiles, kv_heads, BM: tl.constexpr):
    number = tl.program_id(0)
    segment = (number // tiles).to(tl.int64)
    return Place(segment // kv_heads, segment % kv_heads, number % tiles * BM)


@triton.jit
def load_tile(spans, order_ptr, place, live, b, kv_head, first_token, tokens, heads, keys, FLAGS: tl.constexpr):
    """The pairs at `place` [BM] of a list, whose tokens count from `first_token`."""
    pair = tl.load(order_ptr + place, live, other=0)
    PER_TOKEN: tl.constexpr = FLAGS.GROUP * FLAGS.SPANS
    token = first_token + pair // PER_TOKEN
    head = kv_head * FLAGS.GROUP + pair % PER_TOKEN // FLAGS.SPANS
    row = (b * tokens + token) * heads + head
    slot = pair % FLAGS.SPANS
    at = row * FLAGS.SPANS + slot
    begin = tl.maximum(tl.load(spans.start + at, live, other=0), 0)
    stop = tl.minimum(tl.load(spans.end + at, live, other=-1), keys - 1) + 1
    some = begin < stop
    return Tile(live, token, head, row, slot, tl.where(some, begin, 0), tl.where(some, stop, 0))


@triton.jit
def next_block(tile, block, BN: tl.constexpr):
    """The first block from `block` on that some pair needs, or NEVER."""
    needed = tl.where(tile.stop > block * BN, tl.maximum(tile.begin // BN, block), NEVER)
    return tl.min(needed, 0)


@triton.jit
def end_of_run(tile, block, BN: tl.constexpr):
    """All blocks from `block` to there are needed, by the pair that goes farthest of those in `block`."""
    return tl.max(tl.where(tile.begin // BN <= block, (tile.stop + BN - 1) // BN, 0), 0)


@triton.jit
def load_rows_of_pairs(x_ptr, rows, live, width, COLS: tl.constexpr):
    """[BM, COLS] of rows that begin at `rows` elements."""
    cols = tl.arange(0, COLS)
    return tl.load(x_ptr + rows[:, None] + cols[None, :], live[:, None] & (cols < width)[None, :], other=0.0)


@triton.jit
def load_queries(q, b, tile, BD: tl.constexpr):
    rows = b * q.stride_b + tile.token * q.stride_t + tile.head * q.stride_h
    return load_rows_of_pairs(q.ptr, rows, tile.live, q.width, BD)


@triton.jit
def unmasked(spans, b, cols, inside, keys):
    """Which keys [BN] may be seen at all."""
    if spans.key_mask is not None:
        return inside & (tl.load(spans.key_mask + b * keys + cols, inside, other=0) > 0)
    else:
        return inside


@triton.jit
def seen_of_block(spans, tile, place, cols, keys):
    """Which pairs [BM] see which keys `cols` [BN]."""
    inside = unmasked(spans, place.b, cols, cols < keys, keys)
    return (cols[None, :] >= tile.begin[:, None]) & (cols[None, :] < tile.stop[:, None]) & inside[None, :]


@triton.jit
def load_block(x, place, cols, keys, COLS: tl.constexpr):
    return load_heads(x, place.b, place.kv_head, cols, cols < keys, COLS)


@triton.jit
def any_nonfinite(x):
    """1 where a product met what is not finite: then it is repeated with care for what is hidden, whose weight is 0."""
    return tl.max(tl.max(tl.where(is_finite(x.to(tl.float32)), 0, 1), 1), 0)


@triton.jit
def add_nonfinite_of(acc, x, spans, tile, place, keys, BN: tl.constexpr):
    """acc [BM, COLS] plus what is not finite in the rows of x that pairs see, one by one."""
    block = next_block(tile, 0, BN)
    while block < NEVER:
        end = end_of_run(tile, block, BN)
        for n in range(block, end):
            if any_nonfinite(load_block(x, place, n * BN + tl.arange(0, BN), keys, acc.shape[1])) > 0:
                for j in range(BN):
                    key = n * BN + j + tl.arange(0, 1)
                    row = load_block(x, place, key, keys, acc.shape[1]).to(tl.float32)  # [1, COLS]
                    poison = seen_of_block(spans, tile, place, key, keys) & (is_finite(row) == 0)
                    acc = tl.where(poison, acc + row, acc)
        block = next_block(tile, end, BN)
    return acc
