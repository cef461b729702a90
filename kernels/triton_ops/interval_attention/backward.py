"""The backward kernels: dq with delta = rowsum(dout * out) - dlse, by rows; dk, dv and dkey_bias, by keys.

No atomics: each program owns what it writes, and sums in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._common.numerics import cast
from .arguments import (
    HeadMask,
    Rows,
    ScoreTerms,
    offsets_of_head,
    place_of_program,
    rows_of_head,
    rows_of_slot,
    slope_of_head,
)
from .pairs import (
    add_nonfinite,
    biased,
    cap_slope,
    dot,
    finite_part,
    load_bias,
    load_rows,
    load_stats,
    scaled,
    visible,
    weights,
)
from .tiles import find_tiles, start_of_tile


@triton.jit
def _dq_tile(
    dq, nonfinite, q, grad, top, log2_sum, delta, k, v, mask, rows, start, slot, terms,
    MASKED: tl.constexpr, FLAGS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    cols = start + tl.arange(0, BN)
    b_k = load_rows(k, start, BN, BD)  # [BN, BD]
    b_v = load_rows(v, start, BN, BDV)  # [BN, BDV]
    bias = load_bias(mask, cols)  # [BN]
    capped = scaled(dot(q, tl.trans(b_k), FLAGS), terms, FLAGS)  # [BM, BN]
    p = weights(biased(capped, rows, cols, bias, mask, terms, False), top[:, None], log2_sum[:, None])  # [BM, BN]
    ds = p * (dot(grad, tl.trans(b_v), FLAGS) - delta[:, None])  # [BM, BN]
    if FLAGS.CAPPED:
        ds *= cap_slope(capped, terms)
    if MASKED:
        ds = tl.where(visible(rows, cols, bias, mask, slot, False, FLAGS), ds, 0.0)
    keys, nonfinite = finite_part(b_k, nonfinite, MASKED)
    return dq + dot(cast(ds, b_k.dtype), keys, FLAGS), nonfinite


@triton.jit(do_not_specialize=["tq", "tk", "sink_tokens", "window"])
def interval_attention_dq_kernel(
    q, k, v, mask, plan, results, grads, dq_ptr, delta_ptr, tq, tk, sink_tokens, window, heads, scale, softcap,
    FLAGS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    b, h, first = place_of_program(tl.cdiv(tq, BM), heads, BM)
    rows = first + tl.arange(0, BM)
    k_rows = rows_of_head(k, b, h // FLAGS.GROUP, tk)
    v_rows = rows_of_head(v, b, h // FLAGS.GROUP, tk)
    seen = HeadMask(mask, offsets_of_head(mask, b, h, tq, FLAGS.INTERVALS), tq, tk, sink_tokens, window)
    terms = ScoreTerms(scale, softcap, slope_of_head(mask, b, h))
    live = rows < tq
    row = (b * tq + rows) * heads + h
    values = tl.arange(0, BDV)
    at = row[:, None] * v.width + values[None, :]
    inside = live[:, None] & (values < v.width)[None, :]
    grad = tl.load(grads.out + at, inside, other=0.0)  # [BM, BDV]
    out = tl.load(results.out + at, inside, other=0.0)  # [BM, BDV]
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1) - tl.load(grads.lse + row, live, other=0.0)  # [BM]
    tl.store(delta_ptr + row, delta, live)
    top, log2_sum = load_stats(results.stats, row, live)  # [BM]
    for slot in range(FLAGS.SLOTS):
        nonfinite = 0
        b_q = load_rows(rows_of_slot(q, b, h, slot, tq), first, BM, BD)  # [BM, BD]
        dq = tl.zeros([BM, BD], tl.float32)
        head = b * mask.stride_b + h * mask.stride_h
        tiles = find_tiles(plan, head, slot, first, tl.minimum(first + BM, tq) - 1, seen, True, FLAGS, BN)
        for n in range(tiles.masked):
            start = start_of_tile(n, tiles, plan, True, BN)
            dq, nonfinite = _dq_tile(
                dq, nonfinite, b_q, grad, top, log2_sum, delta, k_rows, v_rows, seen, rows, start, slot, terms,
                True, FLAGS, BN, BD, BDV,
            )  # fmt: skip
        for n in range(tiles.masked, tiles.count):
            start = start_of_tile(n, tiles, plan, True, BN)
            dq, nonfinite = _dq_tile(
                dq, nonfinite, b_q, grad, top, log2_sum, delta, k_rows, v_rows, seen, rows, start, slot, terms,
                FLAGS.PER_KEY, FLAGS, BN, BD, BDV,
            )  # fmt: skip
        if nonfinite > 0:
            for n in range(tiles.count if FLAGS.PER_KEY else tiles.masked):
                start = start_of_tile(n, tiles, plan, True, BN)
                for j in range(BN):
                    key = start + j + tl.arange(0, 1)
                    keep = visible(rows, key, load_bias(seen, key), seen, slot, False, FLAGS)
                    dq = add_nonfinite(dq, keep, k_rows, start + j)
        cols = tl.arange(0, BD)
        dq_at = (row[:, None] * FLAGS.SLOTS + slot) * q.width + cols[None, :]
        tl.store(dq_ptr + dq_at, cast(dq * scale, dq_ptr.dtype.element_ty), live[:, None] & (cols < q.width)[None, :])


@triton.jit
def _dkdv_tile(
    dk, dv, dbias, nonfinite, k, v, bias, q, grad, stats_ptr, delta_ptr, heads, mask, cols, start, slot, terms,
    MASKED: tl.constexpr, FLAGS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Keys down and rows across: scores are [BN, BM]."""
    rows = start + tl.arange(0, BM)
    b_q = load_rows(q, start, BM, BD)  # [BM, BD]
    b_grad = load_rows(grad, start, BM, BDV)  # [BM, BDV]
    live = rows < mask.tq
    at = rows.to(tl.int64) * heads
    top, log2_sum = load_stats(stats_ptr, at, live)  # [BM]
    delta = tl.load(delta_ptr + at, live, other=0.0)  # [BM]
    if MASKED:
        keep = visible(rows, cols, bias, mask, slot, True, FLAGS)  # [BN, BM]
    capped = scaled(dot(k, tl.trans(b_q), FLAGS), terms, FLAGS)  # [BN, BM]
    p = weights(biased(capped, rows, cols, bias, mask, terms, True), top[None, :], log2_sum[None, :])  # [BN, BM]
    ds = p * (dot(v, tl.trans(b_grad), FLAGS) - delta[None, :])  # [BN, BM]
    if MASKED:
        p = tl.where(keep, p, 0.0)
        ds = tl.where(keep, ds, 0.0)
    if mask.tensors.key_bias is not None:
        dbias += tl.sum(ds, 1)
    if FLAGS.CAPPED:
        ds *= cap_slope(capped, terms)
        if MASKED:
            ds = tl.where(keep, ds, 0.0)  # not 0 * NaN
    grads, nonfinite = finite_part(b_grad, nonfinite, MASKED)
    queries, nonfinite = finite_part(b_q, nonfinite, MASKED)
    dv += dot(cast(p, b_grad.dtype), grads, FLAGS)  # [BN, BDV]
    dk += dot(cast(ds, b_q.dtype), queries, FLAGS)  # [BN, BD]
    return dk, dv, dbias, nonfinite


