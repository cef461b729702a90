"""What the kernels of interval attention share: which tiles and pairs a mask leaves, and products that hide the rest.

Tiles are visited in one order: those seen in part first, then those that every row sees wholly. Plain masks find them in closed
form; masks in tensors bring them in a plan.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import INTERPRET, cast, is_finite, widen_if_interpreted

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PLAN_Q, PLAN_K = tl.constexpr(128), tl.constexpr(64)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in fp32; operands in the input dtype."""
    return tl.dot(widen_if_interpreted(a), widen_if_interpreted(b), input_precision=PRECISION)


@triton.jit
def finite_part(x, bad, MASKED: tl.constexpr):
    """x for a product with weights, some of which are 0 because the mask hides the pair: 0 * NaN is NaN, so NaN and infinity
    are taken out, and `bad` remembers that `add_nonfinite` must put them where they are seen. Without MASKED, x as it is."""
    if not MASKED:
        return x, bad
    wide = x.to(tl.float32)
    finite = is_finite(wide)
    return cast(tl.where(finite, wide, 0.0), x.dtype), bad | tl.max(tl.where(finite, 0, 1))


@triton.jit
def add_nonfinite(acc, keep, x_ptr, row, stride, count, width):
    """acc plus what is not finite in row `row` of the matrix [count, width] at x_ptr, where keep [rows of acc, 1] says that it is
    seen."""
    cols = tl.arange(0, acc.shape[1])
    inside = (cols < width) & (cols * 0 + row < count)
    x = tl.load(x_ptr + tl.cast(row, tl.int64) * stride + cols, inside, other=0.0).to(tl.float32)
    poison = keep & (is_finite(x) == 0)[None, :]
    return tl.where(poison, acc + x[None, :], acc)


