"""New tokens enter the cache, after all have attended; then the counters."""

from __future__ import annotations

import triton
import triton.language as tl

from .._common.numerics import cast
from .heads import FP8_MAX, INT8_MAX, Parts, load_parts, quantise, rotate, store_parts, tokens_of_row, widen


@triton.jit
def _largest(x):
    """Largest magnitude of every row of fp32 x [N, width], NaN where there is one."""
    most = tl.max(tl.abs(x), 1)
    return tl.where(tl.max(tl.where(x == x, 0, 1), 1) > 0, float("nan"), most)


@triton.jit
def _enter(
    x, sink_ptr, ring_ptr, scale_ptr, b, t, h, to_sink, to_ring, token, sizes, turns, pairs, LAYOUT: tl.constexpr
):  # fmt: skip
    """Keys, or values, of tokens t and heads h [N] to their places."""
    offsets = b * x.stride_b + t.to(tl.int64) * x.stride_t + h.to(tl.int64) * x.stride_h
    raw = load_parts(x.ptr, offsets, to_sink | to_ring, pairs, x.width, LAYOUT)
    wide = Parts(widen(raw.a), widen(raw.b), widen(raw.rest))
    if LAYOUT.PAIRS > 0:
        wide = rotate(wide, token, turns)
    dtype: tl.constexpr = sink_ptr.dtype.element_ty
    rounded = Parts(cast(wide.a, dtype), cast(wide.b, dtype), cast(wide.rest, dtype))
    head = b * sizes.kv_heads + h
    store_parts(rounded, sink_ptr, (head * sizes.sinks + token) * x.width, to_sink, pairs, x.width, LAYOUT)
    place = head * sizes.ring + tl.where(to_ring, token - sizes.sinks, 0) % sizes.ring
    if scale_ptr is not None:
        kind: tl.constexpr = ring_ptr.dtype.element_ty
        MOST: tl.constexpr = INT8_MAX if kind == tl.int8 else FP8_MAX
        most = tl.maximum(_largest(wide.a), _largest(wide.b), propagate_nan=tl.PropagateNan.ALL)
        most = tl.maximum(most, _largest(wide.rest), propagate_nan=tl.PropagateNan.ALL)
        scale = tl.where(most == 0.0, 1.0, tl.div_rn(most, tl.full(most.shape, MOST, tl.float32)))
        tl.store(scale_ptr + place, scale, to_ring)
        per_row = scale[:, None]
        rounded = Parts(
            quantise(wide.a, per_row, kind), quantise(wide.b, per_row, kind), quantise(wide.rest, per_row, kind)
        )
    store_parts(rounded, ring_ptr, place * x.width, to_ring, pairs, x.width, LAYOUT)


@triton.jit(do_not_specialize=["width"])
def sink_attention_step_enter_kernel(
    k, v, cache, stream, turns_ptr, sizes, width, KEYS: tl.constexpr, VALUES: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """BM rows of (token, head) of one batch row."""
    tiles = tl.cdiv(width * sizes.kv_heads, BM)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    t, h = rows // sizes.kv_heads, rows % sizes.kv_heads
    before, count = tokens_of_row(stream, b, width)
    token = before + t
    to_sink = (t < count) & (token < sizes.sinks)
    to_ring = (t < count) & (token >= sizes.sinks) & (t >= count - sizes.ring)  # others would be overwritten
    turns = tl.zeros([1], tl.int64)
    if KEYS.PAIRS > 0:
        f = tl.arange(0, KEYS.PAIRS)
        turns = tl.load(turns_ptr + f, f < sizes.pairs, other=0)
    _enter(
        k, cache.sink_k, cache.ring_k, cache.k_scale, b, t, h, to_sink, to_ring, token, sizes, turns, sizes.pairs, KEYS
    )
    _enter(v, cache.sink_v, cache.ring_v, cache.v_scale, b, t, h, to_sink, to_ring, token, sizes, turns, 0, VALUES)


@triton.jit(do_not_specialize=["width"])
def sink_attention_step_count_kernel(stream, written_ptr, batch, width, ADVANCE: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    some = b < batch
    before = tl.maximum(tl.load(stream.seen + b, some, other=0), 0)
    after = before + width
    if stream.tokens is not None:
        after = before + tl.minimum(tl.maximum(tl.load(stream.tokens + b, some, other=0), 0), width)
    tl.store(stream.seen + b, after if ADVANCE else before, some)
    tl.store(written_ptr + b, tl.maximum(tl.load(written_ptr + b, some, other=0), after), some)
