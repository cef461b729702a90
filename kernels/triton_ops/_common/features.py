"""The feature maps of linear attention on rows in registers: phi = max([g(y), g(-y)], eps), and the slopes of g."""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import cast

SOFTMAX, EXP, RELU, ELU1, HEDGEHOG2 = (tl.constexpr(code) for code in range(5))


@triton.jit
def _normalised(y, top, COLS: tl.constexpr):
    """exp(y - top) and its sums over the columns."""
    e = tl.exp(y - top[:, None])
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
def slope(y, value, KIND: tl.constexpr):
    if KIND == RELU:
        return tl.where(y <= 0.0, 0.0, 1.0)
    elif KIND == ELU1:
        return tl.where(y > 0.0, 1.0, value)
    else:
        return value


@triton.jit
def features(y, inside, KIND: tl.constexpr, FULLSPACE: tl.constexpr, F: tl.constexpr):
    """The map of y and of -y [rows, F], not clamped; a softmax is 0 outside."""
    if KIND == SOFTMAX or KIND == HEDGEHOG2:  # noqa: SIM109
        up = tl.where(inside, y, float("-inf"))
        top = tl.max(up, axis=1)
        if FULLSPACE:
            down = tl.where(inside, -y, float("-inf"))
            top_down = tl.max(down, axis=1)
            if KIND == HEDGEHOG2:
                top = tl.maximum(top, top_down)
                top_down = top
            up, total = _normalised(up, top, F)
            down, total_down = _normalised(down, top_down, F)
            if KIND == HEDGEHOG2:
                total += total_down
                total_down = total
            return up / total[:, None], down / total_down[:, None]
        else:
            up, total = _normalised(up, top, F)
            up = up / total[:, None]
            return up, up
    else:
        up = _value(y, KIND)
        if FULLSPACE:
            return up, _value(-y, KIND)
        else:
            return up, up


@triton.jit
def store_features(y, out_ptr, at, live, f, eps, KIND: tl.constexpr, FULLSPACE: tl.constexpr, F: tl.constexpr):
    """The clamped map of y [rows, F] to rows `at` of the result, where they are live."""
    cols = tl.arange(0, F)
    inside = (cols < f)[None, :]
    up, down = features(y, inside, KIND, FULLSPACE, F)
    mask = live[:, None] & inside
    HALVES: tl.constexpr = 2 if FULLSPACE else 1
    out = out_ptr + at[:, None] * f * HALVES + cols[None, :]
    tl.store(out, cast(tl.where(up < eps, eps, up), out_ptr.dtype.element_ty), mask)
    if FULLSPACE:
        tl.store(out + f, cast(tl.where(down < eps, eps, down), out_ptr.dtype.element_ty), mask)


@triton.jit
def gradient(y, grad_rows, live, f, eps, KIND: tl.constexpr, FULLSPACE: tl.constexpr, F: tl.constexpr):
    """dy [rows, F] in fp32, 0 outside and in rows that do not exist."""
    cols = tl.arange(0, F)
    inside = (cols < f)[None, :]
    mask = live[:, None] & inside
    up, down = features(y, inside, KIND, FULLSPACE, F)
    g = tl.load(grad_rows[:, None] + cols[None, :], mask, other=0.0).to(tl.float32)
    g = tl.where(up < eps, 0.0, g)
    SUMS: tl.constexpr = KIND != EXP and KIND != RELU and KIND != ELU1
    if FULLSPACE:
        h = tl.load(grad_rows[:, None] + f + cols[None, :], mask, other=0.0).to(tl.float32)
        h = tl.where(down < eps, 0.0, h)
        if SUMS:
            dot = tl.sum(up * g, axis=1)
            dot_down = tl.sum(down * h, axis=1)
            if KIND == HEDGEHOG2:
                dot += dot_down
                dot_down = dot
            dy = up * (g - dot[:, None]) - down * (h - dot_down[:, None])
        else:
            # Selected, so that an infinite slope is not multiplied by the 0 of a clamped entry.
            dy = tl.where(up < eps, 0.0, g * slope(y, up, KIND))
            dy -= tl.where(down < eps, 0.0, h * slope(-y, down, KIND))
    elif SUMS:
        dy = up * (g - tl.sum(up * g, axis=1)[:, None])
    else:
        dy = tl.where(up < eps, 0.0, g * slope(y, up, KIND))
    return tl.where(mask, dy, 0.0)


__all__ = ["ELU1", "HEDGEHOG2", "features", "gradient", "slope", "store_features"]
