"""The product with quantised weights, forward and backward, in Triton.

Forward: codes are operands of the matrix units as they are, for in every dtype of x they are exact; the sum of a group leaves
in fp32 and is multiplied by its scale there. Weights are not rounded; fp32 x goes in three tf32 terms. A minimum meets the
sum of a group's x.
Backward: rows are dequantised to fp32 in registers, multiplied in three tf32 terms.

Source of the formats: GGUF's Q8_0, Q4_0 and Q4_1; see reference/quantised_linear.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._common.aot import AotCase
from ._common.checks import check_packed, require
from ._common.device import tf32x3
from ._common.numerics import INTERPRET, cast, is_finite, widen_if_interpreted

GROUP = tl.constexpr(32)
INT8, INT4, INT4_MIN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_CODE_BYTES = (32, 16, 16)
_GROUP_BYTES = (34, 18, 20)


class Weight(NamedTuple):
    """Rows of codes, then fp16 scales, then fp16 minima, seen as bytes and as fp16."""

    bytes: Any  # [rows, groups * group bytes]
    halves: Any  # the same memory
    rows: Any
    groups: Any


@triton.jit
def _scales(w, rows, live, group, CODES: tl.constexpr, BYTES: tl.constexpr, MINIMA: tl.constexpr):
    """fp32 scale (or minimum) of one group of some rows, 0 outside."""
    at = rows.to(tl.int64) * (w.groups * BYTES // 2) + w.groups * (CODES // 2) + group
    if MINIMA:
        at += w.groups
    return tl.load(w.halves + at, live, other=0.0).to(tl.float32)


@triton.jit
def _weights(w, rows, live, group, FORMAT: tl.constexpr, CODES: tl.constexpr, BYTES: tl.constexpr):
    """fp32 [rows, GROUP]: one group of some rows, dequantised, 0 outside."""
    k = tl.arange(0, GROUP)
    codes = w.bytes + rows.to(tl.int64) * (w.groups * BYTES) + group * CODES
    if FORMAT == INT8:
        code = tl.load(codes[:, None] + k[None, :], live[:, None], other=0).to(tl.int8, bitcast=True).to(tl.float32)
    else:
        raw = tl.load(codes[:, None] + (k % 16)[None, :], live[:, None], other=0).to(tl.int32)
        code = ((raw >> (k // 16 * 4)[None, :]) & 15).to(tl.float32)
        if FORMAT == INT4:
            code -= 8.0
    values = code * _scales(w, rows, live, group, CODES, BYTES, False)[:, None]
    if FORMAT == INT4_MIN:
        values += _scales(w, rows, live, group, CODES, BYTES, True)[:, None]
    return values


@triton.jit
def _part(x, codes, acc):
    """acc + x codes^T; the interpreter's bfloat16 is wrong, and float32 the same."""
    codes = codes.to(tl.float32) if INTERPRET else codes.to(x.dtype)
    return tl.dot(widen_if_interpreted(x), tl.trans(codes), acc, input_precision=tf32x3())


