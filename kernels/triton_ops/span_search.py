"""Span search: the stripes of keys that score best for every query; forward and backward.

Forward: the rows of a program's tile are the heads of a group, for a few queries, and its columns are stripes of these queries,
far to near. A key row is loaded once for all heads, however far apart stripes are, and the product is one for matrix units; rows
of one query drop the columns of another. What has been found is kept as integers that order as scores do, and among equal ones by
distance: they are all different, and need no order. Backward: dq gathers keys; dk goes by blocks of keys over the list of what
chose them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._common.aot import AotCase
from ._common.checks import check_packed, check_rows, require
from ._common.device import precision
from ._common.lists import sort_pairs
from ._common.numerics import INTERPRET, cast
from ._common.paged import keys_of, load_heads, paged_heads
from .interval_attention.arguments import Heads
from .interval_attention.pairs import add_infinities, dot, finite_part

LOWEST, NEVER = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)


class Flags(NamedTuple):
    """Constants of a call."""

    GROUP: int  # query heads per key head
    SPANS: int
    PER_GROUP: bool
    PRECISION: str


class Reach(NamedTuple):
    """int32 [B, T] each; key_mask uint8 [B, N] or None."""

    position: Any
    first: Any
    last: Any
    back: Any
    ahead: Any
    key_mask: Any


class Found(NamedTuple):
    """[B, T, H, SPANS] each."""

    score: Any
    anchor: Any
    start: Any
    end: Any


@triton.jit
def _ordered(score, number):
    """int64 that order as (fp32 score, number) do; LOWEST for NaN and -inf."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    some = (score == score) & (score > float("-inf"))
    return tl.where(some, (bits.to(tl.int64) << 32) | number.to(tl.int64), LOWEST)


@triton.jit
def _score_of(ordered):
    bits = (ordered >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _count(offsets_ptr, stripes, limits):
    """How many offsets are at most `limits` [N]."""
    low = tl.zeros([limits.shape[0]], tl.int32)
    high = low + stripes
    while tl.max(high - low, 0) > 0:
        middle = (low + high) // 2
        below = (low < high) & (tl.load(offsets_ptr + middle, low < high, other=0) <= limits)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, tl.minimum(high, middle))
    return low


