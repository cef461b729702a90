"""Attention of the new tokens: a program has a tile of the queries of one key head, and a share of the keys that they see.

Tokens are counted from the first new one, so that those of the ring are negative. A tile sees, in this order, sinks in the cache,
sinks that are new, tokens in the ring and new tokens; the blocks of these four ranges are dealt out evenly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._common.numerics import LN2, LOG2E, cast, widen_if_interpreted
from ..interval_attention.pairs import add_infinities, finite_part
from .heads import Layout, Parts, load_parts, rotate, tokens_of_row, widen

SINKS, RING, NEW = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # where keys lie


class Flags(NamedTuple):
    """Constants of a call."""

    GROUP: int  # query heads per key head
    KEYS: Layout
    VALUES: int  # elements of a value, padded
    ROTATED: bool  # keys are rotated in the cache, not where they are read
    ABSOLUTE: bool
    TOGETHER: bool
    MASKED: bool  # rows of a tile see different keys
    WIDE: bool  # scores are products of fp32
    SPLIT: bool
    PRECISION: str


class Results(NamedTuple):
    """out [B, T, Hq, Dv], lse [B, T, Hq] and sink logits [Hq] or None; of several splits, sums [rows, splits, Dv] of values, and
    stats [rows, splits, 2]: the largest score, and the sum of exp(score - largest)."""

    out: Any
    lse: Any
    sink_logits: Any
    sums: Any
    stats: Any


class Places(NamedTuple):
    """Keys and values of one head, rows `stride` apart, and scales of the rows or None."""

    k: Any
    k_stride: Any
    k_scale: Any
    v: Any
    v_stride: Any
    v_scale: Any


class View(NamedTuple):
    """Rows of a tile see tokens [lowest, stop) [BM]."""

    lowest: Any
    stop: Any


@triton.jit
def _weights(scores, top):
    """exp(scores - top), 1 for the largest where it is infinite; units of log2 begin behind the difference."""
    return tl.where(scores == top, 1.0, tl.exp2((scores - top) * LOG2E))


@triton.jit
def _finite(top):
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _dot(a, b, FLAGS: tl.constexpr):
    return tl.dot(widen_if_interpreted(a), widen_if_interpreted(b), input_precision=FLAGS.PRECISION)


@triton.jit
def _operand(x, dtype: tl.constexpr, FLAGS: tl.constexpr):
    """x for the scores: fp32, or in the type of the tokens, which holds what is in any ring exactly."""
    if FLAGS.WIDE:
        return widen(x)
    else:
        return x if x.dtype == dtype else cast(widen(x), dtype)


@triton.jit
def _operands(x, dtype: tl.constexpr, FLAGS: tl.constexpr):
    return Parts(_operand(x.a, dtype, FLAGS), _operand(x.b, dtype, FLAGS), _operand(x.rest, dtype, FLAGS))


@triton.jit
def _scores(q, k, FLAGS: tl.constexpr):
    """[BM, BN] of `Parts`."""
    if FLAGS.KEYS.PAIRS > 0:
        scores = _dot(q.a, tl.trans(k.a), FLAGS) + _dot(q.b, tl.trans(k.b), FLAGS)
        if FLAGS.KEYS.REST > 0:
            scores += _dot(q.rest, tl.trans(k.rest), FLAGS)
        return scores
    else:
        return _dot(q.rest, tl.trans(k.rest), FLAGS)


@triton.jit
def _walk(
    acc, top, total, q, places, view, sizes, turns, origin, before, low, high, first, last, d, dv, scale, dtype: tl.constexpr,
    SOURCE: tl.constexpr, FLAGS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Blocks first..last - 1 of tokens [low, high) in the running softmax: acc [BM, BDV], top and total [BM]."""
    MASKED: tl.constexpr = FLAGS.MASKED and SOURCE != SINKS  # all rows see the sinks in the cache
    for n in range(first, last):
        token = low + n * BN + tl.arange(0, BN)
        inside = token < high
        place = token
        if SOURCE == RING:
            place = origin + token
            place = tl.where(place < 0, place + sizes.ring, place)
        at = place.to(tl.int64)
        raw = load_parts(places.k, at * places.k_stride, inside, sizes.pairs, d, FLAGS.KEYS)
        keys = _operands(raw, dtype, FLAGS)
        if FLAGS.KEYS.PAIRS > 0 and (SOURCE == NEW or not FLAGS.ROTATED):
            keys = rotate(keys, token if SOURCE == SINKS else before + token, turns)
        scores = _scores(q, keys, FLAGS) * scale  # [BM, BN]
        if places.k_scale is not None:
            scores *= tl.load(places.k_scale + at, inside, other=0.0)[None, :]
        keep = inside[None, :]
        if MASKED:
            keep = keep & (token[None, :] >= view.lowest[:, None]) & (token[None, :] < view.stop[:, None])
        scores = tl.where(keep, scores + (scores - scores), float("-inf"))  # NaN where infinite, as the definition says
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = _finite(new_top)
        p = _weights(scores, shift[:, None])
        rescale = _weights(top, shift)
        cols = tl.arange(0, FLAGS.VALUES)[None, :]
        v = tl.load(places.v + at[:, None] * places.v_stride + cols, inside[:, None] & (cols < dv), other=0)
        if places.v_scale is not None:
            v = cast(widen(v) * tl.load(places.v_scale + at, inside, other=0.0)[:, None], dtype)
        values, nonfinite = finite_part(v, 0, MASKED)
        acc = acc * rescale[:, None] + _dot(cast(p, dtype), values, FLAGS)
        if nonfinite > 0:
            acc = add_infinities(acc, keep, v, FLAGS)
        total = total * rescale + tl.sum(p, 1)
        top = new_top
    return acc, top, total