@triton.jit(do_not_specialize=["tq", "tk", "sink_tokens", "window"])
def interval_attention_dkdv_kernel(
    q, k, v, mask, plan, grad_ptr, stats_ptr, delta_ptr, dk_ptr, dv_ptr, dbias_ptr,
    tq, tk, sink_tokens, window, heads, scale, softcap,
    FLAGS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    kv_heads = heads // FLAGS.GROUP
    b, kv_head, first = place_of_program(tl.cdiv(tk, BN), kv_heads, BN)
    cols = first + tl.arange(0, BN)
    b_k = load_rows(rows_of_head(k, b, kv_head, tk), first, BN, BD)  # [BN, BD]
    b_v = load_rows(rows_of_head(v, b, kv_head, tk), first, BN, BDV)  # [BN, BDV]
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BDV], tl.float32)
    for g in range(FLAGS.GROUP):
        h = kv_head * FLAGS.GROUP + g
        seen = HeadMask(mask, offsets_of_head(mask, b, h, tq, FLAGS.INTERVALS), tq, tk, sink_tokens, window)
        terms = ScoreTerms(scale, softcap, slope_of_head(mask, b, h))
        bias = load_bias(seen, cols)  # [BN]
        dbias = tl.zeros([BN], tl.float32)
        at = b * tq * heads + h
        grad_rows = Rows(grad_ptr + at * v.width, heads * v.width, tq, v.width)
        for slot in range(FLAGS.SLOTS):
            q_rows = rows_of_slot(q, b, h, slot, tq)
            nonfinite = 0
            head = b * mask.stride_b + h * mask.stride_h
            tiles = find_tiles(plan, head, slot, first, first + BN - 1, seen, False, FLAGS, BM)
            for n in range(tiles.masked):
                start = start_of_tile(n, tiles, plan, False, BM)
                dk, dv, dbias, nonfinite = _dkdv_tile(
                    dk, dv, dbias, nonfinite, b_k, b_v, bias, q_rows, grad_rows, stats_ptr + 2 * at, delta_ptr + at, heads, seen,
                    cols, start, slot, terms, True, FLAGS, BM, BD, BDV,
                )  # fmt: skip
            for n in range(tiles.masked, tiles.count):
                start = start_of_tile(n, tiles, plan, False, BM)
                dk, dv, dbias, nonfinite = _dkdv_tile(
                    dk, dv, dbias, nonfinite, b_k, b_v, bias, q_rows, grad_rows, stats_ptr + 2 * at, delta_ptr + at, heads, seen,
                    cols, start, slot, terms, FLAGS.PER_KEY, FLAGS, BM, BD, BDV,
                )  # fmt: skip
            if nonfinite > 0:
                for n in range(tiles.count if FLAGS.PER_KEY else tiles.masked):
                    start = start_of_tile(n, tiles, plan, False, BM)
                    for j in range(BM):
                        row = start + j + tl.arange(0, 1)
                        keep = visible(row, cols, bias, seen, slot, True, FLAGS)
                        dk = add_nonfinite(dk, keep, q_rows, start + j)
                        dv = add_nonfinite(dv, keep, grad_rows, start + j)
        if mask.key_bias is not None:
            tl.store(dbias_ptr + (b * heads + h) * tk + cols, dbias, cols < tk)
    key = ((b * tk + cols) * kv_heads + kv_head)[:, None]
    width, values = tl.arange(0, BD), tl.arange(0, BDV)
    inside = (cols < tk)[:, None]
    dk = cast(dk * scale, dk_ptr.dtype.element_ty)
    tl.store(dk_ptr + key * q.width + width[None, :], dk, inside & (width < q.width)[None, :])
    dv = cast(dv, dv_ptr.dtype.element_ty)
    tl.store(dv_ptr + key * v.width + values[None, :], dv, inside & (values < v.width)[None, :])
