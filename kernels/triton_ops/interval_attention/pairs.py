"""Pairs of a query row and a key in a tile: which of them a mask leaves, and products that hide the others.

Hidden pairs have weight 0, but 0 * NaN is NaN: where a tile is seen in part, non-finite elements are taken out of the product,
and put where they are seen after the last tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._common.numerics import LOG2E, cast, is_finite, tanh, widen_if_interpreted


@triton.jit
def dot(a, b, FLAGS: tl.constexpr):
    """a @ b in fp32; operands in the input dtype."""
    return tl.dot(widen_if_interpreted(a), widen_if_interpreted(b), input_precision=FLAGS.PRECISION)


@triton.jit
def load_rows(x, first, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] of `Rows` from row `first` on; 0 outside."""
    rows = first + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    offsets = rows.to(tl.int64)[:, None] * x.stride + cols[None, :]
    return tl.load(x.ptr + offsets, (rows < x.count)[:, None] & (cols < x.width)[None, :], other=0.0)


@triton.jit
def load_bias(mask, cols):
    """Biases of keys [cols]; 0 without."""
    if mask.tensors.key_bias is not None:
        return tl.load(mask.tensors.key_bias + mask.offsets.bias + cols, cols < mask.tk, other=0.0)
    else:
        return tl.zeros([cols.shape[0]], tl.float32)


@triton.jit
def scaled(products, terms, FLAGS: tl.constexpr):
    """Scores before anything is added to them: products scaled, and capped where the call has a softcap."""
    scores = products * terms.scale
    if FLAGS.CAPPED:
        scores = tanh(scores * (1.0 / terms.softcap)) * terms.softcap
    return scores


@triton.jit
def cap_slope(scores, terms):
    """The derivative of the cap where its values are `scores`."""
    t = scores * (1.0 / terms.softcap)
    return 1.0 - t * t


@triton.jit
def biased(scores, rows, cols, bias, mask, terms, KEYS_DOWN: tl.constexpr):
    """Scores less slope times distance, plus the biases of keys. The last row stands at the last key."""
    R: tl.constexpr = 0 if KEYS_DOWN else 1  # as in `visible`
    C: tl.constexpr = 1 - R
    if mask.tensors.alibi_slopes is not None:
        own = tl.expand_dims(rows + (mask.tk - mask.tq), R)
        scores -= tl.abs(own - tl.expand_dims(cols, C)).to(tl.float32) * terms.slope
    if mask.tensors.key_bias is not None:
        scores += tl.expand_dims(bias, C)
    return scores


@triton.jit
def load_stats(stats_ptr, at, live):
    """The largest score of every row, and log2 of its sum: +inf, which makes every weight 0, for rows that do not exist."""
    top = tl.load(stats_ptr + 2 * at, live, other=0.0)
    return top, tl.load(stats_ptr + 2 * at + 1, live, other=float("inf")) * LOG2E


@triton.jit
def weights(scores, top, log2_sum):
    """softmax of scores. Units of log2 begin behind the difference: the largest floats, which masks hold, would overflow."""
    return tl.exp2((scores - top) * LOG2E - log2_sum)


@triton.jit
def visible(rows, cols, bias, mask, slot, KEYS_DOWN: tl.constexpr, FLAGS: tl.constexpr):
    """bool [rows, cols], or [cols, rows] with KEYS_DOWN: which pairs the mask, the lifetimes and biases of -inf leave."""
    R: tl.constexpr = 0 if KEYS_DOWN else 1  # the dimension in which rows are repeated
    C: tl.constexpr = 1 - R
    t = tl.expand_dims(rows, R)
    j = tl.expand_dims(cols, C)
    live = rows < mask.tq
    keep = (t < mask.tq) & (j < mask.tk)
    if mask.tensors.starts is not None:
        starts_ptr = mask.tensors.starts + mask.offsets.rows
        ends_ptr = mask.tensors.ends + mask.offsets.rows
        at = rows.to(tl.int64) * FLAGS.INTERVALS
        if FLAGS.SLOTS > 1:
            s = tl.expand_dims(tl.load(starts_ptr + at + slot, live, other=0), R)
            e = tl.expand_dims(tl.load(ends_ptr + at + slot, live, other=0), R)
            keep = keep & (j >= s) & (j < e)
        else:
            inside = keep & (j < 0)
            for r in range(FLAGS.INTERVALS):
                s = tl.expand_dims(tl.load(starts_ptr + at + r, live, other=0), R)
                e = tl.expand_dims(tl.load(ends_ptr + at + r, live, other=0), R)
                inside = inside | ((j >= s) & (j < e))
            keep = keep & inside
    elif FLAGS.CAUSAL:
        i = t + (mask.tk - mask.tq)
        keep = keep & (j <= i)
        if FLAGS.WINDOWED:
            keep = keep & ((j < mask.sink_tokens) | (i - j < mask.window))
    if mask.tensors.key_start is not None:
        key_start_ptr = mask.tensors.key_start + mask.offsets.keys
        key_stop_ptr = mask.tensors.key_stop + mask.offsets.keys
        first = tl.expand_dims(tl.load(key_start_ptr + cols, cols < mask.tk, other=0), C)
        last = tl.expand_dims(tl.load(key_stop_ptr + cols, cols < mask.tk, other=0), C)
        keep = keep & (t >= first) & (t < last)
    if mask.tensors.key_bias is not None:
        keep = keep & (tl.expand_dims(bias, C) != float("-inf"))
    return keep


@triton.jit
def finite_part(x, nonfinite, MASKED: tl.constexpr):
    """x for a product with weights some of which are 0 because the mask hides the pair: without NaN and infinity, which
    `nonfinite` remembers for `add_nonfinite`. Without MASKED, x as it is."""
    if not MASKED:
        return x, nonfinite
    wide = x.to(tl.float32)
    finite = is_finite(wide)
    return cast(tl.where(finite, wide, 0.0), x.dtype), nonfinite | tl.max(tl.where(finite, 0, 1))


@triton.jit
def add_nonfinite(acc, keep, x, row):
    """acc [N, width] plus what is not finite in row `row` of `Rows` x, where keep [N, 1] says that it is seen."""
    cols = tl.arange(0, acc.shape[1])
    inside = (cols < x.width) & (cols * 0 + row < x.count)
    values = tl.load(x.ptr + tl.cast(row, tl.int64) * x.stride + cols, inside, other=0.0).to(tl.float32)
    poison = keep & (is_finite(values) == 0)[None, :]
    return tl.where(poison, acc + values[None, :], acc)


@triton.jit
def add_infinities(acc, keep, v, FLAGS: tl.constexpr):
    """acc [BM, BDV] plus what is not finite in values v [BN, BDV], where keep says that it is seen: whatever its weight."""
    v = v.to(tl.float32)
    seen = tl.where(keep, 1.0, 0.0).to(tl.float16)
    up = tl.where((v == float("inf")) | (v != v), 1.0, 0.0).to(tl.float16)
    down = tl.where((v == float("-inf")) | (v != v), 1.0, 0.0).to(tl.float16)
    acc = tl.where(dot(seen, up, FLAGS) > 0.0, acc + float("inf"), acc)
    return tl.where(dot(seen, down, FLAGS) > 0.0, acc - float("inf"), acc)