@triton.jit
def _share(begin, end, offset, count):
    """Of blocks begin..end - 1 of a tile those in a range that is behind `offset` others and has `count`."""
    return tl.minimum(tl.maximum(begin - offset, 0), count), tl.minimum(tl.maximum(end - offset, 0), count)


@triton.jit
def _store(results, acc, top, total, row, h, stored, live, dv):
    """Results of rows [N] with query heads h: acc [N, BDV] over total, the sink logit added; 0 and -inf where not live."""
    if results.sink_logits is not None:
        logit = tl.load(results.sink_logits + h)
        new_top = tl.maximum(top, logit)
        shift = _finite(new_top)
        rescale = _weights(top, shift)
        total = total * rescale + _weights(logit, shift)
        acc = acc * rescale[:, None]
        top = new_top
    empty = (total == 0.0) | (live == 0)
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), _finite(top) + tl.log2(total) * LN2)
    out = tl.where(live[:, None], acc / total[:, None], 0.0)
    tl.store(results.lse + row, lse, stored)
    cols = tl.arange(0, acc.shape[1])[None, :]
    out_ptr = results.out + row[:, None] * dv + cols
    tl.store(out_ptr, cast(out, results.out.dtype.element_ty), stored[:, None] & (cols < dv))


@triton.jit(do_not_specialize=["width", "tiles", "splits"])
def sink_attention_step_attend_kernel(
    q, k, v, cache, stream, turns_ptr, results, sizes, width, tiles, splits, scale, rotary_scale,
    FLAGS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    split, number = number % splits, number // splits
    tile, number = number % tiles, number // tiles
    kv_head, b = (number % sizes.kv_heads).to(tl.int64), (number // sizes.kv_heads).to(tl.int64)
    dtype: tl.constexpr = q.ptr.dtype.element_ty
    before, count = tokens_of_row(stream, b, width)

    # What the rows see.
    rows = tile * BM + tl.arange(0, BM)
    t = rows // FLAGS.GROUP
    h = kv_head * FLAGS.GROUP + rows % FLAGS.GROUP
    live = t < count
    first_t = tile * BM // FLAGS.GROUP
    last_t = tl.minimum((tile * BM + BM - 1) // FLAGS.GROUP, count - 1)
    stop = t + 1
    first_stop = first_t + 1
    high = last_t + 1
    if FLAGS.TOGETHER:
        stop = t * 0 + count
        first_stop = count
        high = count
    oldest = tl.maximum(sizes.sinks, tl.load(stream.first + b)) - before
    oldest = tl.minimum(tl.maximum(oldest, -sizes.ring), width).to(tl.int32)
    low = tl.maximum(oldest, first_stop - sizes.window).to(tl.int32)
    sinks = tl.minimum(sizes.sinks, before).to(tl.int32)  # in the cache
    new_sinks = tl.minimum(tl.maximum(sizes.sinks - before, 0), high).to(tl.int32)
    if first_t >= count:
        sinks = 0
        new_sinks = 0
        low = width
        high = 0

    # This program's share.
    in_sinks = tl.cdiv(sinks, BN)
    in_new_sinks = tl.cdiv(new_sinks, BN)
    in_ring = tl.cdiv(tl.maximum(-low, 0), BN)
    new_low = tl.maximum(low, 0)
    in_new = tl.cdiv(tl.maximum(high - new_low, 0), BN)
    share = tl.cdiv(in_sinks + in_new_sinks + in_ring + in_new, splits)
    begin = split * share
    end = begin + share

    turns = tl.zeros([1], tl.int64)
    if FLAGS.KEYS.PAIRS > 0:
        f = tl.arange(0, FLAGS.KEYS.PAIRS)
        turns = tl.load(turns_ptr + f, f < sizes.pairs, other=0)
    q_offsets = b * q.stride_b + t.to(tl.int64) * q.stride_t + h * q.stride_h
    raw = load_parts(q.ptr, q_offsets, live, sizes.pairs, q.width, FLAGS.KEYS)
    query = _operands(raw, dtype, FLAGS)
    if FLAGS.KEYS.PAIRS > 0:
        query = Parts(query.a * rotary_scale, query.b * rotary_scale, query.rest)
    new = Places(
        k.ptr + b * k.stride_b + kv_head * k.stride_h, k.stride_t, None,
        v.ptr + b * v.stride_b + kv_head * v.stride_h, v.stride_t, None,
    )  # fmt: skip
    head = b * sizes.kv_heads + kv_head
    held = Places(
        cache.sink_k + head * sizes.sinks * k.width, k.width, None,
        cache.sink_v + head * sizes.sinks * v.width, v.width, None,
    )  # fmt: skip
    acc = tl.zeros([BM, FLAGS.VALUES], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)

    # Sinks: where tokens between them and the window are forgotten, they are nearer than in the sequence.
    far = query
    if FLAGS.KEYS.PAIRS > 0:
        at = before + t
        if not FLAGS.ABSOLUTE:
            gone = tl.maximum(before + stop - sizes.sinks - sizes.window, tl.load(stream.first + b) - sizes.sinks)
            at -= tl.maximum(gone, 0)
        far = rotate(query, at, turns)
    first, last = _share(begin, end, 0, in_sinks)
    view = View(t * 0, stop)
    acc, top, total = _walk(
        acc, top, total, far, held, view, sizes, turns, 0, before, 0, sinks, first, last, k.width, v.width, scale, dtype,
        SINKS, FLAGS, BN,
    )  # fmt: skip
    first, last = _share(begin, end, in_sinks, in_new_sinks)
    acc, top, total = _walk(
        acc, top, total, far, new, view, sizes, turns, 0, before, 0, new_sinks, first, last, k.width, v.width, scale, dtype,
        NEW, FLAGS, BN,
    )  # fmt: skip

    # The window.
    near = query
    if FLAGS.KEYS.PAIRS > 0:
        near = rotate(query, before + t, turns)
    view = View(tl.maximum(oldest, stop - sizes.window), stop)
    scales = head * sizes.ring
    ring = Places(
        cache.ring_k + head * sizes.ring * k.width, k.width, None if cache.k_scale is None else cache.k_scale + scales,
        cache.ring_v + head * sizes.ring * v.width, v.width, None if cache.v_scale is None else cache.v_scale + scales,
    )  # fmt: skip
    origin = (tl.maximum(before - sizes.sinks, 0) % sizes.ring).to(tl.int32)
    offset = in_sinks + in_new_sinks
    first, last = _share(begin, end, offset, in_ring)
    acc, top, total = _walk(
        acc, top, total, near, ring, view, sizes, turns, origin, before, low, 0, first, last, k.width, v.width, scale, dtype,
        RING, FLAGS, BN,
    )  # fmt: skip
    first, last = _share(begin, end, offset + in_ring, in_new)
    acc, top, total = _walk(
        acc, top, total, near, new, view, sizes, turns, 0, before, new_low, high, first, last, k.width, v.width, scale, dtype,
        NEW, FLAGS, BN,
    )  # fmt: skip

    stored = t < width
    row = (b * width + t) * sizes.kv_heads * FLAGS.GROUP + h
    if FLAGS.SPLIT:
        at = row * splits + split
        tl.store(results.stats + 2 * at, top, stored)
        tl.store(results.stats + 2 * at + 1, total, stored)
        cols = tl.arange(0, FLAGS.VALUES)[None, :]
        tl.store(results.sums + at[:, None] * v.width + cols, acc, stored[:, None] & (cols < v.width))
    else:
        _store(results, acc, top, total, row, h, stored, live, v.width)


@triton.jit(do_not_specialize=["width", "splits"])
def sink_attention_step_merge_kernel(
    stream, results, width, heads, splits, dv, BS: tl.constexpr, ALL: tl.constexpr, BDV: tl.constexpr
):
    """One row: the shares of its keys, BS at a time, and the sink logit once."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    b = tl.program_id(0) // heads // width
    t = tl.program_id(0) // heads % width
    _, count = tokens_of_row(stream, b, width)
    stats_ptr = results.stats + 2 * row * splits
    s = tl.arange(0, ALL)
    tops = tl.load(stats_ptr + 2 * s, s < splits, other=float("-inf"))
    top = tl.max(tops[None, :], 1)  # [1]
    shift = _finite(top)
    totals = tl.load(stats_ptr + 2 * s + 1, s < splits, other=0.0)
    total = tl.sum((totals * _weights(tops, shift))[None, :], 1)
    acc = tl.zeros([1, BDV], tl.float32)
    cols = tl.arange(0, BDV)[None, :]
    for first in range(0, splits, BS):
        own = first + tl.arange(0, BS)
        weight = _weights(tl.load(stats_ptr + 2 * own, own < splits, other=float("-inf")), shift)
        at = row * splits + own
        part = tl.load(results.sums + at[:, None] * dv + cols, (own < splits)[:, None] & (cols < dv), other=0.0)
        acc += tl.sum(part * weight[:, None], 0)[None, :]
    always = row >= 0
    _store(results, acc, top, total, row, tl.program_id(0) % heads, always, t + row * 0 < count, dv)
