"""The backward kernels. With u_j = <grad_out, v_j>, P_sj = exp(score_j - lse_s), w_s = exp(base_lse - lse_s):

    delta_s = sum_j P_sj u_j + w_s <grad_out, base_out>            by pairs, where spans are gated; else <grad_out, out>
    c_s = gate_s delta_s - grad_lse_s, dgate_s = delta_s, dbase    by queries
    dscore_sj = P_sj (gate_s u_j - c_s), dq                        by pairs
    dv_j = sum_s gate_s P_sj grad_out, dk                          by keys

No atomics: each program owns what it writes, and sums in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._common.numerics import LOG2E, cast, is_finite
from ..interval_attention.pairs import dot, finite_part, weights
from .pairs import (
    NEVER,
    add_nonfinite_of,
    any_nonfinite,
    end_of_run,
    load_block,
    load_queries,
    load_rows_of_pairs,
    load_tile,
    next_block,
    place_of_program,
    seen_of_block,
    unmasked,
)


class Upstream(NamedTuple):
    """out and grad_out [B, T, H, Dv]; lse, grad_lse and c fp32 [B, T, H, softmaxes]. c begins as sum_j P_sj u_j."""

    out: Any
    grad_out: Any
    lse: Any
    grad_lse: Any
    c: Any


class SmallGrads(NamedTuple):
    """dgate, dbase_lse fp32, dbase_out like base_out; of no elements where there is no such argument."""

    gate: Any
    base_out: Any
    base_lse: Any


@triton.jit
def _of_softmax(ptr, tile, FLAGS: tl.constexpr):
    """A number [BM] of the softmax of every pair."""
    at = tile.row * FLAGS.SPANS + tile.slot if FLAGS.GATED else tile.row
    return tl.load(ptr + at, tile.live, other=0.0)


@triton.jit
def _gates(spans, tile, FLAGS: tl.constexpr):
    if FLAGS.GATED:
        return tl.load(spans.gate + tile.row * FLAGS.SPANS + tile.slot, tile.live, other=0.0)
    else:
        return tl.full([tile.row.shape[0]], 1.0, tl.float32)


@triton.jit(do_not_specialize=["tokens", "keys", "tiles"])
def span_attention_delta_kernel(
    q, k, v, spans, order_ptr, upstream, tokens, keys, tiles, heads, scale,
    FLAGS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """sum_j P_sj u_j of BM pairs."""
    kv_heads = heads // FLAGS.GROUP
    place = place_of_program(tiles, kv_heads, BM)
    pairs = tokens.to(tl.int64) * FLAGS.GROUP * FLAGS.SPANS
    at = place.first + tl.arange(0, BM)
    order_ptr += (place.b * kv_heads + place.kv_head) * pairs
    tile = load_tile(spans, order_ptr, at, at < pairs, place.b, place.kv_head, 0, tokens, heads, keys, FLAGS)
    b_q = load_queries(q, place.b, tile, BD)  # [BM, BD]
    grad = load_rows_of_pairs(upstream.grad_out, tile.row * v.width, tile.live, v.width, BDV)  # [BM, BDV]
    lse = _of_softmax(upstream.lse, tile, FLAGS)
    delta = tl.zeros([BM], tl.float32)
    block = next_block(tile, 0, BN)
    while block < NEVER:
        end = end_of_run(tile, block, BN)
        for n in range(block, end):
            cols = n * BN + tl.arange(0, BN)
            scores = dot(b_q, tl.trans(load_block(k, place, cols, keys, BD)), FLAGS) * scale  # [BM, BN]
            u = dot(grad, tl.trans(load_block(v, place, cols, keys, BDV)), FLAGS)  # [BM, BN]
            seen = seen_of_block(spans, tile, place, cols, keys)
            delta += tl.sum(tl.where(seen, weights(scores, lse[:, None], 0.0) * u, 0.0), 1)
        block = next_block(tile, end, BN)
    tl.store(upstream.c + tile.row * FLAGS.SPANS + tile.slot, delta, tile.live)


@triton.jit
def span_attention_rows_kernel(
    upstream, spans, base, grads, rows, dv, FLAGS: tl.constexpr, BM: tl.constexpr, BDV: tl.constexpr
):
    """c, and the gradients of gate and base, of BM rows (batch, token, head)."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = row < rows
    grad = load_rows_of_pairs(upstream.grad_out, row * dv, live, dv, BDV).to(tl.float32)  # [BM, BDV]
    base_lse = tl.full([BM], float("-inf"), tl.float32)
    seen = live & (base_lse > 0.0)
    of_base = tl.zeros([BM], tl.float32)
    if FLAGS.BASED:
        base_lse = tl.load(base.lse + row, live, other=float("-inf"))
        seen = base_lse != float("-inf")
        base_out = load_rows_of_pairs(base.out, row * dv, live & seen, dv, BDV).to(tl.float32)
        of_base = tl.sum(grad * base_out, 1)
    SOFTMAXES: tl.constexpr = FLAGS.SPANS if FLAGS.GATED else 1
    weight = tl.zeros([BM], tl.float32)
    dbase_lse = tl.zeros([BM], tl.float32)
    for slot in range(SOFTMAXES):
        at = row * SOFTMAXES + slot
        w = tl.where(seen, tl.exp2((base_lse - tl.load(upstream.lse + at, live, other=0.0)) * LOG2E), 0.0)
        gate = tl.full([BM], 1.0, tl.float32)
        if FLAGS.GATED:
            gate = tl.load(spans.gate + at, live, other=0.0)
            delta = tl.load(upstream.c + at, live, other=0.0)
            delta += tl.where(seen, w * of_base, 0.0)
            tl.store(grads.gate + at, delta, live)
        else:
            delta = tl.sum(grad * load_rows_of_pairs(upstream.out, row * dv, live, dv, BDV).to(tl.float32), 1)
        c = gate * delta - tl.load(upstream.grad_lse + at, live, other=0.0)
        tl.store(upstream.c + at, c, live)
        weight += gate * w
        dbase_lse += tl.where(seen, w * (gate * of_base - c), 0.0)
    if FLAGS.BASED:
        tl.store(grads.base_lse + row, dbase_lse, live)
        cols = tl.arange(0, BDV)
        dbase_out = cast(tl.where(seen[:, None], weight[:, None] * grad, 0.0), grads.base_out.dtype.element_ty)
        tl.store(grads.base_out + row[:, None] * dv + cols[None, :], dbase_out, live[:, None] & (cols < dv)[None, :])


