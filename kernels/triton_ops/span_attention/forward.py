"""The forward kernels: the softmax of every pair by itself, and the mixture of the pairs of a query."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._common.numerics import LN2, LOG2E, cast
from ..interval_attention.pairs import dot, finite_part, weights
from .pairs import (
    NEVER,
    add_nonfinite_of,
    any_nonfinite,
    end_of_run,
    load_block,
    load_queries,
    load_tile,
    next_block,
    place_of_program,
    seen_of_block,
)


class Results(NamedTuple):
    """out [B, tokens, H, slots, Dv] and fp32 lse [B, tokens, H, slots], from the first token of a chunk on."""

    out: Any
    lse: Any
    tokens: Any


class Base(NamedTuple):
    """The softmax that every one covers too: out [B, T, H, Dv], fp32 lse [B, T, H]; or None."""

    out: Any
    lse: Any


@triton.jit
def _walk(
    q, k, v, spans, tile, place, keys, scale,
    CAREFUL: tl.constexpr, FLAGS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """The running softmax of a tile: sums of values [BM, BDV], largest scores and sums of weights [BM]. CAREFUL: without values
    that are not finite."""
    acc = tl.zeros([q.shape[0], BDV], tl.float32)
    row_max = tl.full([q.shape[0]], float("-inf"), tl.float32)
    row_sum = tl.zeros([q.shape[0]], tl.float32)
    block = next_block(tile, 0, BN)
    while block < NEVER:
        end = end_of_run(tile, block, BN)
        for n in range(block, end):
            cols = n * BN + tl.arange(0, BN)
            scores = dot(q, tl.trans(load_block(k, place, cols, keys, BD)), FLAGS) * scale  # [BM, BN]
            scores = tl.where(seen_of_block(spans, tile, place, cols, keys), scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))  # [BM]
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = weights(scores, shift[:, None], 0.0)  # [BM, BN]
            rescale = weights(row_max, shift, 0.0)
            values, _ = finite_part(load_block(v, place, cols, keys, BDV), 0, CAREFUL)  # [BN, BDV]
            acc = acc * rescale[:, None] + dot(cast(p, values.dtype), values, FLAGS)
            row_sum = row_sum * rescale + tl.sum(p, 1)
            row_max = new_max
        block = next_block(tile, end, BN)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["first_token", "chunk", "tokens", "keys", "tiles"])
def span_attention_fwd_kernel(
    q, k, v, spans, order_ptr, results, first_token, chunk, tokens, keys, tiles, heads, scale,
    FLAGS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """BM pairs of `chunk` tokens; 0 and -inf where they see nothing."""
    kv_heads = heads // FLAGS.GROUP
    place = place_of_program(tiles, kv_heads, BM)
    pairs = chunk * FLAGS.GROUP * FLAGS.SPANS
    at = place.first + tl.arange(0, BM)
    order_ptr += (place.b * kv_heads + place.kv_head) * pairs
    tile = load_tile(spans, order_ptr, at, at < pairs, place.b, place.kv_head, first_token, tokens, heads, keys, FLAGS)
    b_q = load_queries(q, place.b, tile, BD)  # [BM, BD]
    acc, row_max, row_sum = _walk(b_q, k, v, spans, tile, place, keys, scale, False, FLAGS, BN, BD, BDV)
    if any_nonfinite(acc) > 0:
        acc, row_max, row_sum = _walk(b_q, k, v, spans, tile, place, keys, scale, True, FLAGS, BN, BD, BDV)
        acc = add_nonfinite_of(acc, v, spans, tile, place, keys, BN)
    empty = row_sum == 0.0
    safe_sum = tl.where(empty, 1.0, row_sum)
    to = (place.b * results.tokens + tile.token - first_token) * heads + tile.head
    to = to * FLAGS.SPANS + tile.slot
    tl.store(results.lse + to, tl.where(empty, float("-inf"), row_max + tl.log2(safe_sum) * LN2), tile.live)
    cols = tl.arange(0, BDV)
    out = cast(acc / safe_sum[:, None], results.out.dtype.element_ty)
    tl.store(results.out + to[:, None] * v.width + cols[None, :], out, tile.live[:, None] & (cols < v.width)[None, :])


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit(do_not_specialize=["first_token", "chunk", "tokens"])
def span_attention_mix_kernel(
    parts, spans, base, out_ptr, lse_ptr, first_token, chunk, tokens, batch, heads, dv,
    FLAGS: tl.constexpr, BM: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """BM rows (batch, token, head) of a chunk: out and lse from the pairs and the base."""
    number = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = number < batch * chunk * heads
    b, t, h = number // heads // chunk, number // heads % chunk, number % heads
    row = (b * tokens + first_token + t) * heads + h
    cols = tl.arange(0, BDV)
    inside = live[:, None] & (cols < dv)[None, :]
    base_lse = tl.full([BM], float("-inf"), tl.float32)
    base_out = tl.zeros([BM, BDV], tl.float32)
    if FLAGS.BASED:
        base_lse = tl.load(base.lse + row, live, other=float("-inf"))
        seen = base_lse != float("-inf")
        base_out = tl.load(base.out + row[:, None] * dv + cols[None, :], inside & seen[:, None], other=0.0).to(
            tl.float32
        )
    acc = tl.zeros([BM, BDV], tl.float32)
    part = number * FLAGS.SPANS
    if FLAGS.GATED:
        for slot in range(FLAGS.SPANS):
            lse = tl.load(parts.lse + part + slot, live, other=float("-inf"))
            gate = tl.load(spans.gate + row * FLAGS.SPANS + slot, live, other=0.0)
            top = tl.maximum(lse, base_lse)
            shift = tl.where(top == float("-inf"), 0.0, top)
            weight, rest = _exp(lse - shift), _exp(base_lse - shift)
            total = weight + rest
            empty = total == 0.0
            safe = tl.where(empty, 1.0, total)
            out = tl.load(parts.out + (part + slot)[:, None] * dv + cols[None, :], inside, other=0.0)
            acc += gate[:, None] * ((weight / safe)[:, None] * out + (rest / safe)[:, None] * base_out)
            tl.store(
                lse_ptr + row * FLAGS.SPANS + slot, tl.where(empty, float("-inf"), shift + tl.log2(safe) * LN2), live
            )
    else:
        top = base_lse
        for slot in range(FLAGS.SPANS):
            top = tl.maximum(top, tl.load(parts.lse + part + slot, live, other=float("-inf")))
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = _exp(base_lse - shift)
        acc += total[:, None] * base_out
        for slot in range(FLAGS.SPANS):
            weight = _exp(tl.load(parts.lse + part + slot, live, other=float("-inf")) - shift)
            out = tl.load(parts.out + (part + slot)[:, None] * dv + cols[None, :], inside, other=0.0)
            acc += weight[:, None] * out
            total += weight
        empty = total == 0.0
        safe = tl.where(empty, 1.0, total)
        acc = acc / safe[:, None]
        tl.store(lse_ptr + row, tl.where(empty, float("-inf"), shift + tl.log2(safe) * LN2), live)
    tl.store(out_ptr + row[:, None] * dv + cols[None, :], cast(acc, out_ptr.dtype.element_ty), inside)
