"""Attention to spans, forward and backward.

Queries choose spans wherever they like; matrix units want many queries before the same keys. So the pairs of a query and one of
its spans are sorted, by the last block of keys of the span and then by its length, and neighbours in this list share a tile. The
heads of a group share a list. Every pair gets a softmax of its own, in fp32; then the pairs of a query are mixed. Only a chunk of
the queries at a time: what lies between the two kernels stays below SCRATCH bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton

from .._common.aot import AotCase
from .._common.checks import check_packed, check_rows, require
from .._common.device import precision, register_limit
from .._common.lists import Lists, sort_pairs
from .._common.numerics import INTERPRET
from .._common.paged import keys_of, paged_heads
from ..interval_attention.arguments import Heads
from .backward import (
    SmallGrads,
    Upstream,
    span_attention_delta_kernel,
    span_attention_dkdv_kernel,
    span_attention_dq_kernel,
    span_attention_rows_kernel,
)
from .forward import Base, Results, span_attention_fwd_kernel, span_attention_mix_kernel
from .pairs import Flags, Spans

SCRATCH = 256 << 20  # bytes of what pairs leave behind, of all heads together


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _heads(x: torch.Tensor) -> Heads:
    return Heads(x, x.stride(0), x.stride(1), x.stride(2), x.shape[3])


class _Call(NamedTuple):
    """What the kernels share."""

    tensors: tuple[Any, ...]  # q, k, v, spans
    base: Base
    flags: Flags
    sizes: dict[str, Any]
    constants: dict[str, Any]


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    gate: torch.Tensor | None,
    base_out: torch.Tensor | None,
    base_lse: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    block_table: torch.Tensor | None,
    scale: float,
) -> _Call:
    batch, tokens, heads, d = q.shape
    keys, kv_heads, dv, spans = keys_of(k, block_table), k.shape[2], v.shape[3], start.shape[3]
    require(heads % kv_heads == 0, "q", f"a multiple of {kv_heads} heads", q)
    rows = k.shape[:2] if block_table is not None else (batch, keys)
    check_rows("q", q, (batch, tokens, heads, d), q)
    check_rows("k", k, (*rows, kv_heads, d), q)
    check_rows("v", v, (*rows, kv_heads, dv), q)
    floats = q.new_empty(0, dtype=torch.float32)
    for name, x, shape, like in (
        ("start", start, (batch, tokens, heads, spans), start),
        ("end", end, (batch, tokens, heads, spans), start),
        ("gate", gate, (batch, tokens, heads, spans), floats),
        ("base_out", base_out, (batch, tokens, heads, dv), q),
        ("base_lse", base_lse, (batch, tokens, heads), floats),
    ):
        check_packed(name, x, shape, like)
    flags = Flags(
        GROUP=heads // kv_heads,
        SPANS=spans,
        GATED=gate is not None,
        BASED=base_out is not None,
        PRECISION=precision("tf32x3" if q.dtype is torch.float32 else "tf32"),
    )
    mask = None if key_mask is None else key_mask.view(torch.uint8)
    return _Call(
        (_heads(q), paged_heads(k, block_table), paged_heads(v, block_table), Spans(start, end, gate, mask)),
        Base(base_out, base_lse),
        flags,
        {"tokens": tokens, "keys": keys, "heads": heads, "scale": scale},
        {"FLAGS": flags, "BD": _padded(d), "BDV": _padded(dv)},
    )


def _chunks(tokens: int, bytes_per_token: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the tokens whose pairs are at work together."""
    size = max(1, SCRATCH // max(1, bytes_per_token))
    for first in range(0, tokens, size):
        yield first, min(size, tokens - first)


class _Sorted(NamedTuple):
    """Pairs by `block * lengths + length`: the last block of keys that they see, and how many blocks they see before it."""

    lists: Lists
    blocks: int
    lengths: int
    longest: torch.Tensor


def _sorted(start: torch.Tensor, end: torch.Tensor, kv_heads: int, keys: int, size: int) -> _Sorted:
    """Blocks are `size` keys. Pairs of no keys come last."""
    blocks = triton.cdiv(keys, size)
    lengths = max(1, (2**31 - 1) // (blocks + 1))  # those that are longer count as so long
    first, last = start.clamp(min=0), end.clamp(max=keys - 1)
    seen = first <= last
    length = torch.where(seen, last // size - first // size, 0)
    places = torch.where(seen, last // size * lengths + length.clamp(max=lengths - 1), blocks * lengths)
    return _Sorted(sort_pairs(places, kv_heads, blocks, lengths), blocks, lengths, length.amax())


# (BM, BN, warps, stages) by kernel, of bf16 and fp16 up to a head dimension of 64, of 128 and beyond, and of fp32, where a
# product is three. The largest without spills, as `subquad gpu-report` shows; not measured on a GPU. BM where pairs are many.
TILES = {
    "fwd": ((64, 64, 4, 2), (64, 64, 8, 1), (16, 32, 4, 1)),
    "delta": ((64, 64, 4, 2), (64, 64, 8, 1), (16, 32, 4, 1)),
    "dq": ((64, 32, 8, 1), (64, 32, 8, 1), (16, 32, 8, 1)),
    "dkdv": ((16, 64, 8, 1, 168), (16, 64, 8, 1), (16, 32, 4, 1)),
}
# The same up to a head dimension of 128, where a block has few pairs, with a limit of registers above the need: without one,
# ptxas spills to fit another block.
FEW = {"fwd": (16, 64, 4, 2, 232), "dq": (16, 32, 4, 1, 232)}


def _options(kernel: str, width: int, dtype: torch.dtype, pairs: float) -> dict[str, int]:
    """Tiles, warps and stages; `pairs` per block of keys."""
    if INTERPRET.value:
        return {"BM": 64, "BN": 32}
    small, large, wide = TILES[kernel]
    tiles: tuple[int, ...] = wide if dtype is torch.float32 or width > 128 else small if width <= 64 else large
    if pairs < 32 and tiles is not wide:
        tiles = FEW.get(kernel, tiles)
    rows, keys, warps, stages, *registers = tiles
    options = {"BM": rows, "BN": keys, "num_warps": warps, "num_stages": stages}
    return options | register_limit(registers[0] if registers else None)


def span_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    gate: torch.Tensor | None,
    base_out: torch.Tensor | None,
    base_lse: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    block_table: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`subquad_triton::span_attention_fwd`: (out [B, T, H, Dv] like q, lse fp32 [B, T, H, S with a gate, else 1]), contiguous.

    Raises:
        ValueError: tensors that do not fit.
    """
    c = _call(q, k, v, start, end, gate, base_out, base_lse, key_mask, block_table, scale)
    batch, tokens, heads, _ = q.shape
    kv_heads, dv, spans, keys = k.shape[2], v.shape[3], start.shape[3], c.sizes["keys"]
    out = q.new_empty((batch, tokens, heads, dv))
    lse = q.new_empty((batch, tokens, heads, spans if c.flags.GATED else 1), dtype=torch.float32)
    if not lse.numel():
        return out, lse
    alone = spans == 1 and not c.flags.GATED and not c.flags.BASED
    per_token = batch * heads * spans * (4 * (dv + 1) + 24)
    for first, count in _chunks(tokens, per_token):
        part = slice(first, first + count)
        pairs = count * c.flags.GROUP * spans
        options = _options("fwd", max(c.constants["BD"], c.constants["BDV"]), q.dtype, pairs * 64 / max(1, keys))
        pairs_of = _sorted(start[:, part], end[:, part], kv_heads, keys, options["BN"])
        if alone:
            parts = Results(out[:, part], lse[:, part], tokens)
        else:
            parts = Results(
                lse.new_empty((batch, count, heads, spans, dv)), lse.new_empty((batch, count, heads, spans)), count
            )
        tiles = triton.cdiv(pairs, options["BM"])
        span_attention_fwd_kernel[(batch * kv_heads * tiles,)](
            *c.tensors, pairs_of.lists.order, parts, first, count, tiles=tiles, **c.sizes, **c.constants, **options
        )
        if not alone:
            rows = 16
            span_attention_mix_kernel[(triton.cdiv(batch * count * heads, rows),)](
                parts, c.tensors[3], c.base, out, lse, first, count, tokens, batch, heads, dv,
                FLAGS=c.flags, BM=rows, BDV=c.constants["BDV"], num_warps=4,
            )  # fmt: skip
    return out, lse


def span_attention_bwd(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    gate: torch.Tensor | None,
    base_out: torch.Tensor | None,
    base_lse: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`subquad_triton::span_attention_bwd`: gradients of q, k, v, gate, base_out and base_lse, contiguous; `[0]` without them.

    Raises:
        ValueError: tensors that do not fit.
    """
    c = _call(q, k, v, start, end, gate, base_out, base_lse, key_mask, None, scale)
    batch, tokens, heads, d = q.shape
    kv_heads, dv, spans, keys = k.shape[2], v.shape[3], start.shape[3], c.sizes["keys"]
    for name, x, like in (("out", out, q), ("grad_out", grad_out, q), ("lse", lse, lse), ("grad_lse", grad_lse, lse)):
        check_packed(name, x, out.shape if like is q else lse.shape, like)
    make = torch.empty if lse.numel() else torch.zeros
    dq, dk, dvalues = (make(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    small = SmallGrads(
        lse.new_empty(0) if gate is None else torch.empty_like(gate),
        q.new_empty(0) if base_out is None else torch.empty_like(base_out),
        lse.new_empty(0) if base_lse is None else torch.empty_like(base_lse),
    )
    if not lse.numel():
        return dq, dk, dvalues, *small
    upstream = Upstream(out, grad_out, lse, grad_lse, torch.empty_like(lse))
    width = max(c.constants["BD"], c.constants["BDV"])
    pairs = tokens * c.flags.GROUP * spans
    options = _options("dkdv", width, q.dtype, pairs * 64 / max(1, keys))
    everything = _sorted(start, end, kv_heads, keys, options["BN"])
    if c.flags.GATED:
        options = _options("delta", width, q.dtype, pairs * 64 / max(1, keys))
        tiles = triton.cdiv(pairs, options["BM"])
        span_attention_delta_kernel[(batch * kv_heads * tiles,)](
            *c.tensors, everything.lists.order, upstream, tiles=tiles, **c.sizes, **c.constants, **options
        )
    rows = 16
    span_attention_rows_kernel[(triton.cdiv(batch * tokens * heads, rows),)](
        upstream, c.tensors[3], c.base, small, batch * tokens * heads, dv,
        FLAGS=c.flags, BM=rows, BDV=c.constants["BDV"], num_warps=4,
    )  # fmt: skip
    if dk.numel():
        options = _options("dkdv", width, q.dtype, 0)
        span_attention_dkdv_kernel[(batch * kv_heads * everything.blocks,)](
            *c.tensors, everything.lists, everything.longest, upstream, dk, dvalues, blocks=everything.blocks,
            lengths=everything.lengths, **c.sizes, **c.constants, **options,
        )  # fmt: skip
    for first, count in _chunks(tokens, batch * heads * spans * (4 * d + 24)):
        part = slice(first, first + count)
        pairs = count * c.flags.GROUP * spans
        options = _options("dq", width, q.dtype, pairs * 64 / max(1, keys))
        pairs_of = _sorted(start[:, part], end[:, part], kv_heads, keys, options["BN"])
        parts = dq[:, part] if spans == 1 else lse.new_empty((batch, count, heads, spans, d))
        tiles = triton.cdiv(pairs, options["BM"])
        span_attention_dq_kernel[(batch * kv_heads * tiles,)](
            *c.tensors, pairs_of.lists.order, upstream, parts, tokens if spans == 1 else count, first, count, tiles=tiles,
            **c.sizes, **c.constants, **options,
        )  # fmt: skip
        if spans > 1:
            dq[:, part] = parts.sum(3)
    return dq, dk, dvalues, *small


def _aot_args(dtype: torch.dtype, d: int, kind: str, tokens: int, backward: bool) -> tuple[Any, ...]:
    """`tokens` at the end of 65536 keys with 4 key heads of 16."""
    meta, index, floats = (partial(torch.empty, device="meta", dtype=x) for x in (dtype, torch.int32, torch.float32))
    b, keys, heads, kv_heads, spans = 1, 65536, 16, 4, 3 if kind != "alone" else 1
    q, k, v = meta(b, tokens, heads, d), meta(b, keys, kv_heads, d), meta(b, keys, kv_heads, d)
    gated = kind in ("gated", "paged")
    gate = floats(b, tokens, heads, spans) if gated else None
    base = (meta(b, tokens, heads, d), floats(b, tokens, heads)) if gated else (None, None)
    mask = meta(b, keys, dtype=torch.bool) if kind == "joint" else None
    table = None
    if kind == "paged":
        k, v, table = meta(keys // 64, 64, kv_heads, d), meta(keys // 64, 64, kv_heads, d), index(b, keys // 64)
    given = (q, k, v, index(b, tokens, heads, spans), index(b, tokens, heads, spans), gate, *base, mask)
    if not backward:
        return (*given, table, 0.125)
    lse = floats(b, tokens, heads, spans if gated else 1)
    return (meta(*q.shape), lse, meta(*q.shape), lse, *given, 0.125)


_SPILL = "both halves of 16 keys and values of width 128 for the three products of tf32, where 255 registers end"

AOT = [
    # What belongs to a pair is read one by one: "options".
    AotCase(
        f"{name} D{d} {kind} T{tokens} options",
        launcher,
        partial(_aot_args, dtype, d, kind, tokens, backward),
        {"span_attention_dkdv_kernel": _SPILL} if (name, d) == ("fp32", 128) else {},
    )
    for name, dtype, d, kind, tokens in (
        ("bf16", torch.bfloat16, 128, "gated", 16384),
        ("bf16", torch.bfloat16, 64, "joint", 16384),
        ("bf16", torch.bfloat16, 128, "alone", 64),
        ("bf16", torch.bfloat16, 128, "paged", 1),
        ("fp32", torch.float32, 128, "gated", 16384),
    )
    for launcher, backward in ((span_attention_fwd, False), (span_attention_bwd, True))
    if not (backward and kind == "paged")
]

__all__ = ["AOT", "span_attention_bwd", "span_attention_fwd"]