@triton.jit
def _dq_walk(
    q, grad, lse, c, gate, k, v, spans, tile, place, keys, scale,
    CAREFUL: tl.constexpr, FLAGS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    dq = tl.zeros([q.shape[0], BD], tl.float32)
    block = next_block(tile, 0, BN)
    while block < NEVER:
        end = end_of_run(tile, block, BN)
        for n in range(block, end):
            cols = n * BN + tl.arange(0, BN)
            b_k = load_block(k, place, cols, keys, BD)  # [BN, BD]
            scores = dot(q, tl.trans(b_k), FLAGS) * scale  # [BM, BN]
            u = dot(grad, tl.trans(load_block(v, place, cols, keys, BDV)), FLAGS)  # [BM, BN]
            ds = weights(scores, lse[:, None], 0.0) * (gate[:, None] * u - c[:, None])
            ds = tl.where(seen_of_block(spans, tile, place, cols, keys), ds, 0.0)
            finite, _ = finite_part(b_k, 0, CAREFUL)
            dq += dot(cast(ds, b_k.dtype), finite, FLAGS)
        block = next_block(tile, end, BN)
    return dq


@triton.jit(do_not_specialize=["dq_tokens", "first_token", "chunk", "tokens", "keys", "tiles"])
def span_attention_dq_kernel(
    q, k, v, spans, order_ptr, upstream, dq_ptr, dq_tokens, first_token, chunk, tokens, keys, tiles, heads, scale,
    FLAGS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Of BM pairs of `chunk` tokens; dq_ptr [B, dq_tokens, H, SPANS, D] from the first of them on."""
    kv_heads = heads // FLAGS.GROUP
    place = place_of_program(tiles, kv_heads, BM)
    pairs = chunk.to(tl.int64) * FLAGS.GROUP * FLAGS.SPANS
    at = place.first + tl.arange(0, BM)
    order_ptr += (place.b * kv_heads + place.kv_head) * pairs
    tile = load_tile(spans, order_ptr, at, at < pairs, place.b, place.kv_head, first_token, tokens, heads, keys, FLAGS)
    b_q = load_queries(q, place.b, tile, BD)  # [BM, BD]
    grad = load_rows_of_pairs(upstream.grad_out, tile.row * v.width, tile.live, v.width, BDV)  # [BM, BDV]
    lse, c, gate = (
        _of_softmax(upstream.lse, tile, FLAGS),
        _of_softmax(upstream.c, tile, FLAGS),
        _gates(spans, tile, FLAGS),
    )
    dq = _dq_walk(b_q, grad, lse, c, gate, k, v, spans, tile, place, keys, scale, False, FLAGS, BN, BD, BDV)
    if any_nonfinite(dq) > 0:
        dq = _dq_walk(b_q, grad, lse, c, gate, k, v, spans, tile, place, keys, scale, True, FLAGS, BN, BD, BDV)
        dq = add_nonfinite_of(dq, k, spans, tile, place, keys, BN)
    to = ((place.b * dq_tokens + tile.token - first_token) * heads + tile.head) * FLAGS.SPANS + tile.slot
    cols = tl.arange(0, BD)
    dq = cast(dq * scale, dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + to[:, None] * q.width + cols[None, :], dq, tile.live[:, None] & (cols < q.width)[None, :])


class Keys(NamedTuple):
    """A block of keys [BN], whether they may be seen, and the part of a list that may see them, from `first` to `stop`."""

    cols: Any
    some: Any
    places: Any
    order: Any
    first: Any
    stop: Any


@triton.jit
def _pairs_of_keys(here, first, place, lengths, BM: tl.constexpr):
    """Places [BM] in the list from `first` on, and which of these pairs reach as far as these keys."""
    at = first + tl.arange(0, BM)
    number = tl.load(here.places + at, at < here.stop, other=0)
    length = number % lengths
    reaches = (number // lengths - length <= place.first) | (length == lengths - 1)
    return at, reaches & (at < here.stop)


@triton.jit
def _seen_by(here, tile):
    """Which keys [BN] are seen by which pairs [BM]."""
    cols = here.cols[:, None]
    return (cols >= tile.begin[None, :]) & (cols < tile.stop[None, :]) & here.some[:, None]


@triton.jit
def _dkdv_walk(
    k, v, q, dv_width, spans, here, upstream, place, lengths, tokens, keys, heads, scale,
    CAREFUL: tl.constexpr, FLAGS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Keys down and pairs across. CAREFUL: without queries and gradients that are not finite."""
    dk = tl.zeros([k.shape[0], BD], tl.float32)
    dv = tl.zeros([k.shape[0], BDV], tl.float32)
    for first in range(here.first, here.stop, BM):
        at, reaches = _pairs_of_keys(here, first, place, lengths, BM)
        if tl.max(reaches.to(tl.int32), 0) > 0:
            tile = load_tile(spans, here.order, at, reaches, place.b, place.kv_head, 0, tokens, heads, keys, FLAGS)
            b_q = load_queries(q, place.b, tile, BD)  # [BM, BD]
            grad = load_rows_of_pairs(upstream.grad_out, tile.row * dv_width, tile.live, dv_width, BDV)  # [BM, BDV]
            lse, c = _of_softmax(upstream.lse, tile, FLAGS), _of_softmax(upstream.c, tile, FLAGS)
            gate = _gates(spans, tile, FLAGS)
            keep = _seen_by(here, tile)
            scores = dot(k, tl.trans(b_q), FLAGS) * scale  # [BN, BM]
            p = tl.where(keep, weights(scores, lse[None, :], 0.0), 0.0)
            u = dot(v, tl.trans(grad), FLAGS)  # [BN, BM]
            ds = tl.where(keep, p * (gate[None, :] * u - c[None, :]), 0.0)
            grads, _ = finite_part(grad, 0, CAREFUL)
            queries, _ = finite_part(b_q, 0, CAREFUL)
            dv += dot(cast(p * gate[None, :], grad.dtype), grads, FLAGS)
            dk += dot(cast(ds, b_q.dtype), queries, FLAGS)
    return dk, dv


@triton.jit
def _dkdv_nonfinite(
    dk, dv, q, dv_width, spans, here, upstream, place, lengths, tokens, keys, heads, FLAGS: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """dk and dv plus what is not finite in the queries and gradients that see the keys, one by one."""
    for first in range(here.first, here.stop, BM):
        at, reaches = _pairs_of_keys(here, first, place, lengths, BM)
        tile = load_tile(spans, here.order, at, reaches, place.b, place.kv_head, 0, tokens, heads, keys, FLAGS)
        wrong = any_nonfinite(load_queries(q, place.b, tile, dk.shape[1]))
        rows = tile.row * dv_width
        wrong += any_nonfinite(load_rows_of_pairs(upstream.grad_out, rows, tile.live, dv_width, dv.shape[1]))
        if wrong > 0:
            for j in range(BM):
                number, some = _pairs_of_keys(here, first + j, place, lengths, 1)
                one = load_tile(spans, here.order, number, some, place.b, place.kv_head, 0, tokens, heads, keys, FLAGS)
                keep = _seen_by(here, one)  # [BN, 1]
                query = load_queries(q, place.b, one, dk.shape[1]).to(tl.float32)  # [1, BD]
                grad = load_rows_of_pairs(upstream.grad_out, one.row * dv_width, one.live, dv_width, dv.shape[1])
                dk = tl.where(keep & (is_finite(query) == 0), dk + query, dk)
                dv = tl.where(keep & (is_finite(grad.to(tl.float32)) == 0), dv + grad.to(tl.float32), dv)
    return dk, dv


@triton.jit(do_not_specialize=["tokens", "keys", "blocks", "lengths"])
def span_attention_dkdv_kernel(
    q, k, v, spans, lists, longest_ptr, upstream, dk_ptr, dv_ptr, tokens, keys, blocks, lengths, heads, scale,
    FLAGS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """BN keys of one head: keys down and pairs across, of those that end here or at most the longest span farther."""
    kv_heads = heads // FLAGS.GROUP
    place = place_of_program(blocks, kv_heads, 1)
    block = place.first
    segment = place.b * kv_heads + place.kv_head
    begin_ptr = lists.begin + segment * (blocks + 1)
    farthest = tl.minimum(block + tl.load(longest_ptr), blocks - 1)
    in_list = segment * tokens * FLAGS.GROUP * FLAGS.SPANS
    cols = block * BN + tl.arange(0, BN)
    inside = cols < keys
    here = Keys(
        cols, unmasked(spans, place.b, cols, inside, keys), lists.places + in_list, lists.order + in_list,
        tl.load(begin_ptr + block), tl.load(begin_ptr + farthest + 1),
    )  # fmt: skip
    b_k, b_v = load_block(k, place, cols, keys, BD), load_block(v, place, cols, keys, BDV)
    dk, dv = _dkdv_walk(
        b_k, b_v, q, v.width, spans, here, upstream, place, lengths, tokens, keys, heads, scale, False, FLAGS,
        BM, BD, BDV,
    )  # fmt: skip
    if any_nonfinite(dk) + any_nonfinite(dv) > 0:
        dk, dv = _dkdv_walk(
            b_k, b_v, q, v.width, spans, here, upstream, place, lengths, tokens, keys, heads, scale, True, FLAGS,
            BM, BD, BDV,
        )  # fmt: skip
        dk, dv = _dkdv_nonfinite(
            dk, dv, q, v.width, spans, here, upstream, place, lengths, tokens, keys, heads, FLAGS, BM
        )
    key = ((place.b * keys + cols) * kv_heads + place.kv_head)[:, None]
    width, values = tl.arange(0, BD), tl.arange(0, BDV)
    dk = cast(dk * scale, dk_ptr.dtype.element_ty)
    tl.store(dk_ptr + key * k.width + width[None, :], dk, inside[:, None] & (width < k.width)[None, :])
    dv = cast(dv, dv_ptr.dtype.element_ty)
    tl.store(dv_ptr + key * v.width + values[None, :], dv, inside[:, None] & (values < v.width)[None, :])