@triton.jit(do_not_specialize=["tokens", "keys", "stripes"])
def span_search_fwd_kernel(
    q, k, reach, offsets_ptr, found, tokens, keys, stripes, heads, tiles, scale,
    FLAGS: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BT queries, BH heads of the group of one key head, BN stripes at a time; BK >= SPANS."""
    ROWS: tl.constexpr = BT * BH
    COLS: tl.constexpr = BT * BN
    steps = tl.cdiv(tokens, BT)
    first_token, number = tl.program_id(0) % steps * BT, tl.program_id(0) // steps
    tile, number = number % tiles, number // tiles
    kv_heads = heads // FLAGS.GROUP
    kv_head, b = (number % kv_heads).to(tl.int64), (number // kv_heads).to(tl.int64)
    rows, cols, dims = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, BD)
    t = first_token + rows // BH
    g = tile * BH + rows % BH
    h = kv_head * FLAGS.GROUP + g
    live = (t < tokens) & (g < FLAGS.GROUP)
    q_at = (b * q.stride_b + t.to(tl.int64) * q.stride_t + h * q.stride_h)[:, None] + dims[None, :]
    b_q = tl.load(q.ptr + q_at, live[:, None] & (dims < q.width)[None, :], other=0.0)  # [ROWS, BD]

    token = first_token + cols // BN
    near = tl.load(reach.position + b * tokens + token, token < tokens, other=-1).to(tl.int64) + 1
    first = tl.maximum(tl.load(reach.first + b * tokens + token, token < tokens, other=0), 0).to(tl.int64)
    high = _count(offsets_ptr, stripes, near - first)
    slots = tl.arange(0, BK)[None, :]
    best = tl.zeros([ROWS, BK], tl.int64) + slots + LOWEST  # all of them different
    best = tl.where(slots < FLAGS.SPANS, best, NEVER)
    best_score = tl.zeros([ROWS, BK], tl.float32)
    own = (t[:, None] == token[None, :]) & live[:, None]
    for n in range(tl.cdiv(tl.max(high, 0), BN)):
        stripe = high - 1 - n * BN - cols % BN
        key = near - tl.load(offsets_ptr + stripe, stripe >= 0, other=0)
        some = (stripe >= 0) & (key >= first) & (key < keys)
        if reach.key_mask is not None:
            some = some & (tl.load(reach.key_mask + b * keys + key, some, other=0) > 0)
        b_k = load_heads(k, b, kv_head, key, some, BD)  # [COLS, BD]
        score = dot(b_q, tl.trans(b_k), FLAGS) * scale  # [ROWS, COLS]
        rank = score
        if FLAGS.PER_GROUP:
            per_head = tl.reshape(tl.where(live[:, None], score, 0.0), [BT, BH, COLS])
            rank = tl.reshape(tl.broadcast_to(tl.sum(per_head, 1)[:, None, :], [BT, BH, COLS]), [ROWS, COLS])
        rank = tl.where(own & some[None, :], rank, float("-inf"))
        order = _ordered(rank, stripe[None, :])
        top = tl.max(order, 1)  # [ROWS]
        worst = tl.min(best, 1)
        while tl.max((top > worst).to(tl.int32), 0) > 0:
            taken = (best == worst[:, None]) & (top > worst)[:, None]
            best = tl.where(taken, top[:, None], best)
            chosen = order == top[:, None]
            if FLAGS.PER_GROUP:
                best_score = tl.where(taken, tl.sum(tl.where(chosen, score, 0.0), 1)[:, None], best_score)
            order = tl.where(chosen, LOWEST, order)
            top = tl.max(order, 1)
            worst = tl.min(best, 1)

    best = tl.where(slots < FLAGS.SPANS, best, LOWEST)
    row = b * tokens + t
    near = tl.load(reach.position + row, live, other=0).to(tl.int64) + 1
    first = tl.maximum(tl.load(reach.first + row, live, other=0), 0).to(tl.int64)
    last = tl.load(reach.last + row, live, other=0).to(tl.int64)
    back, ahead = (
        tl.load(reach.back + row, live, other=0).to(tl.int64),
        tl.load(reach.ahead + row, live, other=0).to(tl.int64),
    )
    for slot in range(FLAGS.SPANS):
        top = tl.max(best, 1)
        chosen = best == top[:, None]
        best = tl.where(chosen, LOWEST, best)
        score = _score_of(top)
        if FLAGS.PER_GROUP:
            score = tl.sum(tl.where(chosen, best_score, 0.0), 1)
        some = top > LOWEST + BK
        anchor = near - tl.load(offsets_ptr + (top & 0xFFFFFFFF), some & live, other=0)
        at = (row * heads + h) * FLAGS.SPANS + slot
        tl.store(found.score + at, tl.where(some, score, float("-inf")), live)
        tl.store(found.anchor + at, tl.where(some, anchor, -1).to(tl.int32), live)
        tl.store(found.start + at, tl.where(some, tl.maximum(anchor - back, first), -1).to(tl.int32), live)
        tl.store(found.end + at, tl.where(some, tl.minimum(anchor + ahead, last), -1).to(tl.int32), live)


@triton.jit
def span_search_dq_kernel(
    grad_ptr,
    anchor_ptr,
    k,
    dq_ptr,
    rows,
    tokens,
    keys,
    heads,
    scale,
    FLAGS: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """BM rows of (batch, token, head)."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = row < rows
    b = row // heads // tokens
    head = b * k.stride_b + row % heads // FLAGS.GROUP * k.stride_h
    cols = tl.arange(0, BD)
    inside = live[:, None] & (cols < k.width)[None, :]
    dq = tl.zeros([BM, BD], tl.float32)
    for slot in range(FLAGS.SPANS):
        anchor = tl.load(anchor_ptr + row * FLAGS.SPANS + slot, live, other=-1)
        some = (anchor >= 0) & (anchor < keys)
        grad = tl.load(grad_ptr + row * FLAGS.SPANS + slot, some, other=0.0)
        at = (head + anchor.to(tl.int64) * k.stride_t)[:, None] + cols[None, :]
        dq += grad[:, None] * tl.load(k.ptr + at, inside & some[:, None], other=0.0).to(tl.float32)
    tl.store(dq_ptr + row[:, None] * k.width + cols[None, :], cast(dq * scale, dq_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tokens", "keys", "blocks"])
def span_search_dk_kernel(
    grad_ptr, anchor_ptr, q, lists, dk_ptr, tokens, keys, blocks, heads, scale,
    FLAGS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """BN keys of one head, from what chose them in the order of the list. Products are of fp32, as scores are."""
    block = tl.program_id(0) % blocks
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    kv_heads = heads // FLAGS.GROUP
    b, kv_head = segment // kv_heads, segment % kv_heads
    PAIRS: tl.constexpr = FLAGS.GROUP * FLAGS.SPANS
    order_ptr = lists.order + segment * tokens * PAIRS
    begin_ptr = lists.begin + segment * (blocks + 1) + block
    stop = tl.load(begin_ptr + 1)
    keys_here = block * BN + tl.arange(0, BN)
    cols = tl.arange(0, BD)
    dk = tl.zeros([BN, BD], tl.float32)
    for first in range(tl.load(begin_ptr), stop, BM):
        place = first + tl.arange(0, BM)
        live = place < stop
        pair = tl.load(order_ptr + place, live, other=0)
        t, h = pair // PAIRS, kv_head * FLAGS.GROUP + pair % PAIRS // FLAGS.SPANS
        at = ((b * tokens + t) * heads + h) * FLAGS.SPANS + pair % FLAGS.SPANS
        q_at = (b * q.stride_b + t * q.stride_t + h * q.stride_h)[:, None] + cols[None, :]
        b_q = tl.load(q.ptr + q_at, live[:, None] & (cols < q.width)[None, :], other=0.0).to(tl.float32)  # [BM, BD]
        grad = tl.load(grad_ptr + at, live, other=0.0)
        chosen = (tl.load(anchor_ptr + at, live, other=-1)[None, :] == keys_here[:, None]) & live[None, :]  # [BN, BM]
        queries, nonfinite = finite_part(b_q, 0, True)
        dk += dot(tl.where(chosen, grad[None, :], 0.0), queries, FLAGS)
        if nonfinite > 0:
            dk = add_infinities(dk, chosen, b_q, FLAGS)
    at = ((b * keys + keys_here) * kv_heads + kv_head)[:, None] * q.width + cols[None, :]
    inside = (keys_here < keys)[:, None] & (cols < q.width)[None, :]
    tl.store(dk_ptr + at, cast(dk * scale, dk_ptr.dtype.element_ty), inside)


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _heads(x: torch.Tensor) -> Heads:
    return Heads(x, x.stride(0), x.stride(1), x.stride(2), x.shape[3])


def _flags(q: torch.Tensor, kv_heads: int, spans: int, per_group: bool = False) -> Flags:
    return Flags(q.shape[2] // kv_heads, spans, per_group, precision("tf32x3"))


def span_search_fwd(
    q_search: torch.Tensor,
    k: torch.Tensor,
    position: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    back: torch.Tensor,
    ahead: torch.Tensor,
    offsets: torch.Tensor,
    key_mask: torch.Tensor | None,
    block_table: torch.Tensor | None,
    num_spans: int,
    scale: float,
    per_group: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`subquad_triton::span_search_fwd`: (score fp32, anchor, start, end int32), [B, T, H, num_spans] each.

    Raises:
        ValueError: tensors that do not fit.
    """
    batch, tokens, heads, d = q_search.shape
    keys, kv_heads = keys_of(k, block_table), k.shape[2]
    require(heads % kv_heads == 0, "q_search", f"a multiple of {kv_heads} heads", q_search)
    check_rows("q_search", q_search, (batch, tokens, heads, d), q_search)
    check_rows("k", k, (*(k.shape[:2] if block_table is not None else (batch, keys)), kv_heads, d), q_search)
    for name, x in (("position", position), ("first", first), ("last", last), ("back", back), ("ahead", ahead)):
        check_packed(name, x, (batch, tokens), position)
    flags = _flags(q_search, kv_heads, num_spans, per_group)
    score = q_search.new_empty((batch, tokens, heads, num_spans), dtype=torch.float32)
    anchor, start, end = (torch.empty_like(score, dtype=torch.int32) for _ in range(3))
    if score.numel():
        reach = Reach(position, first, last, back, ahead, None if key_mask is None else key_mask.view(torch.uint8))
        options = _options(tokens, flags, d, q_search.dtype)
        tiles = triton.cdiv(flags.GROUP, options["BH"])
        span_search_fwd_kernel[(batch * kv_heads * tiles * triton.cdiv(tokens, options["BT"]),)](
            _heads(q_search), paged_heads(k, block_table), reach, offsets, Found(score, anchor, start, end), tokens, keys,
            offsets.shape[0], heads, tiles, scale, FLAGS=flags, BD=_padded(d), BK=triton.next_power_of_2(num_spans), **options,
        )  # fmt: skip
    return score, anchor, start, end


def _options(tokens: int, flags: Flags, d: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of 16 rows or more, and of 64 columns or 32: the most without spills, as `subquad gpu-report` shows; not measured on
    a GPU. One query, or as many as fill 16 rows, and in the interpreter more, for it takes its time by operation."""
    group = triton.next_power_of_2(flags.GROUP)
    heads = group if flags.PER_GROUP else min(group, 64)
    if INTERPRET.value:
        return {"BT": 16, "BH": heads, "BN": 4}
    queries = min(max(1, 16 // heads), triton.next_power_of_2(tokens))
    cols = 32 if d > 128 or dtype is torch.float32 else 64
    return {"BT": queries, "BH": max(heads, 16 // queries), "BN": cols // queries, "num_warps": 4, "num_stages": 2}


def span_search_bwd(
    grad_score: torch.Tensor, anchor: torch.Tensor, q_search: torch.Tensor, k: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`subquad_triton::span_search_bwd`: (dq, dk), contiguous.

    Raises:
        ValueError: tensors that do not fit.
    """
    batch, tokens, heads, d = q_search.shape
    keys, kv_heads, spans = k.shape[1], k.shape[2], anchor.shape[3]
    require(heads % kv_heads == 0, "q_search", f"a multiple of {kv_heads} heads", q_search)
    check_rows("q_search", q_search, (batch, tokens, heads, d), q_search)
    check_rows("k", k, (batch, keys, kv_heads, d), q_search)
    check_packed("anchor", anchor, (batch, tokens, heads, spans), anchor)
    check_packed("grad_score", grad_score, (batch, tokens, heads, spans), grad_score)
    flags = _flags(q_search, kv_heads, spans)
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_search, k))
    width = _padded(d)
    if dq.numel():
        rows = 16
        span_search_dq_kernel[(triton.cdiv(batch * tokens * heads, rows),)](
            grad_score, anchor, _heads(k), dq, batch * tokens * heads, tokens, keys, heads, scale,
            FLAGS=flags, BM=rows, BD=width, num_warps=4,
        )  # fmt: skip
    if dk.numel():
        options = {"BM": 32, "BN": 32, "num_warps": 4, "num_stages": 1}
        blocks = triton.cdiv(keys, options["BN"])
        places = torch.where((anchor >= 0) & (anchor < keys), anchor // options["BN"], blocks)
        lists = sort_pairs(places, kv_heads, blocks)
        span_search_dk_kernel[(batch * kv_heads * blocks,)](
            grad_score,
            anchor,
            _heads(q_search),
            lists,
            dk,
            tokens,
            keys,
            blocks,
            heads,
            scale,
            FLAGS=flags,
            BD=width,
            **options,
        )
    return dq, dk


def _aot_args(dtype: torch.dtype, group: int, per_group: bool, paged: bool, backward: bool) -> tuple[Any, ...]:
    """Two rows of 4096 tokens with 4 key heads."""
    meta, index = (partial(torch.empty, device="meta", dtype=x) for x in (dtype, torch.int32))
    b, t, kv_heads, d, spans = 2, 4096, 4, 128, 3
    q, k = meta(b, t, kv_heads * group, d), meta(b, t, kv_heads, d)
    if backward:
        chosen = index(b, t, kv_heads * group, spans)
        return (meta(*chosen.shape, dtype=torch.float32), chosen, q, k, 1.0)
    table = None
    if paged:
        k, table = meta(b * t // 64, 64, kv_heads, d), index(b, t // 64)
    mask = meta(b, t, dtype=torch.bool) if per_group else None
    return (q, k, *(index(b, t) for _ in range(5)), index(64), mask, table, spans, 1.0, per_group)


AOT = [
    # Positions and anchors are read one by one: "options".
    AotCase(f"{name} G{group} {kind} options", launcher, partial(_aot_args, dtype, group, *how))
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for group, kind, launcher, how in (
        (4, "head", span_search_fwd, (False, False, False)),
        (16, "group", span_search_fwd, (True, False, False)),
        (4, "paged", span_search_fwd, (False, True, False)),
        (4, "backward", span_search_bwd, (False, False, True)),
    )
]

__all__ = ["AOT", "span_search_bwd", "span_search_fwd"]
