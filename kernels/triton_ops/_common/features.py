"""The feature maps of linear attention on rows in registers: phi = max([g(y), g(-y)], eps), and the slopes of g."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .device import tf32x3
from .numerics import cast

MAX_DIM = 256
SOFTMAX, EXP, RELU, ELU1, HEDGEHOG2 = (tl.constexpr(code) for code in range(5))


class Map(NamedTuple):
    """Constants of a map: which, and whether it has the half of -y too."""

    KIND: int
    FULLSPACE: bool


def check_map(kind: int, fullspace: bool) -> None:
    """Raise ValueError for what no branch below stands for."""
    if not 0 <= kind < 5:
        raise ValueError(f"kind: expected a code in 0..4, got {kind}")
    if kind == HEDGEHOG2.value and not fullspace:
        raise ValueError("fullspace: expected True with this kind, got False")


def map_constants(kind: int, fullspace: bool, d: int, f: int) -> dict[str, Any]:
    """The map and the padded sizes of its matrix [d, f], with the warps for them."""
    width, cols = (max(16, triton.next_power_of_2(n)) for n in (d, f))
    warps = 8 if cols >= 128 else 4
    return {"MAP": Map(kind, fullspace), "D": width, "F": cols, "BK": min(width, 32), "num_warps": warps}


def least(kind: int, eps: float) -> float:
    """What the map is clamped to; elu1 is not."""
    return float("-inf") if kind == ELU1.value else eps


@triton.jit
def _exponentials(y, row_max):
    """exp(y - row_max) [rows, F] and its sums over the columns [rows]."""
    e = tl.exp(y - row_max[:, None])
    return e, tl.sum(e, axis=1)


@triton.jit
def _value(y, KIND: tl.constexpr):
    if KIND == RELU:
        return tl.where(y <= 0.0, 0.0, y)
    elif KIND == ELU1:
        return tl.where(y > 0.0, y + 1.0, tl.exp(tl.where(y > 0.0, 0.0, y)))
    else:
        return tl.exp(y)


@triton.jit
def _slope(y, value, KIND: tl.constexpr):
    if KIND == RELU:
        return tl.where(y <= 0.0, 0.0, 1.0)
    elif KIND == ELU1:
        return tl.where(y > 0.0, 1.0, value)
    else:
        return value


@triton.jit
def features(y, inside, MAP: tl.constexpr):
    """The map of y and of -y [rows, F], not clamped; a softmax is 0 outside."""
    if MAP.KIND == SOFTMAX or MAP.KIND == HEDGEHOG2:
        up = tl.where(inside, y, float("-inf"))
        row_max = tl.max(up, axis=1)
        if MAP.FULLSPACE:
            down = tl.where(inside, -y, float("-inf"))
            row_max_down = tl.max(down, axis=1)
            if MAP.KIND == HEDGEHOG2:
                row_max = tl.maximum(row_max, row_max_down)
                row_max_down = row_max
            up, row_sum = _exponentials(up, row_max)
            down, row_sum_down = _exponentials(down, row_max_down)
            if MAP.KIND == HEDGEHOG2:
                row_sum += row_sum_down
                row_sum_down = row_sum
            return up / row_sum[:, None], down / row_sum_down[:, None]
        else:
            up, row_sum = _exponentials(up, row_max)
            up = up / row_sum[:, None]
            return up, up
    else:
        up = _value(y, MAP.KIND)
        if MAP.FULLSPACE:
            return up, _value(-y, MAP.KIND)
        else:
            return up, up


@triton.jit
def store_features(y, out_ptr, at, live, f, eps, MAP: tl.constexpr, F: tl.constexpr):
    """The clamped map of y [rows, F] to rows `at` of the result, where they are live."""
    cols = tl.arange(0, F)
    inside = (cols < f)[None, :]
    up, down = features(y, inside, MAP)
    mask = live[:, None] & inside
    HALVES: tl.constexpr = 2 if MAP.FULLSPACE else 1
    out = out_ptr + at[:, None] * f * HALVES + cols[None, :]
    tl.store(out, cast(tl.where(up < eps, eps, up), out_ptr.dtype.element_ty), mask)
    if MAP.FULLSPACE:
        tl.store(out + f, cast(tl.where(down < eps, eps, down), out_ptr.dtype.element_ty), mask)


@triton.jit
def gradient(y, grad_ptr, at, live, f, eps, MAP: tl.constexpr, F: tl.constexpr):
    """dy [rows, F] in fp32 from rows `at` of the result's gradient, 0 outside and in rows that do not exist."""
    cols = tl.arange(0, F)
    inside = (cols < f)[None, :]
    mask = live[:, None] & inside
    HALVES: tl.constexpr = 2 if MAP.FULLSPACE else 1
    grad_rows = grad_ptr + at * f * HALVES
    up, down = features(y, inside, MAP)
    g = tl.load(grad_rows[:, None] + cols[None, :], mask, other=0.0).to(tl.float32)
    g = tl.where(up < eps, 0.0, g)
    SUMS: tl.constexpr = MAP.KIND != EXP and MAP.KIND != RELU and MAP.KIND != ELU1
    if MAP.FULLSPACE:
        h = tl.load(grad_rows[:, None] + f + cols[None, :], mask, other=0.0).to(tl.float32)
        h = tl.where(down < eps, 0.0, h)
        if SUMS:
            dot = tl.sum(up * g, axis=1)
            dot_down = tl.sum(down * h, axis=1)
            if MAP.KIND == HEDGEHOG2:
                dot += dot_down
                dot_down = dot
            dy = up * (g - dot[:, None]) - down * (h - dot_down[:, None])
        else:
            # Selected, so that an infinite slope is not multiplied by the 0 of a clamped entry.
            dy = tl.where(up < eps, 0.0, g * _slope(y, up, MAP.KIND))
            dy -= tl.where(down < eps, 0.0, h * _slope(-y, down, MAP.KIND))
    elif SUMS:
        dy = up * (g - tl.sum(up * g, axis=1)[:, None])
    else:
        dy = tl.where(up < eps, 0.0, g * _slope(y, up, MAP.KIND))
    return tl.where(mask, dy, 0.0)


