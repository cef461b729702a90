"""The forward kernel: a program keeps BM rows of one query head and walks over the tiles of keys that they see."""

from __future__ import annotations

import triton
import triton.language as tl

from .._common.numerics import LN2, cast
from .arguments import (
    HeadMask,
    ScoreTerms,
    offsets_of_head,
    place_of_program,
    rows_of_head,
    rows_of_slot,
    slope_of_head,
)
from .pairs import add_nonfinite, biased, dot, finite_part, load_bias, load_rows, scaled, visible, weights
from .tiles import find_tiles, start_of_tile


@triton.jit
def _fwd_tile(
    acc, row_max, row_sum, nonfinite, q, k, v, mask, rows, start, slot, terms,
    MASKED: tl.constexpr, FLAGS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """One more tile of keys in the running softmax."""
    cols = start + tl.arange(0, BN)
    b_k = load_rows(k, start, BN, BD)  # [BN, BD]
    b_v = load_rows(v, start, BN, BDV)  # [BN, BDV]
    scores = scaled(dot(q, tl.trans(b_k), FLAGS), terms, FLAGS)  # [BM, BN]
    bias = load_bias(mask, cols)  # [BN]
    scores = biased(scores, rows, cols, bias, mask, terms, False)
    if MASKED:
        scores = tl.where(visible(rows, cols, bias, mask, slot, False, FLAGS), scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))  # [BM]
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = weights(scores, shift[:, None], 0.0)  # [BM, BN]
    rescale = weights(row_max, shift, 0.0)
    values, nonfinite = finite_part(b_v, nonfinite, MASKED)
    acc = acc * rescale[:, None] + dot(cast(p, b_v.dtype), values, FLAGS)  # [BM, BDV]
    return acc, new_max, row_sum * rescale + tl.sum(p, 1), nonfinite


@triton.jit(do_not_specialize=["tq", "tk", "sink_tokens", "window"])
def interval_attention_fwd_kernel(
    q, k, v, mask, plan, sink_logits_ptr, results, tq, tk, sink_tokens, window, heads, scale, softcap,
    FLAGS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    b, h, first = place_of_program(tl.cdiv(tq, BM), heads, BM)
    rows = first + tl.arange(0, BM)
    k_rows = rows_of_head(k, b, h // FLAGS.GROUP, tk)
    v_rows = rows_of_head(v, b, h // FLAGS.GROUP, tk)
    seen = HeadMask(mask, offsets_of_head(mask, b, h, tq, FLAGS.INTERVALS), tq, tk, sink_tokens, window)
    terms = ScoreTerms(scale, softcap, slope_of_head(mask, b, h))
    acc = tl.zeros([BM, BDV], tl.float32)
    if sink_logits_ptr is not None:
        row_max = tl.zeros([BM], tl.float32) + tl.load(sink_logits_ptr + h)
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0 + (row_max - row_max))  # NaN beside infinity
    else:
        row_max = tl.full([BM], float("-inf"), tl.float32)
        row_sum = tl.zeros([BM], tl.float32)
    for slot in range(FLAGS.SLOTS):
        nonfinite = 0
        b_q = load_rows(rows_of_slot(q, b, h, slot, tq), first, BM, BD)  # [BM, BD]
        head = b * mask.stride_b + h * mask.stride_h
        tiles = find_tiles(plan, head, slot, first, tl.minimum(first + BM, tq) - 1, seen, True, FLAGS, BN)
        for n in range(tiles.masked):
            start = start_of_tile(n, tiles, plan, True, BN)
            acc, row_max, row_sum, nonfinite = _fwd_tile(
                acc, row_max, row_sum, nonfinite, b_q, k_rows, v_rows, seen, rows, start, slot, terms,
                True, FLAGS, BN, BD, BDV,
            )  # fmt: skip
        for n in range(tiles.masked, tiles.count):
            start = start_of_tile(n, tiles, plan, True, BN)
            acc, row_max, row_sum, nonfinite = _fwd_tile(
                acc, row_max, row_sum, nonfinite, b_q, k_rows, v_rows, seen, rows, start, slot, terms,
                FLAGS.PER_KEY, FLAGS, BN, BD, BDV,
            )  # fmt: skip
        if nonfinite > 0:
            for n in range(tiles.count if FLAGS.PER_KEY else tiles.masked):
                start = start_of_tile(n, tiles, plan, True, BN)
                for j in range(BN):
                    key = start + j + tl.arange(0, 1)
                    keep = visible(rows, key, load_bias(seen, key), seen, slot, False, FLAGS)
                    acc = add_nonfinite(acc, keep, v_rows, start + j)
    empty = row_sum == 0.0
    safe_sum = tl.where(empty, 1.0, row_sum)
    row = (b * tq + rows) * heads + h
    row_max = tl.where(empty, 0.0, row_max)
    log_sum = tl.where(empty, float("inf"), tl.log2(safe_sum) * LN2)  # [BM]
    tl.store(results.lse + row, tl.where(empty, float("-inf"), row_max + log_sum), rows < tq)
    tl.store(results.stats + 2 * row, row_max, rows < tq)
    tl.store(results.stats + 2 * row + 1, log_sum, rows < tq)
    cols = tl.arange(0, BDV)
    out = cast(acc / safe_sum[:, None], results.out.dtype.element_ty)  # [BM, BDV]
    tl.store(
        results.out + row[:, None] * v.width + cols[None, :], out, (rows < tq)[:, None] & (cols < v.width)[None, :]
    )
