"""The step of a streaming cache: new tokens attend to it and to each other, then they enter it.

Launches: attention, in splits of the keys where one program for each key head would be few; the merge of splits in their order,
with the sink logit; the write; the counters. How many splits there are follows from shapes alone, so that a captured graph stays
valid, and nothing is read on the host.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton

from .._common.aot import AotCase
from .._common.checks import check_integers, check_packed, check_rows, require
from .._common.device import precision
from .._common.numerics import INTERPRET
from ..interval_attention.arguments import Heads
from .attend import Flags, Results, sink_attention_step_attend_kernel, sink_attention_step_merge_kernel
from .enter import sink_attention_step_count_kernel, sink_attention_step_enter_kernel
from .heads import Cache, Layout, Sizes, Stream

MAX_SPLITS = 64
SPLIT_KEYS = 128  # of a split at least


def _padded(n: int) -> int:
    return max(16, triton.next_power_of_2(n)) if n else 0


def _layout(width: int, pairs: int, interleaved: bool) -> Layout:
    return Layout(_padded(pairs), _padded(width - 2 * pairs), interleaved)


def _heads(x: torch.Tensor) -> Heads:
    return Heads(x, x.stride(0), x.stride(1), x.stride(2), x.shape[3])


def _splits(tiles: int, capacity: int) -> int:
    """Shares of the keys of a tile: the more the fewer tiles there are."""
    return max(1, min(triton.cdiv(capacity, SPLIT_KEYS), MAX_SPLITS // tiles))


def _attend(
    q: torch.Tensor, k: Heads, v: Heads, cache: Cache, stream: Stream, sink_logits: torch.Tensor | None,
    turns: torch.Tensor | None, sizes: Sizes, scale: float, rotary_scale: float, interleaved: bool, rotated: bool,
    absolute: bool, together: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    batch, width, heads, d = q.shape
    dv, group = v.width, heads // sizes.kv_heads
    out, lse = q.new_empty((batch, width, heads, dv)), q.new_empty((batch, width, heads), dtype=torch.float32)
    wide = turns is not None or q.dtype is torch.float32
    rows = min(32 if wide or max(d, dv) > 128 else 64, _padded(width * group))
    tiles = triton.cdiv(width * group, rows)
    splits = _splits(tiles, sizes.sinks + sizes.window + (1 if together else triton.cdiv(rows, group)))
    sums, stats = None, None
    if splits > 1:
        sums = lse.new_empty((lse.numel(), splits, dv))
        stats = lse.new_empty((lse.numel(), splits, 2))
    results = Results(out, lse, sink_logits, sums, stats)
    flags = Flags(
        GROUP=group,
        KEYS=_layout(d, sizes.pairs, interleaved),
        VALUES=_padded(dv),
        ROTATED=rotated,
        ABSOLUTE=absolute,
        TOGETHER=together,
        MASKED=width > 1 and not together,
        WIDE=wide,
        SPLIT=splits > 1,
        PRECISION=precision("tf32x3"),
    )
    sink_attention_step_attend_kernel[(batch * sizes.kv_heads * tiles * splits,)](
        _heads(q), k, v, cache, stream, turns, results, sizes, width, tiles, splits, scale, rotary_scale,
        FLAGS=flags, BM=rows, **_options(rows, max(d, dv), cache.k_scale is not None),
    )  # fmt: skip
    if splits > 1:
        sink_attention_step_merge_kernel[(lse.numel(),)](
            stream, results, width, heads, splits, dv, BS=min(16, triton.next_power_of_2(splits)),
            ALL=triton.next_power_of_2(splits), BDV=_padded(dv), num_warps=4,
        )  # fmt: skip
    return out, lse


def _options(rows: int, width: int, quantised: bool) -> dict[str, int]:
    """Keys of a block, warps and stages: the most without spills up to a width of 128, as `subquad gpu-report` shows; not
    measured on a GPU. Both halves of q for the three products of tf32 stay in registers."""
    if INTERPRET.value:
        return {"BN": 32}
    warps, stages = (4, 2) if rows == 16 and width <= 128 and not quantised else (8, 1)
    return {"BN": 32, "num_warps": warps, "num_stages": stages}


def sink_attention_step_(
    k: torch.Tensor, v: torch.Tensor, q: torch.Tensor | None, sink_k: torch.Tensor, sink_v: torch.Tensor, ring_k: torch.Tensor,
    ring_v: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, seen: torch.Tensor,
    written: torch.Tensor, first: torch.Tensor, tokens: torch.Tensor | None, sink_logits: torch.Tensor | None,
    turns: torch.Tensor | None, window: int, scale: float, rotary_scale: float, interleaved: bool, rotated: bool,
    absolute: bool, together: bool, advance: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`subquad_triton::sink_attention_step_`: (out [B, T, Hq, Dv], lse [B, T, Hq] fp32); the cache is updated.

    Raises:
        ValueError: tensors that do not fit, a window wider than the ring.
    """
    batch, width, kv_heads, d = k.shape
    dv, sinks, ring = v.shape[3], sink_k.shape[2], ring_k.shape[2]
    pairs = 0 if turns is None else turns.shape[0]
    heads = 0 if q is None else q.shape[2]
    tokens_of = {"k": (k, kv_heads, d), "v": (v, kv_heads, dv)} | ({} if q is None else {"q": (q, heads, d)})
    for name, (x, count, size) in tokens_of.items():
        check_rows(name, x, (batch, width, count, size), k)
    for name, x, places, like in (
        ("sink_k", sink_k, (sinks, d), k),
        ("sink_v", sink_v, (sinks, dv), k),
        ("ring_k", ring_k, (ring, d), ring_k),
        ("ring_v", ring_v, (ring, dv), ring_k),
    ):
        check_packed(name, x, (batch, kv_heads, *places), like)
    plain = ring_k.dtype is k.dtype
    require(plain or ring_k.dtype in (torch.int8, torch.float8_e4m3fn), "ring_k", "int8, float8 or k's dtype", ring_k)
    for name, factor in (("k_scale", k_scale), ("v_scale", v_scale)):
        check_packed(name, factor, (batch, kv_heads, ring), seen.new_empty(0, dtype=torch.float32))
        require((factor is None) is plain, name, "scales for a quantised ring alone", ring_k)
    for name, counter in (("seen", seen), ("written", written), ("first", first), ("tokens", tokens)):
        check_integers(name, counter, batch, torch.int64)
    check_integers("turns", turns, pairs, torch.int64)
    require(2 * pairs <= d, "turns", f"at most {d // 2}, one for each pair of k's elements", k)
    require(q is None or heads % kv_heads == 0, "q", f"a multiple of {kv_heads} heads", k if q is None else q)
    require(0 <= window <= ring, "window", f"0..{ring}, not {window}", ring_k)
    if pairs == 0:
        turns = None
    held_k, held_v = (x.view(torch.uint8) if x.dtype is torch.float8_e4m3fn else x for x in (ring_k, ring_v))
    cache = Cache(sink_k, sink_v, held_k, held_v, k_scale, v_scale)
    stream, sizes = Stream(seen, first, tokens), Sizes(kv_heads, sinks, ring, window, pairs)
    keys, values = _heads(k), _heads(v)
    out, lse = v.new_empty((batch, width, heads, dv)), v.new_empty((batch, width, heads), dtype=torch.float32)
    if q is not None and lse.numel():
        out, lse = _attend(
            q, keys, values, cache, stream, sink_logits, turns, sizes, scale, rotary_scale, interleaved, rotated, absolute,
            together,
        )  # fmt: skip
    if batch * width:
        if not rotated:
            turns, sizes, interleaved = None, sizes._replace(pairs=0), False
        rows = 16
        sink_attention_step_enter_kernel[(batch * triton.cdiv(width * kv_heads, rows),)](
            keys, values, cache, stream, turns, sizes, width, KEYS=_layout(d, sizes.pairs, interleaved),
            VALUES=_layout(dv, 0, False), BM=rows, num_warps=4,
        )  # fmt: skip
    if batch:
        block = 64
        sink_attention_step_count_kernel[(triton.cdiv(batch, block),)](
            stream, written, batch, width, ADVANCE=advance, BLOCK=block, num_warps=1
        )
    return out, lse