@triton.jit(do_not_specialize=["tokens"])
def _quantised_linear_fwd_kernel(
    x_ptr, w, bias_ptr, y_ptr, tokens,
    FORMAT: tl.constexpr, CODES: tl.constexpr, BYTES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y[BM tokens, BN rows of the weight]."""
    tiles = tl.cdiv(tokens, BM)
    token = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    rows = tl.program_id(0) // tiles * BN + tl.arange(0, BN)
    alive, live = token < tokens, rows < w.rows
    x_rows = x_ptr + token.to(tl.int64) * (w.groups * GROUP)
    codes = w.bytes + rows.to(tl.int64) * (w.groups * BYTES)
    half = tl.arange(0, 16)
    acc = tl.zeros([BM, BN], tl.float32)
    for group in range(w.groups):
        part = tl.zeros([BM, BN], tl.float32)
        if FORMAT == INT8:
            k = tl.arange(0, GROUP)
            x = tl.load(x_rows[:, None] + (k + group * GROUP)[None, :], alive[:, None], other=0.0)
            raw = tl.load(codes[:, None] + (group * CODES + k)[None, :], live[:, None], other=0)
            part = _part(x, raw.to(tl.int8, bitcast=True), part)
        else:
            low = tl.load(x_rows[:, None] + (half + group * GROUP)[None, :], alive[:, None], other=0.0)
            high = tl.load(x_rows[:, None] + (half + 16 + group * GROUP)[None, :], alive[:, None], other=0.0)
            raw = tl.load(codes[:, None] + (group * CODES + half)[None, :], live[:, None], other=0).to(tl.int32)
            middle = 8 if FORMAT == INT4 else 0
            part = _part(low, (raw & 15) - middle, part)
            part = _part(high, (raw >> 4) - middle, part)
            if FORMAT == INT4_MIN:
                sums = tl.sum(low.to(tl.float32), axis=1) + tl.sum(high.to(tl.float32), axis=1)  # [BM]
                acc += sums[:, None] * _scales(w, rows, live, group, CODES, BYTES, True)[None, :]
        acc += part * _scales(w, rows, live, group, CODES, BYTES, False)[None, :]
    # Where x or a scale is infinite, the order of the products matters: then with weights as they are.
    if tl.min(tl.min(is_finite(acc).to(tl.int32), axis=1), axis=0) == 0:
        exact = tl.zeros([BM, BN], tl.float32)
        for group in tl.range(0, w.groups, num_stages=1):
            k = tl.arange(0, GROUP) + group * GROUP
            values = _weights(w, rows, live, group, FORMAT, CODES, BYTES)  # [BN, GROUP]
            for i in range(BM):
                this = tl.program_id(0) % tiles * BM + i
                row = tl.minimum(this, tokens - 1).to(tl.int64)  # what is behind the last is not stored
                x = tl.load(x_ptr + row * (w.groups * GROUP) + k)
                terms = tl.sum(values * x.to(tl.float32)[None, :], axis=1)  # [BN]
                exact = tl.where((token == this)[:, None], exact + terms[None, :], exact)
        acc = tl.where(is_finite(acc), acc, exact)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows, live, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + token.to(tl.int64)[:, None] * w.rows + rows[None, :]
    tl.store(y, cast(acc, y_ptr.dtype.element_ty), alive[:, None] & live[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _quantised_linear_bwd_kernel(
    grad_ptr, w, out_ptr, tokens,
    FORMAT: tl.constexpr, CODES: tl.constexpr, BYTES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """grad_x[BM tokens, a group of columns]."""
    tiles = tl.cdiv(tokens, BM)
    token = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    group = tl.program_id(0) // tiles
    alive = token < tokens
    acc = tl.zeros([BM, GROUP], tl.float32)
    for start in range(0, w.rows, BN):
        rows = start + tl.arange(0, BN)
        live = rows < w.rows
        values = _weights(w, rows, live, group, FORMAT, CODES, BYTES)  # [BN, GROUP]
        at = grad_ptr + token.to(tl.int64)[:, None] * w.rows + rows[None, :]
        grad = tl.load(at, alive[:, None] & live[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(grad, values, acc, input_precision=tf32x3())
    out = out_ptr + token.to(tl.int64)[:, None] * (w.groups * GROUP) + (tl.arange(0, GROUP) + group * GROUP)[None, :]
    tl.store(out, cast(acc, out_ptr.dtype.element_ty), alive[:, None])


def _weight(weight: torch.Tensor, columns: int, format: int) -> tuple[Weight, dict[str, int]]:
    """What the kernels take, after the checks that keep them inside their tensors."""
    groups = columns // GROUP.value
    fits = weight.dim() == 2 and weight.shape[1] == groups * _GROUP_BYTES[format] and columns % GROUP.value == 0
    require(fits and weight.dtype == torch.uint8 and weight.is_contiguous(), "weight", "contiguous uint8 rows", weight)
    constants = {"FORMAT": format, "CODES": _CODE_BYTES[format], "BYTES": _GROUP_BYTES[format]}
    if weight.storage_offset() % 2:  # scales are read as fp16
        weight = weight.clone()
    halves = weight.view(torch.float16) if groups else weight.to(torch.float16)
    return Weight(weight, halves, weight.shape[0], groups), constants


def quantised_linear_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, columns: int, format: int
) -> torch.Tensor:
    """y [M, N] of x [M, K] and weight uint8 [N, row bytes]; all contiguous.

    Raises:
        ValueError: for shapes or strides outside the above.
    """
    w, constants = _weight(weight, columns, format)
    check_packed("x", x, (x.shape[0], columns), x)
    check_packed("bias", bias, (w.rows,), x)
    tokens = x.shape[0]
    y = torch.empty((tokens, w.rows), dtype=x.dtype, device=x.device)
    if y.numel():
        bm, bn = 16 if tokens <= 16 else 64, 32 if x.dtype == torch.float32 else 64
        grid = (triton.cdiv(tokens, bm) * triton.cdiv(w.rows, bn),)
        _quantised_linear_fwd_kernel[grid](x, w, bias, y, tokens, **constants, BM=bm, BN=bn, num_warps=4)
    return y


def quantised_linear_bwd(grad_y: torch.Tensor, weight: torch.Tensor, columns: int, format: int) -> torch.Tensor:
    """grad_x [M, K] of grad_y [M, N]; all contiguous.

    Raises:
        ValueError: for shapes or strides outside the above.
    """
    w, constants = _weight(weight, columns, format)
    check_packed("grad_y", grad_y, (grad_y.shape[0], w.rows), grad_y)
    tokens = grad_y.shape[0]
    grad_x = torch.empty((tokens, columns), dtype=grad_y.dtype, device=grad_y.device)
    if grad_x.numel():
        bm, bn = 16 if tokens <= 16 else 64, 64
        grid = (triton.cdiv(tokens, bm) * w.groups,)
        _quantised_linear_bwd_kernel[grid](grad_y, w, grad_x, tokens, **constants, BM=bm, BN=bn, num_warps=4)
    return grad_x


def _aot_args(dtype: torch.dtype, tokens: int, format: int, backward: bool) -> tuple[Any, ...]:
    rows, columns = 11008, 4096
    weight = torch.empty((rows, columns // 32 * _GROUP_BYTES[format]), dtype=torch.uint8, device="meta")
    x = torch.empty((tokens, rows if backward else columns), dtype=dtype, device="meta")
    bias = () if backward else (torch.empty(rows, dtype=dtype, device="meta"),)
    return (x, weight, *bias, columns, format)


_TOKENS = ((torch.bfloat16, "bf16", 1), (torch.bfloat16, "bf16", 128), (torch.float32, "fp32", 1))

AOT = [
    AotCase(
        f"{name} {kind} {tokens} {'bwd' if backward else 'fwd'}",
        launcher,
        partial(_aot_args, dtype, tokens, format, backward),
    )
    for dtype, name, tokens in _TOKENS
    for format, kind in ((0, "int8"), (2, "int4_min"))
    for launcher, backward in ((quantised_linear_fwd, False), (quantised_linear_bwd, True))
]

__all__ = ["AOT", "quantised_linear_bwd", "quantised_linear_fwd"]
