"""Interval attention: softmax attention where every query row sees a few key intervals; forward and backward.

Three kernels: the forward; dQ, which also makes delta = rowsum(dO * O) - dlse; dK and dV. No atomics: each program owns what it
writes, and sums in a fixed order. Tiles that no row sees are not visited, and tiles that every row of a program sees wholly go
through a loop without predicates.

Plain masks (causal, sink + window, full) find their tiles in closed form. Masks in tensors bring a plan: for every tile of PLAN_Q
rows the tiles of PLAN_K keys, those seen in part before those seen wholly, and the transpose for dK and dV.

Hidden pairs have weight 0, but 0 * NaN is NaN: where a tile is seen in part, non-finite elements are taken out of the product,
and what they do to the rows that do see them is added afterwards.

Sources: FlashAttention (arXiv 2205.14135) for the running softmax and its backward; the plan is this project's.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._common.aot import AotCase
from ._common.numerics import cast, is_finite, widen_if_interpreted

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PLAN_Q, PLAN_K = tl.constexpr(128), tl.constexpr(64)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a @ b in fp32; operands in the input dtype."""
    return tl.dot(widen_if_interpreted(a), widen_if_interpreted(b), input_precision=PRECISION)


@triton.jit
def _add_product(acc, weights, x, keep, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """acc + weights @ x. With MASKED, weights is 0 where keep is not set, and x counts only where it is."""
    w = cast(weights, x.dtype)
    if not MASKED:
        return acc + _dot(w, x, PRECISION)
    wide = x.to(tl.float32)
    finite = is_finite(wide)
    acc += _dot(w, cast(tl.where(finite, wide, 0.0), x.dtype), PRECISION)
    if tl.max(tl.where(finite, 0, 1)) > 0:
        seen = tl.where(keep, 1.0, 0.0)
        up = tl.dot(seen, tl.where(wide == float("inf"), 1.0, 0.0), input_precision="tf32")
        down = tl.dot(seen, tl.where(wide == float("-inf"), 1.0, 0.0), input_precision="tf32")
        none = tl.dot(seen, tl.where(wide != wide, 1.0, 0.0), input_precision="tf32")
        acc = tl.where(up > 0, acc + float("inf"), acc)
        acc = tl.where(down > 0, acc - float("inf"), acc)
        acc = tl.where(none > 0, float("nan"), acc)
    return acc


@triton.jit
def _visible(
    rows, cols, starts_ptr, ends_ptr, life_ptr, death_ptr, bias, tq, tk, sink_tokens, window, slot,
    PLANNED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, M: tl.constexpr, SLOTS: tl.constexpr,
    LIFETIME: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """bool [rows, cols]: which pairs the mask, the lifetimes and biases of -inf leave."""
    live = rows < tq
    keep = live[:, None] & (cols < tk)[None, :]
    if PLANNED:
        at = rows.to(tl.int64) * M
        inside = tl.zeros([rows.shape[0], cols.shape[0]], tl.int1)
        if SLOTS > 1:
            s = tl.load(starts_ptr + at + slot, live, other=0)
            e = tl.load(ends_ptr + at + slot, live, other=0)
            inside = (cols[None, :] >= s[:, None]) & (cols[None, :] < e[:, None])
        else:
            for r in range(M):
                s = tl.load(starts_ptr + at + r, live, other=0)
                e = tl.load(ends_ptr + at + r, live, other=0)
                inside = inside | ((cols[None, :] >= s[:, None]) & (cols[None, :] < e[:, None]))
        keep = keep & inside
    elif CAUSAL:
        i = rows + (tk - tq)
        keep = keep & (cols[None, :] <= i[:, None])
        if WINDOWED:
            keep = keep & ((cols < sink_tokens)[None, :] | (i[:, None] - cols[None, :] < window))
    if LIFETIME:
        first = tl.load(life_ptr + cols, cols < tk, other=0)
        last = tl.load(death_ptr + cols, cols < tk, other=0)
        keep = keep & (rows[:, None] >= first[None, :]) & (rows[:, None] < last[None, :])
    if BIAS:
        keep = keep & (bias > float("-inf"))[None, :]
    return keep


@triton.jit
def _load_rows(ptr, rows, stride, count, cols, width):
    """[rows, cols] of a matrix whose rows are `stride` apart; 0 outside."""
    offsets = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    return tl.load(ptr + offsets, (rows < count)[:, None] & (cols < width)[None, :], other=0.0)


@triton.jit
def _load_bias(bias_ptr, cols, tk, BIAS: tl.constexpr):
    """Biases of keys in units of log2; 0 without."""
    if BIAS:
        return tl.load(bias_ptr + cols, cols < tk, other=0.0) * LOG2E
    return tl.zeros([cols.shape[0]], tl.float32)


@triton.jit
def _key_tiles(
    first_row, last_row, tq, tk, sink_tokens, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PLAIN: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Tiles of keys that rows [first_row, last_row] see under a plain mask: [0, sinks), [low, high), of the latter
    [full_low, full_high) wholly (none without PLAIN)."""
    tiles = tl.cdiv(tk, BN)
    whole = tk // BN
    sinks = 0
    low = 0
    high = tiles
    full_low = 0
    full_high = whole
    if CAUSAL:
        i0 = first_row + (tk - tq)
        i1 = last_row + (tk - tq)
        high = tl.minimum(tiles, tl.cdiv(tl.maximum(i1 + 1, 0), BN))
        full_high = tl.minimum(whole, tl.maximum(i0 + 1, 0) // BN)
        if WINDOWED:
            sinks = tl.minimum(tl.cdiv(sink_tokens, BN), high)
            low = tl.maximum(sinks, tl.maximum(i0 - window + 1, 0) // BN)
            low = tl.minimum(low, high)
            full_low = tl.cdiv(tl.maximum(i1 - window + 1, 0), BN)
    full_low = tl.minimum(tl.maximum(full_low, low), high)
    full_high = tl.minimum(tl.maximum(full_high, full_low), high)
    if not PLAIN:
        full_high = full_low
    return sinks, low, full_low, full_high, high


@triton.jit
def _fwd_tile(
    acc, top, total, q, k_ptr, v_ptr, k_stride, v_stride, bias_ptr, starts_ptr, ends_ptr, life_ptr, death_ptr,
    rows, start, tq, tk, d, dv, sink_tokens, window, slot, scale2,
    MASKED: tl.constexpr, PLANNED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, M: tl.constexpr,
    SLOTS: tl.constexpr, LIFETIME: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    cols = start + tl.arange(0, BN)
    k = _load_rows(k_ptr, cols, k_stride, tk, tl.arange(0, BD), d)
    v = _load_rows(v_ptr, cols, v_stride, tk, tl.arange(0, BDV), dv)
    scores = _dot(q, tl.trans(k), PRECISION) * scale2
    bias = _load_bias(bias_ptr, cols, tk, BIAS)
    if BIAS:
        scores += bias[None, :]
    keep = scores == scores
    if MASKED:
        keep = _visible(
            rows, cols, starts_ptr, ends_ptr, life_ptr, death_ptr, bias, tq, tk, sink_tokens, window, slot,
            PLANNED, CAUSAL, WINDOWED, M, SLOTS, LIFETIME, BIAS,
        )  # fmt: skip
        scores = tl.where(keep, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - shift[:, None])
    factor = tl.exp2(top - shift)
    acc = _add_product(acc * factor[:, None], weights, v, keep, MASKED, PRECISION)
    return acc, new_top, total * factor + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["tq", "tk", "sink_tokens", "window", "nq", "nk"])
def _interval_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, ends_ptr, life_ptr, death_ptr, bias_ptr, sinks_ptr, count_ptr, list_ptr,
    out_ptr, lse_ptr,
    q_b, q_t, q_h, q_s, k_b, k_t, k_h, v_b, v_t, v_h, mask_b, mask_h, life_b, life_h, bias_b, bias_h,
    heads, tq, tk, nq, nk, d, dv, sink_tokens, window, scale,
    GROUP: tl.constexpr, PLANNED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, M: tl.constexpr,
    SLOTS: tl.constexpr, LIFETIME: tl.constexpr, BIAS: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    PLAIN: tl.constexpr = not (LIFETIME or BIAS)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = tl.program_id(1) % heads
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    k_ptr += b * k_b + (h // GROUP) * k_h
    v_ptr += b * v_b + (h // GROUP) * v_h
    bias_ptr += b * bias_b + h * bias_h
    life_ptr += b * life_b + h * life_h
    death_ptr += b * life_b + h * life_h
    starts_ptr += (b * mask_b + h * mask_h) * tq * M
    ends_ptr += (b * mask_b + h * mask_h) * tq * M
    scale2 = scale * LOG2E
    acc = tl.zeros([BM, BDV], tl.float32)
    if SINKS:
        top = tl.zeros([BM], tl.float32) + tl.load(sinks_ptr + h) * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0 + (top - top))  # NaN beside infinity
    else:
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
    for slot in range(SLOTS):
        q = _load_rows(q_ptr + b * q_b + h * q_h + slot * q_s, rows, q_t, tq, tl.arange(0, BD), d)
        if PLANNED:
            at = ((b * mask_b + h * mask_h) * SLOTS + slot) * nq + tl.program_id(0) * BM // PLAN_Q
            parts = tl.load(count_ptr + 2 * at) * (PLAN_K // BN)
            both = parts + tl.load(count_ptr + 2 * at + 1) * (PLAN_K // BN)
            for n in range(parts):
                start = tl.load(list_ptr + at * nk + n // (PLAN_K // BN)) * PLAN_K + n % (PLAN_K // BN) * BN
                acc, top, total = _fwd_tile(
                    acc, top, total, q, k_ptr, v_ptr, k_t, v_t, bias_ptr, starts_ptr, ends_ptr, life_ptr, death_ptr,
                    rows, start, tq, tk, d, dv, sink_tokens, window, slot, scale2,
                    True, PLANNED, CAUSAL, WINDOWED, M, SLOTS, LIFETIME, BIAS, PRECISION, BN, BD, BDV,
                )  # fmt: skip
            for n in range(parts, both):
                start = tl.load(list_ptr + at * nk + n // (PLAN_K // BN)) * PLAN_K + n % (PLAN_K // BN) * BN
                acc, top, total = _fwd_tile(
                    acc, top, total, q, k_ptr, v_ptr, k_t, v_t, bias_ptr, starts_ptr, ends_ptr, life_ptr, death_ptr,
                    rows, start, tq, tk, d, dv, sink_tokens, window, slot, scale2,
                    not PLAIN, PLANNED, CAUSAL, WINDOWED, M, SLOTS, LIFETIME, BIAS, PRECISION, BN, BD, BDV,
                )  # fmt: skip
        else:
            first = tl.program_id(0) * BM
            sinks, low, full_low, full_high, high = _key_tiles(
                first, tl.minimum(first + BM, tq) - 1, tq, tk, sink_tokens, window, CAUSAL, WINDOWED, PLAIN, BN
            )
            masked = sinks + (full_low - low) + (high - full_high)
            for n in range(masked):
                tile = tl.where(n < sinks, n, n - sinks + low)
                tile = tl.where(tile >= full_low, tl.where(n < sinks, tile, tile + full_high - full_low), tile)
                acc, top, total = _fwd_tile(
                    acc, top, total, q, k_ptr, v_ptr, k_t, v_t, bias_ptr, starts_ptr, ends_ptr, life_ptr, death_ptr,
                    rows, tile * BN, tq, tk, d, dv, sink_tokens, window, slot, scale2,
                    True, PLANNED, CAUSAL, WINDOWED, M, SLOTS, LIFETIME, BIAS, PRECISION, BN, BD, BDV,
                )  # fmt: skip
            for tile in range(full_low, full_high):
                acc, top, total = _fwd_tile(
                    acc, top, total, q, k_ptr, v_ptr, k_t, v_t, bias_ptr, starts_ptr, ends_ptr, life_ptr, death_ptr,
                    rows, tile * BN, tq, tk, d, dv, sink_tokens, window, slot, scale2,
                    False, PLANNED, CAUSAL, WINDOWED, M, SLOTS, LIFETIME, BIAS, PRECISION, BN, BD, BDV,
                )  # fmt: skip
    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    row = (b * tq + rows) * heads + h
    tl.store(lse_ptr + row, tl.where(empty, float("-inf"), (tl.where(empty, 0.0, top) + tl.log2(safe)) * LN2), rows < tq)
    cols = tl.arange(0, BDV)
    out = cast(acc / safe[:, None], out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * dv + cols[None, :], out, (rows < tq)[:, None] & (cols < dv)[None, :])
