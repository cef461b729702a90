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


__all__ = ["ELU1", "EXP", "HEDGEHOG2", "RELU", "SOFTMAX", "features", "slope", "store_features"]
