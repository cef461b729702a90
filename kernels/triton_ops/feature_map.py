"""Feature maps of linear attention, forward and backward: phi = max([g(y), g(-y)], eps) with y = x W per head.

Forward: a program takes a block of tokens of one head; y stays in registers between the product and the map. Backward: y is
computed again, by one kernel for dx and by one for partial sums of dW over fixed chunks of tokens; a third adds those in
their order, so that nothing depends on the schedule. Products of gradients are fp32 in three tf32 terms, since a gradient
rounded to 16 bits would cost as much as the result's own rounding.

Source: LoLCATs (arXiv 2410.10254), Hedgehog (arXiv 2402.04347); the fused passes are this project's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ._common.aot import AotCase
from ._common.features import ELU1, HEDGEHOG2, gradient, store_features
from ._common.numerics import INTERPRET, cast, widen_if_interpreted

MAX_DIM = 256
_REDUCE = {"BLOCK": 1024, "num_warps": 4}


@triton.jit
def _project(x_rows, w_ptr, live, d, f, D: tl.constexpr, F: tl.constexpr, BK: tl.constexpr):
    """y [rows, F] in fp32, 0 outside; without a weight x itself."""
    cols = tl.arange(0, F)
    if w_ptr is None:
        return tl.load(x_rows[:, None] + cols[None, :], live[:, None] & (cols < f)[None, :], other=0.0).to(tl.float32)
    else:
        y = tl.zeros([x_rows.shape[0], F], tl.float32)
        for start in range(0, D, BK):
            k = start + tl.arange(0, BK)
            x = tl.load(x_rows[:, None] + k[None, :], live[:, None] & (k < d)[None, :], other=0.0)
            w = tl.load(w_ptr + k[:, None] * f + cols[None, :], (k < d)[:, None] & (cols < f)[None, :], other=0.0)
            y = tl.dot(widen_if_interpreted(x), widen_if_interpreted(w), y, input_precision="ieee")
        return y


@triton.jit
def _x_rows(x_ptr, rows, time, head, stride_b, stride_t, stride_h):
    batch = rows // time
    return x_ptr + batch.to(tl.int64) * stride_b + (rows - batch * time).to(tl.int64) * stride_t + head * stride_h


@triton.jit(do_not_specialize=["rows", "time"])
def _feature_map_fwd_kernel(
    x_ptr, w_ptr, out_ptr, rows, time, heads, d, f, stride_b, stride_t, stride_h, eps,
    KIND: tl.constexpr, FULLSPACE: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % heads).to(tl.int64)
    row = tl.program_id(0) // heads * BM + tl.arange(0, BM)
    live = row < rows
    if w_ptr is not None:
        w_ptr += head * d * f
    y = _project(_x_rows(x_ptr, row, time, head, stride_b, stride_t, stride_h), w_ptr, live, d, f, D, F, BK)
    store_features(y, out_ptr, row.to(tl.int64) * heads + head, live, f, eps, KIND, FULLSPACE, F)


@triton.jit(do_not_specialize=["rows", "time"])
def _feature_map_dx_kernel(
    grad_ptr, x_ptr, w_ptr, dx_ptr, rows, time, heads, d, f, stride_b, stride_t, stride_h, eps,
    KIND: tl.constexpr, FULLSPACE: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % heads).to(tl.int64)
    row = tl.program_id(0) // heads * BM + tl.arange(0, BM)
    live = row < rows
    if w_ptr is not None:
        w_ptr += head * d * f
    y = _project(_x_rows(x_ptr, row, time, head, stride_b, stride_t, stride_h), w_ptr, live, d, f, D, F, BK)
    HALVES: tl.constexpr = 2 if FULLSPACE else 1
    at = row.to(tl.int64) * heads + head
    dy = gradient(y, grad_ptr + at * f * HALVES, live, f, eps, KIND, FULLSPACE, F)
    cols = tl.arange(0, F)
    if w_ptr is None:
        dx = dx_ptr + at[:, None] * d + cols[None, :]
        tl.store(dx, cast(dy, dx_ptr.dtype.element_ty), live[:, None] & (cols < f)[None, :])
    else:
        for start in range(0, D, BK):
            k = start + tl.arange(0, BK)
            w = tl.load(w_ptr + k[:, None] * f + cols[None, :], (k < d)[:, None] & (cols < f)[None, :], other=0.0)
            part = tl.dot(dy, tl.trans(w.to(tl.float32)), input_precision="tf32x3")
            dx = dx_ptr + at[:, None] * d + k[None, :]
            tl.store(dx, cast(part, dx_ptr.dtype.element_ty), live[:, None] & (k < d)[None, :])


@triton.jit(do_not_specialize=["rows", "time", "chunk"])
def _feature_map_dw_kernel(
    grad_ptr, x_ptr, w_ptr, partial_ptr, rows, time, heads, d, f, stride_b, stride_t, stride_h, eps, chunk,
    KIND: tl.constexpr, FULLSPACE: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Partial sums [chunk, head, BD rows of the weight, f]."""
    BLOCKS: tl.constexpr = D // BD
    head = (tl.program_id(0) % heads).to(tl.int64)
    rest = tl.program_id(0) // heads
    part = rest // BLOCKS
    k = (rest - part * BLOCKS) * BD + tl.arange(0, BD)
    cols = tl.arange(0, F)
    HALVES: tl.constexpr = 2 if FULLSPACE else 1
    w_ptr += head * d * f
    acc = tl.zeros([BD, F], tl.float32)
    for start in range(part * chunk, tl.minimum(rows, (part + 1) * chunk), BM):
        row = start + tl.arange(0, BM)
        live = row < rows
        x_rows = _x_rows(x_ptr, row, time, head, stride_b, stride_t, stride_h)
        y = _project(x_rows, w_ptr, live, d, f, D, F, BK)
        at = row.to(tl.int64) * heads + head
        dy = gradient(y, grad_ptr + at * f * HALVES, live, f, eps, KIND, FULLSPACE, F)
        x = tl.load(x_rows[:, None] + k[None, :], live[:, None] & (k < d)[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(tl.trans(x), dy, acc, input_precision="tf32x3")
    out = partial_ptr + ((part.to(tl.int64) * heads + head) * d + k)[:, None] * f + cols[None, :]
    tl.store(out, acc, (k < d)[:, None] & (cols < f)[None, :])


@triton.jit(do_not_specialize=["chunks"])
def _feature_map_reduce_kernel(partial_ptr, dw_ptr, chunks, heads, sharing, entries, size, BLOCK: tl.constexpr):
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
    size = dweight.numel()
    _feature_map_reduce_kernel[(triton.cdiv(size, _REDUCE["BLOCK"]),)](
        partials, dweight, chunks, heads, heads // dweight.shape[0], d * f, size, **_REDUCE
    )


def chunk_of(rows: int) -> int:
    """Tokens in one partial sum: from the shape alone, at most 16 sums."""
    return triton.cdiv(max(256, triton.cdiv(rows, 16)), 32) * 32


def _call(
    x: torch.Tensor, weight: torch.Tensor | None, kind: int, fullspace: bool, eps: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(sizes, strides and eps; constants and warps) after the checks that keep the kernels inside their tensors."""
    if x.dim() != 4 or not 1 <= x.shape[3] <= MAX_DIM:
        raise ValueError(f"x: expected shape [B, T, H, d] with d in 1..{MAX_DIM}, got {list(x.shape)}")
    if x.shape[3] > 1 and x.stride(3) != 1:
        raise ValueError(f"x: expected a contiguous last dimension, got strides {x.stride()}")
    if not 0 <= kind < 5:
        raise ValueError(f"kind: expected a code in 0..4, got {kind}")
    if kind == HEDGEHOG2.value and not fullspace:
        raise ValueError("fullspace: expected True with this kind, got False")
    batch, time, heads, d = x.shape
    f = d
    if weight is not None:
        if weight.dim() != 3 or weight.shape[:2] != (heads, d) or not 1 <= weight.shape[2] <= MAX_DIM:
            raise ValueError(f"weight: expected shape [{heads}, {d}, f], f in 1..{MAX_DIM}, got {list(weight.shape)}")
        if weight.dtype is not x.dtype or not weight.is_contiguous():
            raise ValueError(
                f"weight: expected a contiguous tensor of {x.dtype}, got {weight.dtype}, {weight.stride()}"
            )
        f = weight.shape[2]
    width, cols = (max(16, triton.next_power_of_2(n)) for n in (d, f))
    eps = float("-inf") if kind == ELU1.value else eps
    sizes = (batch * time, time, heads, d, f, x.stride(0), x.stride(1), x.stride(2), eps)
    constants = {"KIND": kind, "FULLSPACE": fullspace, "D": width, "F": cols, "BK": min(width, 32)}
    constants["num_warps"] = 8 if cols >= 128 else 4
    return sizes, constants


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
    sizes, constants = _call(x, weight, kind, fullspace, eps)
    rows, heads, f = sizes[0], sizes[2], sizes[4]
    out = x.new_empty((*x.shape[:3], 2 * f if fullspace else f))
    if rows * heads:
        block = 32
        _feature_map_fwd_kernel[(triton.cdiv(rows, block) * heads,)](x, weight, out, *sizes, BM=block, **constants)
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
    sizes, constants = _call(x, weight, kind, fullspace, eps)
    rows, heads, d, f = sizes[0], sizes[2], sizes[3], sizes[4]
    shape = [*x.shape[:3], 2 * f if fullspace else f]
    if list(grad_out.shape) != shape or grad_out.dtype is not x.dtype or not grad_out.is_contiguous():
        got = f"{grad_out.dtype} {list(grad_out.shape)} with strides {grad_out.stride()}"
        raise ValueError(f"grad_out: expected a contiguous tensor of {x.dtype} {shape}, got {got}")
    dx = x.new_empty(x.shape)
    block = 32 if INTERPRET.value else 16
    if x.dtype is torch.float32 and constants["F"] >= 128:
        constants["BK"] = 16  # 32 spill
    if rows * heads:
        grid = (triton.cdiv(rows, block) * heads,)
        _feature_map_dx_kernel[grid](grad_out, x, weight, dx, *sizes, BM=block, **constants)
    if weight is None:
        return dx, x.new_empty((0,))
    if rows * heads == 0:
        return dx, torch.zeros_like(weight)
    chunk = chunk_of(rows)
    chunks = triton.cdiv(rows, chunk)
    dweight = x.new_empty(weight.shape)
    partials = x.new_empty((chunks, heads, d, f), dtype=torch.float32)
    depth = min(constants["D"], max(16, 4096 // constants["F"]))
    _feature_map_dw_kernel[(constants["D"] // depth * chunks * heads,)](
        grad_out, x, weight, partials, *sizes, chunk, BM=block, BD=depth, **constants
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
