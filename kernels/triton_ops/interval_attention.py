"""Interval attention: softmax attention where every query row sees a few key intervals; forward and backward.

Three kernels: the forward; dQ, which also makes delta = rowsum(dO * O) - dlse; dK and dV. No atomics: each program owns what it
writes, and sums in a fixed order. Tiles that no row sees are not visited, and tiles that every row of a program sees wholly go
through a loop without predicates.

Plain masks (causal, sink + window, full) find their tiles in closed form. Masks in tensors bring a plan: for every tile of PLAN_Q
rows the tiles of PLAN_K keys, those seen in part before those seen wholly, and the transpose for dK and dV.

Hidden pairs have weight 0, but 0 * NaN is NaN: where a tile is seen in part, non-finite elements are taken out of the product,
and put where they are seen after the last tile.

Sources: FlashAttention (arXiv 2205.14135) for the running softmax and its backward; the plan is this project's.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._common.aot import AotCase
from ._common.intervals import (
    LOG2E,
    PLAN_K,
    PLAN_Q,
    add_nonfinite,
    dot,
    finite_part,
    launch_options,
    load_bias,
    load_lse2,
    load_rows,
    visible,
    visited,
    visits,
)
from ._common.numerics import cast

LN2 = tl.constexpr(0.6931471805599453)
MAX_GRID = 65535  # programs in the second and third dimension


@triton.jit
def _fwd_tile(
    acc, top, total, bad, q, k_ptr, v_ptr, k_stride, v_stride, bias_ptr, starts_ptr, ends_ptr, life_ptr, death_ptr,
    rows, start, tq, tk, d, dv, sink_tokens, window, slot, scale2,
    MASKED: tl.constexpr, PLANNED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, M: tl.constexpr,
    SLOTS: tl.constexpr, LIFETIME: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    cols = start + tl.arange(0, BN)
    k = load_rows(k_ptr, start, k_stride, tk, d, BN, BD)
    v = load_rows(v_ptr, start, v_stride, tk, dv, BN, BDV)
    scores = dot(q, tl.trans(k), PRECISION) * scale2
    bias = load_bias(bias_ptr, cols, tk, BIAS)
    if BIAS:
        scores += bias[None, :]
    if MASKED:
        keep = visible(
            rows, cols, starts_ptr, ends_ptr, life_ptr, death_ptr, bias, tq, tk, sink_tokens, window, slot,
            False, PLANNED, CAUSAL, WINDOWED, M, SLOTS, LIFETIME, BIAS,
        )  # fmt: skip
        scores = tl.where(keep, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - shift[:, None])
    factor = tl.exp2(top - shift)
    values, bad = finite_part(v, bad, MASKED)
    acc = acc * factor[:, None] + dot(cast(weights, v.dtype), values, PRECISION)
    return acc, new_top, total * factor + tl.sum(weights, 1), bad


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
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1)
    first = tl.program_id(0) * BM
    rows = first + tl.arange(0, BM)
    k_ptr += b * k_b + (h // GROUP).to(tl.int64) * k_h
    v_ptr += b * v_b + (h // GROUP).to(tl.int64) * v_h
    bias_ptr += b * bias_b + h.to(tl.int64) * bias_h
    life_ptr += b * life_b + h.to(tl.int64) * life_h
    death_ptr += b * life_b + h.to(tl.int64) * life_h
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
        bad = 0
        q = load_rows(q_ptr + b * q_b + h.to(tl.int64) * q_h + slot * q_s, first, q_t, tq, d, BM, BD)
        entry = ((b * mask_b + h * mask_h) * SLOTS + slot) * nq + first // PLAN_Q
        masked, both, sinks, low, full_low, full_high = visits(
            count_ptr + 2 * entry, first, tl.minimum(first + BM, tq) - 1, tq, tk, sink_tokens, window,
            True, PLANNED, CAUSAL, WINDOWED, PLAIN, BN,
        )  # fmt: skip
        for n in range(masked):
            start = visited(n, masked, sinks, low, full_low, full_high, list_ptr + entry * nk, True, PLANNED, BN)
            acc, top, total, bad = _fwd_tile(
                acc, top, total, bad, q, k_ptr, v_ptr, k_t, v_t, bias_ptr, starts_ptr, ends_ptr, life_ptr, death_ptr,
                rows, start, tq, tk, d, dv, sink_tokens, window, slot, scale2,
                True, PLANNED, CAUSAL, WINDOWED, M, SLOTS, LIFETIME, BIAS, PRECISION, BN, BD, BDV,
            )  # fmt: skip
        for n in range(masked, both):
            start = visited(n, masked, sinks, low, full_low, full_high, list_ptr + entry * nk, True, PLANNED, BN)
            acc, top, total, bad = _fwd_tile(
                acc, top, total, bad, q, k_ptr, v_ptr, k_t, v_t, bias_ptr, starts_ptr, ends_ptr, life_ptr, death_ptr,
                rows, start, tq, tk, d, dv, sink_tokens, window, slot, scale2,
                not PLAIN, PLANNED, CAUSAL, WINDOWED, M, SLOTS, LIFETIME, BIAS, PRECISION, BN, BD, BDV,
            )  # fmt: skip
        if bad > 0:
            for n in range(masked if PLAIN else both):
                start = visited(n, masked, sinks, low, full_low, full_high, list_ptr + entry * nk, True, PLANNED, BN)
                for j in range(BN):
                    key = start + j + tl.arange(0, 1)
                    keep = visible(
                        rows, key, starts_ptr, ends_ptr, life_ptr, death_ptr, load_bias(bias_ptr, key, tk, BIAS),
                        tq, tk, sink_tokens, window, slot, False, PLANNED, CAUSAL, WINDOWED, M, SLOTS, LIFETIME, BIAS,
                    )  # fmt: skip
                    acc = add_nonfinite(acc, keep, v_ptr, start + j, v_t, tk, dv)
    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    row = (b * tq + rows) * heads + h
    tl.store(
        lse_ptr + row, tl.where(empty, float("-inf"), (tl.where(empty, 0.0, top) + tl.log2(safe)) * LN2), rows < tq
    )
    cols = tl.arange(0, BDV)
    out = cast(acc / safe[:, None], out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * dv + cols[None, :], out, (rows < tq)[:, None] & (cols < dv)[None, :])


@triton.jit
def _pair(
    q, k, grad, v, lse2, delta, bias, keep, scale2,
    MASKED: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(weights, gradients of the scores) of a tile, keys down and rows across: [BN, BM]."""
    scores = dot(k, tl.trans(q), PRECISION) * scale2
    if BIAS:
        scores += bias[:, None]
    weights = tl.exp2(scores - lse2[None, :])
    d = weights * (dot(v, tl.trans(grad), PRECISION) - delta[None, :])
    if MASKED:
        weights = tl.where(keep, weights, 0.0)
        d = tl.where(keep, d, 0.0)
    return weights, d


