"""Which tiles of keys (or rows) a program visits, and how large tiles are.

Those seen in part come first, then those that every row sees wholly. Plain masks (causal, sink + window, full) find them in
closed form; masks in tensors bring a plan: for every tile of PLAN_Q rows the tiles of PLAN_K keys, and the transpose.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .._common.device import generation, shared_memory
from .._common.numerics import INTERPRET

PLAN_Q, PLAN_K = tl.constexpr(128), tl.constexpr(64)  # as in `IntervalMask.plan`


class Tiles(NamedTuple):
    """`masked` tiles seen in part, then others up to `count` seen wholly.

    In closed form [0, sink_tiles), [low, full_low), [full_high, ...) and then [full_low, full_high); with a plan, its list from
    `offset` on.
    """

    masked: Any
    count: Any
    sink_tiles: Any
    low: Any
    full_low: Any
    full_high: Any
    offset: Any


@triton.jit
def _key_tiles(first_row, last_row, mask, FLAGS: tl.constexpr, BN: tl.constexpr):
    """Tiles of keys that rows [first_row, last_row] see under a plain mask: [0, sink_tiles), [low, high), of the latter
    [full_low, full_high) wholly (none with PER_KEY)."""
    tiles = tl.cdiv(mask.tk, BN)
    whole = mask.tk // BN
    sink_tiles = 0
    low = 0
    high = tiles
    full_low = 0
    full_high = whole
    if FLAGS.CAUSAL:
        i0 = first_row + (mask.tk - mask.tq)
        i1 = last_row + (mask.tk - mask.tq)
        high = tl.minimum(tiles, tl.cdiv(tl.maximum(i1 + 1, 0), BN))
        full_high = tl.minimum(whole, tl.maximum(i0 + 1, 0) // BN)
        if FLAGS.WINDOWED:
            sink_tiles = tl.minimum(tl.cdiv(mask.sink_tokens, BN), high)
            low = tl.maximum(sink_tiles, tl.maximum(i0 - mask.window + 1, 0) // BN)
            low = tl.minimum(low, high)
            full_low = tl.cdiv(tl.maximum(i1 - mask.window + 1, 0), BN)
    full_low = tl.minimum(tl.maximum(full_low, low), high)
    full_high = tl.minimum(tl.maximum(full_high, full_low), high)
    if FLAGS.PER_KEY:
        full_high = full_low
    return sink_tiles, low, full_low, full_high, high


@triton.jit
def _row_tiles(first_key, last_key, mask, FLAGS: tl.constexpr, BM: tl.constexpr):
    """Tiles of rows [low, high) that see keys [first_key, last_key] under a plain mask, [full_low, full_high) wholly."""
    tiles = tl.cdiv(mask.tq, BM)
    low = 0
    high = tiles
    full_low = 0
    full_high = tiles
    if FLAGS.CAUSAL:
        first_row = tl.maximum(first_key - (mask.tk - mask.tq), 0)  # of the rows that see some key
        all_row = tl.maximum(last_key - (mask.tk - mask.tq), 0)  # of the rows behind all keys
        low = tl.minimum(first_row // BM, tiles)
        full_low = tl.cdiv(all_row, BM)
        if FLAGS.WINDOWED:
            if first_key >= mask.sink_tokens:
                last = last_key + mask.window - 1 - (mask.tk - mask.tq)
                high = tl.minimum(tiles, tl.maximum(last, -1) // BM + 1)
                whole = first_key + mask.window - (mask.tk - mask.tq)  # rows below see all keys
                full_high = tl.maximum(whole, 0) // BM
            else:
                full_high = tl.where(last_key < mask.sink_tokens, tiles, 0)
    if last_key >= mask.tk:
        full_high = 0
    low = tl.minimum(low, high)
    full_low = tl.minimum(tl.maximum(full_low, low), high)
    full_high = tl.minimum(tl.maximum(full_high, full_low), high)
    if FLAGS.PER_KEY:
        full_high = full_low
    return low, full_low, full_high, high


@triton.jit
def find_tiles(plan, head, slot, first, last, mask, KEYS: tl.constexpr, FLAGS: tl.constexpr, BLOCK: tl.constexpr):
    """Tiles of keys for rows [first, last] with KEYS, else tiles of rows for keys [first, last]."""
    sink_tiles = 0
    low = 0
    full_low = 0
    full_high = 0
    offset = tl.cast(0, tl.int64)
    if plan.counts is not None:
        SUB: tl.constexpr = (PLAN_K if KEYS else PLAN_Q) // BLOCK
        rows, keys = tl.cdiv(mask.tq, PLAN_Q), tl.cdiv(mask.tk, PLAN_K)
        if KEYS:
            entry = (head * FLAGS.SLOTS + slot) * rows + first // PLAN_Q
            offset = entry * keys
        else:
            entry = (head * FLAGS.SLOTS + slot) * keys + first // PLAN_K
            offset = entry * rows
        masked = tl.load(plan.counts + 2 * entry) * SUB
        count = masked + tl.load(plan.counts + 2 * entry + 1) * SUB
    elif KEYS:
        sink_tiles, low, full_low, full_high, high = _key_tiles(first, last, mask, FLAGS, BLOCK)
        count = sink_tiles + high - low
        masked = count - (full_high - full_low)
    else:
        low, full_low, full_high, high = _row_tiles(first, last, mask, FLAGS, BLOCK)
        count = high - low
        masked = count - (full_high - full_low)
    return Tiles(masked, count, sink_tiles, low, full_low, full_high, offset)


@triton.jit
def start_of_tile(n, tiles, plan, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """The first key (or row) of the n-th tile."""
    if plan.counts is not None:
        PLAN: tl.constexpr = PLAN_K if KEYS else PLAN_Q
        SUB: tl.constexpr = PLAN // BLOCK
        return tl.load(plan.lists + tiles.offset + n // SUB) * PLAN + (n - n // SUB * SUB) * BLOCK
    else:
        masked = n - tiles.sink_tiles + tiles.low
        masked = tl.where(masked >= tiles.full_low, masked + tiles.full_high - tiles.full_low, masked)
        masked = tl.where(n < tiles.sink_tiles, n, masked)
        return tl.where(n < tiles.masked, masked, n - tiles.masked + tiles.full_low) * BLOCK


# (BM, BN, warps, stages, and sometimes a limit of registers above the need: without one, ptxas may spill to fit another block)
# by kernel, of bf16 and fp16 up to a head dimension of 64, up to 256 and up to 512, and of fp32, where a product is three. The
# largest tiles that need no spills, beyond 128 the fewest, with the matrix units of each generation (8: mma, 9: wgmma,
# 10: tcgen05), as `subquad gpu-report` shows; not measured on a GPU.
TILES: dict[str, dict[int | str, tuple[tuple[int, ...], ...]]] = {
    "fwd": {"any": ((128, 32, 8, 2), (64, 64, 8, 1), (64, 32, 8, 1), (32, 32, 4, 2))},
    "dq": {
        "any": ((64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1), (16, 32, 4, 1)),
        10: ((64, 32, 8, 1), (64, 64, 8, 1, 168), (32, 32, 8, 1), (16, 16, 4, 1)),
    },
    "dkdv": {
        "any": ((32, 64, 8, 1), (32, 64, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
        8: ((64, 32, 8, 1), (64, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
        9: ((32, 64, 8, 1), (16, 64, 8, 2), (16, 32, 8, 1), (16, 16, 4, 1)),
    },
}


def _room(kernel: str, rows: int, keys: int, stages: int) -> float:
    """Rows of tensors in shared memory at most, with tiles of this size, as `subquad gpu-report` shows."""
    if kernel == "fwd":
        return rows + 2 * stages * keys
    return 2 * (rows + keys) if kernel == "dq" else 8 * (rows + keys) / 3


def _fitting(tiles: tuple[int, ...], kernel: str, row_bytes: int) -> tuple[int, ...]:
    """The tiles, or smaller ones where a block of this device has too little shared memory.

    AMD keeps operands in registers and needs a fraction of the room.
    """
    rows, keys, warps, stages, *rest = tiles
    limit = shared_memory() - 1024  # besides the tiles: sums across warps, barriers
    while _room(kernel, rows, keys, stages) * row_bytes > limit and max(rows, keys) > 16:
        if stages > 1:
            stages = 1
        elif rows >= keys:
            rows //= 2
        else:
            keys //= 2
    if _room(kernel, rows, keys, stages) * row_bytes > limit:
        raise ValueError(
            f"q: expected heads whose tiles fit {limit} bytes of shared memory, got {row_bytes} bytes for each row"
        )
    return rows, keys, warps, stages, *rest


def launch_options(width: int, wide_floats: bool, kernel: str) -> dict[str, int]:
    """Tile sizes, warps, stages and registers for the larger head dimension `width`.

    Raises:
        ValueError: heads too wide for the shared memory of this device: gradients of 512 in float32 below 172 KiB.
    """
    if INTERPRET.value:
        tiles: tuple[int, ...] = (64, 32, 4, 1)
    else:
        small, large, widest, fp32 = TILES[kernel].get(generation(), TILES[kernel]["any"])
        tiles = fp32 if wide_floats else small if width <= 64 else large if width <= 256 else widest
        if generation():
            tiles = _fitting(tiles, kernel, width * (4 if wide_floats else 2))
    return dict(zip(("BM", "BN", "num_warps", "num_stages", "maxnreg"), tiles, strict=False))