def _aot_args(
    dtype: torch.dtype, d: int, width: int, ring: torch.dtype | None, kind: str, window: int
) -> tuple[Any, ...]:
    """Chunks of `width` tokens on a cache with 4 sinks, 8 key heads of 32, rotated unless `kind` is "plain"."""
    rows, heads, kv, sinks = 16, 32, 8, 4
    meta, count = (
        partial(torch.empty, device="meta", dtype=dtype),
        partial(torch.empty, device="meta", dtype=torch.int64),
    )
    places = window + 64
    held = partial(torch.empty, device="meta", dtype=dtype if ring is None else ring)
    scale = None if ring is None else meta(rows, kv, places, dtype=torch.float32)
    return (
        meta(rows, width, kv, d), meta(rows, width, kv, d), meta(rows, width, heads, d), meta(rows, kv, sinks, d),
        meta(rows, kv, sinks, d), held(rows, kv, places, d), held(rows, kv, places, d), scale, scale, count(rows), count(rows),
        count(rows), None, None, None if kind == "plain" else count(d // 2), window, d**-0.5, 1.0, False, kind == "post", False,
        False, True,
    )  # fmt: skip


_SPILL = "a few bytes on sm_90: both halves of 32 queries of width 128 beside 32 rotated keys, where 255 registers end"

AOT = [
    # Scales of rows, counters and phases are read one by one: "options".
    AotCase(
        f"{name} D{d} T{width} {'' if ring is None else str(ring).removeprefix('torch.') + ' '}{kind} {window} options",
        sink_attention_step_,
        partial(_aot_args, dtype, d, width, ring, kind, window),
        {"sink_attention_step_attend_kernel": _SPILL} if (d, width) == (128, 64) else {},
    )
    for name, dtype, d, width, ring, kind, window in (
        ("bf16", torch.bfloat16, 128, 1, None, "pre", 4092),
        ("bf16", torch.bfloat16, 128, 64, None, "pre", 4092),
        ("bf16", torch.bfloat16, 128, 1, None, "plain", 4092),
        ("bf16", torch.bfloat16, 64, 16, None, "post", 60),
        ("bf16", torch.bfloat16, 128, 1, torch.int8, "pre", 4092),
        ("bf16", torch.bfloat16, 128, 1, torch.float8_e4m3fn, "post", 4092),
        ("fp32", torch.float32, 128, 1, None, "pre", 4092),
        ("fp32", torch.float32, 64, 64, None, "pre", 1020),
    )
]

__all__ = ["AOT", "sink_attention_step_"]
