"""Feature maps of linear attention, forward and backward: phi = max([g(y), g(-y)], eps) with y = x W per head.

Forward: a program takes a block of tokens of one head; y stays in registers between the product and the map. Backward: y is
computed again, by one kernel for dx and by one for partial sums of dW over fixed chunks of tokens; a third adds those in
their order, so that nothing depends on the schedule. Products of gradients are fp32 in three tf32 terms, since a gradient
rounded to 16 bits would cost as much as the result's own rounding.

Source: LoLCATs (arXiv 2410.10254), Hedgehog (arXiv 2402.04347); the fused passes are this project's.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._common.aot import AotCase
from ._common.checks import check_packed, check_rows, require
from ._common.device import tf32x3
from ._common.features import (
    MAX_DIM,
    check_map,
    chunk_of,
    depth_of,
    gradient,
    least,
    map_constants,
    reduce_partials,
    store_dx,
    store_features,
)
from ._common.numerics import INTERPRET, cast, widen_if_interpreted


class Projection(NamedTuple):
    """y = x weight per head: x [B, T, heads, d] with a contiguous last dimension, weight [heads, d, f] or None (y = x)."""

    x: Any
    stride_b: Any
    stride_t: Any
    stride_h: Any
    weight: Any
    heads: Any
    d: Any
    f: Any
    eps: Any  # what the map of y is clamped to


@triton.jit
def _rows_of(y, rows, time, head):
    """Pointers to tokens `rows` of the flattened batch."""
    batch = rows // time
    token = (rows - batch * time).to(tl.int64)
    return y.x + batch.to(tl.int64) * y.stride_b + token * y.stride_t + head * y.stride_h


@triton.jit
def _project(y, x_rows, head, live, D: tl.constexpr, F: tl.constexpr, BK: tl.constexpr):
    """y [rows, F] in fp32, 0 outside."""
    cols = tl.arange(0, F)
    if y.weight is None:
        x = tl.load(x_rows[:, None] + cols[None, :], live[:, None] & (cols < y.f)[None, :], other=0.0)
        return x.to(tl.float32)
    else:
        w_ptr = y.weight + head * y.d * y.f
        acc = tl.zeros([x_rows.shape[0], F], tl.float32)
        for start in range(0, D, BK):
            k = start + tl.arange(0, BK)
            x = tl.load(x_rows[:, None] + k[None, :], live[:, None] & (k < y.d)[None, :], other=0.0)  # [rows, BK]
            w_mask = (k < y.d)[:, None] & (cols < y.f)[None, :]
            w = tl.load(w_ptr + k[:, None] * y.f + cols[None, :], w_mask, other=0.0)  # [BK, F]
            acc = tl.dot(widen_if_interpreted(x), widen_if_interpreted(w), acc, input_precision="ieee")
        return acc


@triton.jit(do_not_specialize=["rows", "time"])
def _feature_map_fwd_kernel(
    y, out_ptr, rows, time, MAP: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):
    head = (tl.program_id(0) % y.heads).to(tl.int64)
    row = tl.program_id(0) // y.heads * BM + tl.arange(0, BM)
    live = row < rows
    projected = _project(y, _rows_of(y, row, time, head), head, live, D, F, BK)  # [BM, F]
    store_features(projected, out_ptr, row.to(tl.int64) * y.heads + head, live, y.f, y.eps, MAP, F)


@triton.jit(do_not_specialize=["rows", "time"])
def _feature_map_dx_kernel(
    y, grad_ptr, dx_ptr, rows, time,
    MAP: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % y.heads).to(tl.int64)
    row = tl.program_id(0) // y.heads * BM + tl.arange(0, BM)
    live = row < rows
    projected = _project(y, _rows_of(y, row, time, head), head, live, D, F, BK)  # [BM, F]
    at = row.to(tl.int64) * y.heads + head
    dy = gradient(projected, grad_ptr, at, live, y.f, y.eps, MAP, F)  # [BM, F]
    if y.weight is None:
        cols = tl.arange(0, F)
        dx = dx_ptr + at[:, None] * y.d + cols[None, :]
        tl.store(dx, cast(dy, dx_ptr.dtype.element_ty), live[:, None] & (cols < y.f)[None, :])
    else:
        store_dx(dy, y.weight + head * y.d * y.f, dx_ptr, at, live, y.d, y.f, D, F, BK)


@triton.jit(do_not_specialize=["rows", "time", "chunk"])
def _feature_map_dw_kernel(
    y, grad_ptr, partial_ptr, rows, time, chunk,
    MAP: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Partial sums [chunk, head, BD rows of the weight, f]."""
    BLOCKS: tl.constexpr = D // BD
    head = (tl.program_id(0) % y.heads).to(tl.int64)
    rest = tl.program_id(0) // y.heads
    part = rest // BLOCKS
    k = (rest - part * BLOCKS) * BD + tl.arange(0, BD)
    cols = tl.arange(0, F)
    acc = tl.zeros([BD, F], tl.float32)
    for start in range(part * chunk, tl.minimum(rows, (part + 1) * chunk), BM):
        row = start + tl.arange(0, BM)
        live = row < rows
        x_rows = _rows_of(y, row, time, head)
        projected = _project(y, x_rows, head, live, D, F, BK)  # [BM, F]
        dy = gradient(projected, grad_ptr, row.to(tl.int64) * y.heads + head, live, y.f, y.eps, MAP, F)  # [BM, F]
        x = tl.load(x_rows[:, None] + k[None, :], live[:, None] & (k < y.d)[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(tl.trans(x), dy, acc, input_precision=tf32x3())
    out = partial_ptr + ((part.to(tl.int64) * y.heads + head) * y.d + k)[:, None] * y.f + cols[None, :]
    tl.store(out, acc, (k < y.d)[:, None] & (cols < y.f)[None, :])


def _call(
    x: torch.Tensor, weight: torch.Tensor | None, kind: int, fullspace: bool, eps: float
) -> tuple[Projection, dict[str, Any]]:
    """What the kernels take, and constants and warps, after the checks that keep them inside their tensors."""
    require(x.dim() == 4 and 1 <= x.shape[3] <= MAX_DIM, "x", f"[B, T, H, d] with d in 1..{MAX_DIM}", x)
    check_rows("x", x, tuple(x.shape), x)
    check_map(kind, fullspace)
    heads, d = x.shape[2:]
    f = d
    if weight is not None:
        fits = weight.dim() == 3 and 1 <= weight.shape[2] <= MAX_DIM
        require(fits, "weight", f"[{heads}, {d}, f] with f in 1..{MAX_DIM}", weight)
        check_packed("weight", weight, (heads, d, weight.shape[2]), x)
        f = weight.shape[2]
    y = Projection(x, x.stride(0), x.stride(1), x.stride(2), weight, heads, d, f, least(kind, eps))
    return y, map_constants(kind, fullspace, d, f)


def feature_map_fwd(
    x: torch.Tensor, weight: torch.Tensor | None, kind: int, fullspace: bool, eps: float
) -> torch.Tensor:
    """phi = max([g(y), g(-y)], eps), y = x weight.

    Args:
        x: `[B, T, H, d]`, fp32, bf16 or fp16, d in 1..256, last dimension contiguous.
        weight: `[H, d, f]` contiguous in x's dtype, or None for y = x.
        kind: 0 softmax, 1 exp, 2 relu, 3 elu1, 4 hedgehog2.
        fullspace: both halves; always with hedgehog2.
        eps: least value; elu1 is not clamped.

    Returns:
        phi `[B, T, H, 2f]`, or `[B, T, H, f]` without `fullspace`, in x's dtype.

    Raises:
        ValueError: for shapes or strides outside the above.
    """
    y, constants = _call(x, weight, kind, fullspace, eps)
    rows, time, block = x.shape[0] * x.shape[1], x.shape[1], 32
    out = x.new_empty((*x.shape[:3], 2 * y.f if fullspace else y.f))
    if rows * y.heads:
        _feature_map_fwd_kernel[(triton.cdiv(rows, block) * y.heads,)](y, out, rows, time, BM=block, **constants)
    return out


def feature_map_bwd(
    grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, kind: int, fullspace: bool, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `feature_map_fwd`; an entry that was clamped has none.

    Args: as `feature_map_fwd`; grad_out has the shape of phi, contiguous, in x's dtype.

    Returns:
        (dx `[B, T, H, d]` contiguous, dweight like weight; of size 0 without one).

    Raises:
        ValueError: as `feature_map_fwd`.
    """
    y, constants = _call(x, weight, kind, fullspace, eps)
    rows, time = x.shape[0] * x.shape[1], x.shape[1]
    check_packed("grad_out", grad_out, (*x.shape[:3], 2 * y.f if fullspace else y.f), x)
    dx = x.new_empty(x.shape)
    block = 32 if INTERPRET.value else 16
    if x.dtype is torch.float32 and constants["F"] >= 128:
        constants["BK"] = 16  # 32 spill
    if rows * y.heads:
        grid = (triton.cdiv(rows, block) * y.heads,)
        _feature_map_dx_kernel[grid](y, grad_out, dx, rows, time, BM=block, **constants)
    if weight is None:
        return dx, x.new_empty((0,))
    if rows * y.heads == 0:
        return dx, torch.zeros_like(weight)
    chunk, depth = chunk_of(rows), depth_of(constants)
    chunks = triton.cdiv(rows, chunk)
    dweight = x.new_empty(weight.shape)
    partials = x.new_empty((chunks, *weight.shape), dtype=torch.float32)
    _feature_map_dw_kernel[(constants["D"] // depth * chunks * y.heads,)](
        y, grad_out, partials, rows, time, chunk, BM=block, BD=depth, **constants
    )
    reduce_partials(partials, dweight)
    return dx, dweight


def _aot_args(
    dtype: torch.dtype, d: int, f: int, kind: int, weighted: bool, fullspace: bool, backward: bool
) -> tuple[Any, ...]:
    """A prefill of 4096 tokens with 32 heads."""
    empty = partial(torch.empty, dtype=dtype, device="meta")
    weight = empty((32, d, f)) if weighted else None
    call = (empty((1, 4096, 32, d)), weight, kind, fullspace, 1e-12)
    return (empty((1, 4096, 32, 2 * f if fullspace else f)), *call) if backward else call


AOT = [
    AotCase(f"{name} d{d} f{f} {label}", launcher, partial(_aot_args, dtype, d, f, kind, weighted, fullspace, backward))
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for d, f, label, kind, weighted, fullspace in (
        (64, 32, "softmax", 0, True, True),
        (128, 64, "softmax", 0, True, True),
        (128, 64, "hedgehog2", 4, True, True),
        (128, 64, "elu1", 3, True, True),
        (128, 128, "half", 0, True, False),
        (128, 128, "no weight", 0, False, True),
    )
    for launcher, backward in ((feature_map_fwd, False), (feature_map_bwd, True))
]

__all__ = ["AOT", "feature_map_bwd", "feature_map_fwd"]