@triton.jit
def store_dx(dy, w_ptr, out_ptr, at, live, d, f, D: tl.constexpr, F: tl.constexpr, BK: tl.constexpr):
    """dy [rows, F] times the matrix [d, f] transposed, to rows `at` of [rows, d]."""
    cols = tl.arange(0, F)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        w = tl.load(w_ptr + k[:, None] * f + cols[None, :], (k < d)[:, None] & (cols < f)[None, :], other=0.0)
        part = tl.dot(dy, tl.trans(w.to(tl.float32)), input_precision=tf32x3())  # [rows, BK]
        out = out_ptr + at[:, None] * d + k[None, :]
        tl.store(out, cast(part, out_ptr.dtype.element_ty), live[:, None] & (k < d)[None, :])


@triton.jit(do_not_specialize=["chunks"])
def feature_map_reduce_kernel(partial_ptr, dw_ptr, chunks, heads, sharing, entries, size, BLOCK: tl.constexpr):
    """dW from the partial sums of the heads that share it, in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = at // entries
    acc = tl.zeros([BLOCK], tl.float32)
    for h in range(sharing):
        first = (index * sharing + h) * entries + (at - index * entries)
        for c in range(chunks):
            acc += tl.load(partial_ptr + tl.cast(c, tl.int64) * heads * entries + first, at < size, other=0.0)
    tl.store(dw_ptr + at, cast(acc, dw_ptr.dtype.element_ty), at < size)


def reduce_partials(partials: torch.Tensor, dweight: torch.Tensor) -> None:
    """dweight `[M, d, f]` from fp32 partials `[chunks, H, d, f]`; H / M heads in a row share a matrix."""
    chunks, heads, d, f = partials.shape
    size, block = dweight.numel(), 1024
    feature_map_reduce_kernel[(triton.cdiv(size, block),)](
        partials, dweight, chunks, heads, heads // dweight.shape[0], d * f, size, BLOCK=block, num_warps=4
    )


def chunk_of(rows: int) -> int:
    """Tokens in one partial sum: from the shape alone, at most 16 sums."""
    return triton.cdiv(max(256, triton.cdiv(rows, 16)), 32) * 32


def depth_of(constants: dict[str, Any]) -> int:
    """Rows of dW in one program."""
    return min(constants["D"], max(16, 4096 // constants["F"]))