@triton.jit
def _dq_tile(
    dq, bad, q, grad, lse2, delta, k_ptr, v_ptr, k_stride, v_stride, bias_ptr, starts_ptr, ends_ptr, life_ptr, death_ptr,
    rows, start, tq, tk, d, dv, sink_tokens, window, slot, scale2,
    MASKED: tl.constexpr, PLANNED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, M: tl.constexpr,
    SLOTS: tl.constexpr, LIFETIME: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    cols = start + tl.arange(0, BN)
    k = load_rows(k_ptr, start, k_stride, tk, d, BN, BD)
    v = load_rows(v_ptr, start, v_stride, tk, dv, BN, BDV)
    bias = load_bias(bias_ptr, cols, tk, BIAS)
    scores = dot(q, tl.trans(k), PRECISION) * scale2
    if BIAS:
        scores += bias[None, :]
    weights = tl.exp2(scores - lse2[:, None])
    ds = weights * (dot(grad, tl.trans(v), PRECISION) - delta[:, None])
    if MASKED:
        keep = visible(
            rows, cols, starts_ptr, ends_ptr, life_ptr, death_ptr, bias, tq, tk, sink_tokens, window, slot,
            False, PLANNED, CAUSAL, WINDOWED, M, SLOTS, LIFETIME, BIAS,
        )  # fmt: skip
        ds = tl.where(keep, ds, 0.0)
    keys, bad = finite_part(k, bad, MASKED)
    return dq + dot(cast(ds, k.dtype), keys, PRECISION), bad


@triton.jit(do_not_specialize=["tq", "tk", "sink_tokens", "window", "nq", "nk"])
def _interval_attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, ends_ptr, life_ptr, death_ptr, bias_ptr, count_ptr, list_ptr,
    grad_ptr, grad_lse_ptr, out_ptr, lse_ptr, dq_ptr, delta_ptr,
    q_b, q_t, q_h, q_s, k_b, k_t, k_h, v_b, v_t, v_h, mask_b, mask_h, life_b, life_h, bias_b, bias_h,
    heads, tq, tk, nq, nk, d, dv, sink_tokens, window, scale,
    GROUP: tl.constexpr, PLANNED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, M: tl.constexpr,
    SLOTS: tl.constexpr, LIFETIME: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    PLAIN: tl.constexpr = not (LIFETIME or BIAS)
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(1)
    first = tl.program_id(0) * BM
    rows = first + tl.arange(0, BM)
    k_ptr += b * k_b + (h // GROUP).to(tl.int64) * k_h
    v_ptr += b * v_b + (h // GROUP).to(tl.int64) * v_h
    bias_ptr += b * bias_b + h.to(tl.int64) * bias_h
    life_ptr += b * life_b + h.to(tl.int64) * life_h
    death_ptr += b * life_b + h.to(tl.int64) * life_h
    starts_ptr += (b * mask_b + h * mask_h) * tq * M
    ends_ptr += (b * mask_b + h * mask_h) * tq * M
    scale2 = scale * LOG2E
    live = rows < tq
    row = (b * tq + rows) * heads + h
    values = tl.arange(0, BDV)
    at = row[:, None] * dv + values[None, :]
    inside = live[:, None] & (values < dv)[None, :]
    grad = tl.load(grad_ptr + at, inside, other=0.0)
    out = tl.load(out_ptr + at, inside, other=0.0)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1) - tl.load(grad_lse_ptr + row, live, other=0.0)
    tl.store(delta_ptr + row, delta, live)
    lse2 = load_lse2(lse_ptr, row, live)
    for slot in range(SLOTS):
        bad = 0
        q = load_rows(q_ptr + b * q_b + h.to(tl.int64) * q_h + slot * q_s, first, q_t, tq, d, BM, BD)
        dq = tl.zeros([BM, BD], tl.float32)
        entry = ((b * mask_b + h * mask_h) * SLOTS + slot) * nq + first // PLAN_Q
        masked, both, sinks, low, full_low, full_high = visits(
            count_ptr + 2 * entry, first, tl.minimum(first + BM, tq) - 1, tq, tk, sink_tokens, window,
            True, PLANNED, CAUSAL, WINDOWED, PLAIN, BN,
        )  # fmt: skip
        for n in range(masked):
            start = visited(n, masked, sinks, low, full_low, full_high, list_ptr + entry * nk, True, PLANNED, BN)
            dq, bad = _dq_tile(
                dq, bad, q, grad, lse2, delta, k_ptr, v_ptr, k_t, v_t, bias_ptr, starts_ptr, ends_ptr, life_ptr, death_ptr,
                rows, start, tq, tk, d, dv, sink_tokens, window, slot, scale2,
                True, PLANNED, CAUSAL, WINDOWED, M, SLOTS, LIFETIME, BIAS, PRECISION, BN, BD, BDV,
            )  # fmt: skip
        for n in range(masked, both):
            start = visited(n, masked, sinks, low, full_low, full_high, list_ptr + entry * nk, True, PLANNED, BN)
            dq, bad = _dq_tile(
                dq, bad, q, grad, lse2, delta, k_ptr, v_ptr, k_t, v_t, bias_ptr, starts_ptr, ends_ptr, life_ptr, death_ptr,
                rows, start, tq, tk, d, dv, sink_tokens, window, slot, scale2,
                not PLAIN, PLANNED, CAUSAL, WINDOWED, M, SLOTS, LIFETIME, BIAS, PRECISION, BN, BD, BDV,
            )  # fmt: skip
        if bad > 0:
            for n in range(masked if PLAIN else both):
                start = visited(n, masked, sinks, low, full_low, full_high, list_ptr + entry * nk, True, PLANNED, BN)
                for j in range(BN):
                    key = start + j + tl.arange(0, 1)
                    keep = visible(
                        rows, key, starts_ptr, ends_ptr, life_ptr, death_ptr, load_bias(bias_ptr, key, tk, BIAS),
                        tq, tk, sink_tokens, window, slot, False, PLANNED, CAUSAL, WINDOWED, M, SLOTS, LIFETIME, BIAS,
                    )  # fmt: skip
                    dq = add_nonfinite(dq, keep, k_ptr, start + j, k_t, tk, d)
        cols = tl.arange(0, BD)
        dq_at = (row[:, None] * SLOTS + slot) * d + cols[None, :]
        tl.store(dq_ptr + dq_at, cast(dq * scale, dq_ptr.dtype.element_ty), live[:, None] & (cols < d)[None, :])


@triton.jit
def _dkdv_tile(
    dk, dv_sum, dbias, bad, k, v, bias, q_ptr, q_stride, grad_ptr, lse_ptr, delta_ptr, heads,
    starts_ptr, ends_ptr, life_ptr, death_ptr, cols, start, tq, tk, d, dv, sink_tokens, window, slot, scale2,
    MASKED: tl.constexpr, PLANNED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, M: tl.constexpr,
    SLOTS: tl.constexpr, LIFETIME: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    rows = start + tl.arange(0, BM)
    q = load_rows(q_ptr, start, q_stride, tq, d, BM, BD)
    grad = load_rows(grad_ptr, start, heads * dv, tq, dv, BM, BDV)
    live = rows < tq
    at = rows.to(tl.int64) * heads
    lse2 = load_lse2(lse_ptr, at, live)
    delta = tl.load(delta_ptr + at, live, other=0.0)
    if MASKED:
        keep = visible(
            rows, cols, starts_ptr, ends_ptr, life_ptr, death_ptr, bias, tq, tk, sink_tokens, window, slot,
            True, PLANNED, CAUSAL, WINDOWED, M, SLOTS, LIFETIME, BIAS,
        )  # fmt: skip
    else:
        keep = tl.zeros([cols.shape[0], BM], tl.int1)
    weights, ds = _pair(q, k, grad, v, lse2, delta, bias, keep, scale2, MASKED, BIAS, PRECISION)
    grads, bad = finite_part(grad, bad, MASKED)
    queries, bad = finite_part(q, bad, MASKED)
    dv_sum += dot(cast(weights, grad.dtype), grads, PRECISION)
    dk += dot(cast(ds, q.dtype), queries, PRECISION)
    if BIAS:
        dbias += tl.sum(ds, 1)
    return dk, dv_sum, dbias, bad


@triton.jit(do_not_specialize=["tq", "tk", "sink_tokens", "window", "nq", "nk"])
def _interval_attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, starts_ptr, ends_ptr, life_ptr, death_ptr, bias_ptr, count_ptr, list_ptr,
    grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dbias_ptr,
    q_b, q_t, q_h, q_s, k_b, k_t, k_h, v_b, v_t, v_h, mask_b, mask_h, life_b, life_h, bias_b, bias_h,
    heads, tq, tk, nq, nk, d, dv, sink_tokens, window, scale,
    GROUP: tl.constexpr, PLANNED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, M: tl.constexpr,
    SLOTS: tl.constexpr, LIFETIME: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    PLAIN: tl.constexpr = not (LIFETIME or BIAS)
    kv_heads = heads // GROUP
    b = tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(1)
    first = tl.program_id(0) * BN
    cols = first + tl.arange(0, BN)
    scale2 = scale * LOG2E
    k = load_rows(k_ptr + b * k_b + kv_head.to(tl.int64) * k_h, first, k_t, tk, d, BN, BD)
    v = load_rows(v_ptr + b * v_b + kv_head.to(tl.int64) * v_h, first, v_t, tk, dv, BN, BDV)
    dk = tl.zeros([BN, BD], tl.float32)
    dv_sum = tl.zeros([BN, BDV], tl.float32)
    for g in range(GROUP):
        h = kv_head * GROUP + g
        bias = load_bias(bias_ptr + b * bias_b + h.to(tl.int64) * bias_h, cols, tk, BIAS)
        dbias = tl.zeros([BN], tl.float32)
        head = b * tq * heads + h
        life = b * life_b + h.to(tl.int64) * life_h
        mask = (b * mask_b + h * mask_h) * tq * M
        for slot in range(SLOTS):
            q_head = q_ptr + b * q_b + h.to(tl.int64) * q_h + slot * q_s
            bad = 0
            entry = ((b * mask_b + h * mask_h) * SLOTS + slot) * nk + first // PLAN_K
            masked, both, sinks, low, full_low, full_high = visits(
                count_ptr + 2 * entry, first, first + BN - 1, tq, tk, sink_tokens, window,
                False, PLANNED, CAUSAL, WINDOWED, PLAIN, BM,
            )  # fmt: skip
            for n in range(masked):
                start = visited(n, masked, sinks, low, full_low, full_high, list_ptr + entry * nq, False, PLANNED, BM)
                dk, dv_sum, dbias, bad = _dkdv_tile(
                    dk, dv_sum, dbias, bad, k, v, bias, q_head, q_t, grad_ptr + head * dv, lse_ptr + head, delta_ptr + head,
                    heads, starts_ptr + mask, ends_ptr + mask, life_ptr + life, death_ptr + life, cols, start,
                    tq, tk, d, dv, sink_tokens, window, slot, scale2,
                    True, PLANNED, CAUSAL, WINDOWED, M, SLOTS, LIFETIME, BIAS, PRECISION, BM, BD, BDV,
                )  # fmt: skip
            for n in range(masked, both):
                start = visited(n, masked, sinks, low, full_low, full_high, list_ptr + entry * nq, False, PLANNED, BM)
                dk, dv_sum, dbias, bad = _dkdv_tile(
                    dk, dv_sum, dbias, bad, k, v, bias, q_head, q_t, grad_ptr + head * dv, lse_ptr + head, delta_ptr + head,
                    heads, starts_ptr + mask, ends_ptr + mask, life_ptr + life, death_ptr + life, cols, start,
                    tq, tk, d, dv, sink_tokens, window, slot, scale2,
                    not PLAIN, PLANNED, CAUSAL, WINDOWED, M, SLOTS, LIFETIME, BIAS, PRECISION, BM, BD, BDV,
                )  # fmt: skip
            if bad > 0:
                for n in range(masked if PLAIN else both):
                    start = visited(
                        n, masked, sinks, low, full_low, full_high, list_ptr + entry * nq, False, PLANNED, BM
                    )
                    for j in range(BM):
                        row = start + j + tl.arange(0, 1)
                        keep = visible(
                            row, cols, starts_ptr + mask, ends_ptr + mask, life_ptr + life, death_ptr + life, bias,
                            tq, tk, sink_tokens, window, slot, True, PLANNED, CAUSAL, WINDOWED, M, SLOTS, LIFETIME, BIAS,
                        )  # fmt: skip
                        dk = add_nonfinite(dk, keep, q_head, start + j, q_t, tq, d)
                        dv_sum = add_nonfinite(dv_sum, keep, grad_ptr + head * dv, start + j, heads * dv, tq, dv)
        if BIAS:
            tl.store(dbias_ptr + (b * heads + h) * tk + cols, dbias, cols < tk)
    key = ((b * tk + cols) * kv_heads + kv_head)[:, None]
    width, values = tl.arange(0, BD), tl.arange(0, BDV)
    inside = (cols < tk)[:, None]
    tl.store(
        dk_ptr + key * d + width[None, :], cast(dk * scale, dk_ptr.dtype.element_ty), inside & (width < d)[None, :]
    )
    tl.store(
        dv_ptr + key * dv + values[None, :], cast(dv_sum, dv_ptr.dtype.element_ty), inside & (values < dv)[None, :]
    )


class _Call(NamedTuple):
    """What the three kernels share: pointers of the mask, strides and sizes, constants."""

    tensors: tuple[torch.Tensor, ...]  # starts, ends, key_start, key_stop, key_bias
    sizes: tuple[Any, ...]
    constants: dict[str, Any]
    plan: list[torch.Tensor]
    width: int  # the larger head dimension, padded


def _broadcast_strides(x: torch.Tensor, batch_unit: int, head_unit: int) -> tuple[int, int]:
    """Steps of batch and head, in units of a head or an element; 0 where broadcast."""
    return (batch_unit * x.shape[1] if x.shape[0] > 1 else 0, head_unit if x.shape[1] > 1 else 0)


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor | None,
    ends: torch.Tensor | None,
    key_start: torch.Tensor | None,
    key_stop: torch.Tensor | None,
    sink_tokens: int,
    window: int,
    causal: bool,
    key_bias: torch.Tensor | None,
    scale: float,
    plan: list[torch.Tensor],
) -> _Call:
    batch, tq, heads, slots, d = q.shape
    tk, kv_heads, dv = k.shape[1], k.shape[2], v.shape[3]
    if batch > MAX_GRID:
        raise ValueError(f"q: expected a batch of at most {MAX_GRID}, as a grid has, got {batch}")
    mask_b = mask_h = life_b = life_h = bias_b = bias_h = 0
    m = 1
    if starts is not None and ends is not None:
        if len(plan) != 4:
            raise ValueError(
                f"plan: expected the 4 tensors of IntervalMask.plan for a mask of tensors, got {len(plan)}"
            )
        m = starts.shape[3]
        mask_b, mask_h = _broadcast_strides(starts, 1, 1)
    if slots not in (1, m):
        raise ValueError(f"q: expected one slot, or one for each of {m} intervals, got {slots}")
    if key_start is not None:
        life_b, life_h = _broadcast_strides(key_start, tk, tk)
    if key_bias is not None:
        bias_b, bias_h = _broadcast_strides(key_bias, tk, tk)
    nq, nk = triton.cdiv(tq, PLAN_Q.value), triton.cdiv(tk, PLAN_K.value)
    sizes = (
        *q.stride()[:4], *k.stride()[:3], *v.stride()[:3], mask_b, mask_h, life_b, life_h, bias_b, bias_h,
        heads, tq, tk, nq, nk, d, dv, sink_tokens, window, scale,
    )  # fmt: skip
    constants = {
        "GROUP": heads // kv_heads, "PLANNED": starts is not None, "CAUSAL": causal, "WINDOWED": causal and window >= 0,
        "M": m, "SLOTS": slots, "LIFETIME": key_start is not None, "BIAS": key_bias is not None,
        "PRECISION": "tf32x3" if q.dtype is torch.float32 else "tf32",
        "BD": max(16, triton.next_power_of_2(d)), "BDV": max(16, triton.next_power_of_2(dv)),
    }  # fmt: skip
    # A pointer that no branch uses must still be one: q stands in for what is missing.
    tensors = tuple(q if x is None else x for x in (starts, ends, key_start, key_stop, key_bias))
    return _Call(tensors, sizes, constants, plan or [q] * 4, max(constants["BD"], constants["BDV"]))


def interval_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor | None,
    ends: torch.Tensor | None,
    key_start: torch.Tensor | None,
    key_stop: torch.Tensor | None,
    sink_tokens: int,
    window: int,
    causal: bool,
    key_bias: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    scale: float,
    plan: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of softmax attention over the intervals.

    Args:
        q: `[B, Tq, Hq, R, D]`, R = 1 or the number of intervals; k `[B, Tk, Hkv, D]`; v `[B, Tk, Hkv, Dv]`; last dimension
            contiguous.
        starts, ends: int32 `[B|1, Hq|1, Tq, m]` or None for the plain mask of `sink_tokens`, `window` (-1: none), `causal`.
        key_start, key_stop: int32 `[B|1, Hq|1, Tk]` or None.
        key_bias: fp32 `[B|1, Hq|1, Tk]` or None; sink_logits: fp32 `[Hq]` or None.
        plan: of the mask, where `starts` is given; per interval when R > 1.

    Returns:
        out `[B, Tq, Hq, Dv]` like q, lse fp32 `[B, Tq, Hq]`, contiguous.

    Raises:
        ValueError: a mask without its plan, slots that do not fit it, or a batch of more than 65535.
    """
    batch, tq, heads = q.shape[:3]
    c = _call(q, k, v, starts, ends, key_start, key_stop, sink_tokens, window, causal, key_bias, scale, plan)
    out = q.new_empty((batch, tq, heads, v.shape[3]))
    lse = q.new_empty((batch, tq, heads), dtype=torch.float32)
    options = launch_options(c.width, q.dtype is torch.float32, "fwd")
    if lse.numel():
        _interval_attention_fwd_kernel[(triton.cdiv(tq, options["BM"]), heads, batch)](
            q, k, v, *c.tensors, q if sink_logits is None else sink_logits, c.plan[0], c.plan[1], out, lse, *c.sizes,
            SINKS=sink_logits is not None, **c.constants, **options,
        )  # fmt: skip
    return out, lse


def interval_attention_bwd(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor | None,
    ends: torch.Tensor | None,
    key_start: torch.Tensor | None,
    key_stop: torch.Tensor | None,
    sink_tokens: int,
    window: int,
    causal: bool,
    key_bias: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    scale: float,
    plan: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and key_bias, and delta = rowsum(grad_out * out) - grad_lse.

    Args: as `interval_attention_fwd`, its results, and their gradients, contiguous.

    Returns:
        dq, dk, dv like q, k, v; dkey_bias fp32 `[B, Hq, Tk]` (`[0]` without key_bias); delta fp32 `[B, Tq, Hq]`.

    Raises:
        ValueError: as `interval_attention_fwd`.
    """
    batch, tq, heads = q.shape[:3]
    tk, kv_heads = k.shape[1:3]
    c = _call(q, k, v, starts, ends, key_start, key_stop, sink_tokens, window, causal, key_bias, scale, plan)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dkey_bias = lse.new_empty((0,) if key_bias is None else (batch, heads, tk))
    delta = torch.empty_like(lse)
    if lse.numel():
        options = launch_options(c.width, q.dtype is torch.float32, "dq")
        _interval_attention_dq_kernel[(triton.cdiv(tq, options["BM"]), heads, batch)](
            q, k, v, *c.tensors, c.plan[0], c.plan[1], grad_out, grad_lse, out, lse, dq, delta, *c.sizes,
            **c.constants, **options,
        )  # fmt: skip
    if batch * tk * kv_heads:
        options = launch_options(c.width, q.dtype is torch.float32, "dkdv")
        _interval_attention_dkdv_kernel[(triton.cdiv(tk, options["BN"]), kv_heads, batch)](
            q, k, v, *c.tensors, c.plan[2], c.plan[3], grad_out, lse, delta, dk, dv, dkey_bias, *c.sizes,
            **c.constants, **options,
        )  # fmt: skip
    return dq, dk, dv, dkey_bias, delta


def _aot_args(dtype: torch.dtype, d: int, kind: str, backward: bool = False) -> tuple[Any, ...]:
    """A prefill of 4096 tokens with 8 key heads of 32."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    t, heads, kv_heads = 4096, 32, 8
    index = partial(empty, dtype=torch.int32)
    nq, nk = t // PLAN_Q.value, t // PLAN_K.value
    mask: tuple[Any, ...] = (None, None, None, None, 4 if kind == "sink" else 0, 1020 if kind == "sink" else -1, True)
    plan: list[torch.Tensor] = []
    if kind == "planned":
        mask = (index(1, 1, t, 2), index(1, 1, t, 2), None, None, 0, -1, False)
        plan = [index(1, 1, nq, 2), index(1, 1, nq, nk), index(1, 1, nk, 2), index(1, 1, nk, nq)]
    q, k, v = empty(1, t, heads, 1, d), empty(1, t, kv_heads, d), empty(1, t, kv_heads, d)
    call = (q, k, v, *mask, None, None, 0.125, plan)
    if not backward:
        return call
    out, lse = empty(1, t, heads, d), empty(1, t, heads, dtype=torch.float32)
    return (out, lse, out, lse, *call)


_SPILL = (
    "136 bytes on sm_90: the sums of dk and dv and 64 keys and values of width 128 fill the registers of wgmma's warps"
)

AOT = [
    AotCase(
        f"{name} D{d} {kind}",
        launcher,
        partial(_aot_args, dtype, d, kind, backward),
        {"_interval_attention_dkdv_kernel": _SPILL} if d == 128 else {},
    )
    for name, dtype, d, kind in (
        ("bf16", torch.bfloat16, 64, "causal"),
        ("bf16", torch.bfloat16, 64, "sink"),
        ("bf16", torch.bfloat16, 128, "causal"),
        ("bf16", torch.bfloat16, 128, "planned"),
        ("fp32", torch.float32, 64, "causal"),
    )
    for launcher, backward in ((interval_attention_fwd, False), (interval_attention_bwd, True))
]

__all__ = ["AOT", "interval_attention_bwd", "interval_attention_fwd"]