@triton.jit
def visible(
    rows, cols, starts_ptr, ends_ptr, life_ptr, death_ptr, bias, tq, tk, sink_tokens, window, slot,
    KEYS_DOWN: tl.constexpr, PLANNED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, M: tl.constexpr,
    SLOTS: tl.constexpr, LIFETIME: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """bool [rows, cols], or [cols, rows] with KEYS_DOWN: which pairs the mask, the lifetimes and biases of -inf leave."""
    R: tl.constexpr = 0 if KEYS_DOWN else 1  # the dimension in which rows are repeated
    C: tl.constexpr = 1 - R
    t = tl.expand_dims(rows, R)
    j = tl.expand_dims(cols, C)
    live = rows < tq
    keep = (t < tq) & (j < tk)
    if PLANNED:
        at = rows.to(tl.int64) * M
        if SLOTS > 1:
            s = tl.expand_dims(tl.load(starts_ptr + at + slot, live, other=0), R)
            e = tl.expand_dims(tl.load(ends_ptr + at + slot, live, other=0), R)
            keep = keep & (j >= s) & (j < e)
        else:
            inside = keep & (j < 0)
            for r in range(M):
                s = tl.expand_dims(tl.load(starts_ptr + at + r, live, other=0), R)
                e = tl.expand_dims(tl.load(ends_ptr + at + r, live, other=0), R)
                inside = inside | ((j >= s) & (j < e))
            keep = keep & inside
    elif CAUSAL:
        i = t + (tk - tq)
        keep = keep & (j <= i)
        if WINDOWED:
            keep = keep & ((j < sink_tokens) | (i - j < window))
    if LIFETIME:
        first = tl.expand_dims(tl.load(life_ptr + cols, cols < tk, other=0), C)
        last = tl.expand_dims(tl.load(death_ptr + cols, cols < tk, other=0), C)
        keep = keep & (t >= first) & (t < last)
    if BIAS:
        keep = keep & (tl.expand_dims(bias, C) != float("-inf"))
    return keep


@triton.jit
def load_rows(ptr, first, stride, count, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] of a matrix from row `first` on, rows `stride` apart; 0 outside [count, width]."""
    rows = first + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    offsets = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    return tl.load(ptr + offsets, (rows < count)[:, None] & (cols < width)[None, :], other=0.0)


@triton.jit
def load_bias(bias_ptr, cols, tk, BIAS: tl.constexpr):
    """Biases of keys in units of log2; 0 without."""
    if BIAS:
        return tl.load(bias_ptr + cols, cols < tk, other=0.0) * LOG2E
    return tl.zeros([cols.shape[0]], tl.float32)


@triton.jit
def key_tiles(
    first_row, last_row, tq, tk, sink_tokens, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PLAIN: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Tiles of keys that rows [first_row, last_row] see under a plain mask: [0, sinks), [low, high), of the latter
    [full_low, full_high) wholly (none without PLAIN)."""
    tiles = tl.cdiv(tk, BN)
    whole = tk // BN
    sinks = 0
    low = 0
    high = tiles
    full_low = 0
    full_high = whole
    if CAUSAL:
        i0 = first_row + (tk - tq)
        i1 = last_row + (tk - tq)
        high = tl.minimum(tiles, tl.cdiv(tl.maximum(i1 + 1, 0), BN))
        full_high = tl.minimum(whole, tl.maximum(i0 + 1, 0) // BN)
        if WINDOWED:
            sinks = tl.minimum(tl.cdiv(sink_tokens, BN), high)
            low = tl.maximum(sinks, tl.maximum(i0 - window + 1, 0) // BN)
            low = tl.minimum(low, high)
            full_low = tl.cdiv(tl.maximum(i1 - window + 1, 0), BN)
    full_low = tl.minimum(tl.maximum(full_low, low), high)
    full_high = tl.minimum(tl.maximum(full_high, full_low), high)
    if not PLAIN:
        full_high = full_low
    return sinks, low, full_low, full_high, high


@triton.jit
def masked_tile(n, sinks, low, full_low, full_high):
    """The n-th tile of [0, sinks), [low, full_low), [full_high, high)."""
    tile = n - sinks + low
    tile = tl.where(tile >= full_low, tile + full_high - full_low, tile)
    return tl.where(n < sinks, n, tile)


@triton.jit
def row_tiles(
    first_key, last_key, tq, tk, sink_tokens, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PLAIN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Tiles of rows [low, high) that see keys [first_key, last_key] under a plain mask, [full_low, full_high) wholly."""
    tiles = tl.cdiv(tq, BM)
    low = 0
    high = tiles
    full_low = 0
    full_high = tiles
    if CAUSAL:
        first_row = tl.maximum(first_key - (tk - tq), 0)  # of the rows that see some key
        all_row = tl.maximum(last_key - (tk - tq), 0)  # of the rows behind all keys
        low = tl.minimum(first_row // BM, tiles)
        full_low = tl.cdiv(all_row, BM)
        if WINDOWED:
            if first_key >= sink_tokens:
                last = last_key + window - 1 - (tk - tq)
                high = tl.minimum(tiles, tl.maximum(last, -1) // BM + 1)
                whole = first_key + window - (tk - tq)  # rows below see all keys
                full_high = tl.maximum(whole, 0) // BM
            else:
                full_high = tl.where(last_key < sink_tokens, tiles, 0)
    if last_key >= tk:
        full_high = 0
    low = tl.minimum(low, high)
    full_low = tl.minimum(tl.maximum(full_low, low), high)
    full_high = tl.minimum(tl.maximum(full_high, full_low), high)
    if not PLAIN:
        full_high = full_low
    return low, full_low, full_high, high


@triton.jit
def visits(
    count_ptr, first, last, tq, tk, sink_tokens, window,
    KEYS: tl.constexpr, PLANNED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PLAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """How many tiles are seen in part, how many in all, and four numbers for `visited`: tiles of keys for rows [first, last]
    with KEYS, else tiles of rows for keys [first, last]."""
    sinks = 0
    low = 0
    full_low = 0
    full_high = 0
    if PLANNED:
        SUB: tl.constexpr = (PLAN_K if KEYS else PLAN_Q) // BLOCK
        masked = tl.load(count_ptr) * SUB
        both = masked + tl.load(count_ptr + 1) * SUB
    elif KEYS:
        sinks, low, full_low, full_high, high = key_tiles(
            first, last, tq, tk, sink_tokens, window, CAUSAL, WINDOWED, PLAIN, BLOCK
        )
        both = sinks + high - low
        masked = both - (full_high - full_low)
    else:
        low, full_low, full_high, high = row_tiles(
            first, last, tq, tk, sink_tokens, window, CAUSAL, WINDOWED, PLAIN, BLOCK
        )
        both = high - low
        masked = both - (full_high - full_low)
    return masked, both, sinks, low, full_low, full_high


@triton.jit
def visited(
    n, masked, sinks, low, full_low, full_high, list_ptr, KEYS: tl.constexpr, PLANNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Where the n-th tile begins."""
    if PLANNED:
        PLAN: tl.constexpr = PLAN_K if KEYS else PLAN_Q
        SUB: tl.constexpr = PLAN // BLOCK
        return tl.load(list_ptr + n // SUB) * PLAN + (n - n // SUB * SUB) * BLOCK
    else:
        return tl.where(n < masked, masked_tile(n, sinks, low, full_low, full_high), n - masked + full_low) * BLOCK


@triton.jit
def load_lse2(lse_ptr, at, live):
    """lse in units of log2; +inf, which makes every weight 0, for rows that see nothing or do not exist."""
    lse = tl.load(lse_ptr + at, live, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


# (BM, BN, warps, stages) by kernel, of bf16 and fp16 up to a head dimension of 64, of 128 and beyond, and of fp32, where a
# product is three. The largest tiles that need no spills, with the matrix units of each generation (8: mma, 9: wgmma, 10:
# tcgen05), as `subquad gpu-report` shows; not measured on a GPU.
TILES: dict[str, dict[int | str, tuple[tuple[int, ...], ...]]] = {
    "fwd": {"any": ((128, 32, 8, 2), (64, 64, 8, 1), (32, 32, 4, 2))},
    "dq": {
        "any": ((64, 32, 8, 1), (64, 32, 8, 1), (16, 32, 4, 1)),
        10: ((64, 32, 8, 1), (64, 64, 8, 1), (16, 16, 4, 1)),
    },
    "dkdv": {
        "any": ((32, 64, 8, 1), (32, 64, 8, 1), (16, 16, 4, 1)),
        8: ((64, 32, 8, 1), (64, 32, 8, 1), (16, 16, 4, 1)),
        9: ((32, 64, 8, 1), (16, 64, 8, 2), (16, 16, 4, 1)),
    },
}


def launch_options(width: int, wide_floats: bool, kernel: str) -> dict[str, int]:
    """Tile sizes, warps and stages for the larger head dimension `width`."""
    if INTERPRET.value:
        tiles: tuple[int, ...] = (64, 32, 4, 1)
    else:
        generation = int(triton.runtime.driver.active.get_current_target().arch) // 10
        small, large, fp32 = TILES[kernel].get(generation, TILES[kernel]["any"])
        tiles = fp32 if wide_floats else small if width <= 64 else large
    return dict(zip(("BM", "BN", "num_warps", "num_stages"), tiles, strict=True))
