"""Weights in few bits as the kernels read them: GGUF's numbers Q8_0, Q4_0 and Q4_1, see reference/quantised_linear.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.jit import constexpr_function

from .checks import require
from .device import tf32x3
from .numerics import INTERPRET, is_finite, widen_if_interpreted

GROUP = tl.constexpr(32)
INT8, INT4, INT4_MIN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_CODE_BYTES = (32, 16, 16)
_GROUP_BYTES = (34, 18, 20)


class Codes(NamedTuple):
    """Rows of codes, then fp16 scales, then fp16 minima. With `shared`, of codes alone, and 32 of them share a row of scales."""

    bytes: Any  # [rows, groups * group bytes], or [rows, groups * code bytes]
    halves: Any  # the same memory
    shared: Any  # fp16 [rows / 32, columns of scales, columns of minima], or None
    rows: Any
    groups: Any
    bias: Any


@constexpr_function
def code_bytes(format):
    """Of a group."""
    return _CODE_BYTES[format]


@constexpr_function
def group_bytes(format):
    """Of a group with its scale and minimum."""
    return _GROUP_BYTES[format]


@triton.jit
def scales(w, rows, live, group, FORMAT: tl.constexpr, MINIMA: tl.constexpr):
    """fp32 scale (or minimum) of one group of some rows, 0 outside."""
    at = rows.to(tl.int64) * (w.groups * group_bytes(FORMAT) // 2) + w.groups * (code_bytes(FORMAT) // 2) + group
    if MINIMA:
        at += w.groups
    return tl.load(w.halves + at, live, other=0.0).to(tl.float32)


@triton.jit
def _shared_scales(w, block, group, FORMAT: tl.constexpr, MINIMA: tl.constexpr):
    """fp32 scales (or minima) [GROUP] of one group of a block of 32 rows."""
    row = w.groups * GROUP * ((group_bytes(FORMAT) - code_bytes(FORMAT)) // 2)
    at = tl.arange(0, GROUP) + (group * GROUP + tl.cast(block, tl.int64) * row)
    if MINIMA:
        at += w.groups * GROUP
    return tl.load(w.shared + at).to(tl.float32)


@triton.jit
def weights(w, rows, live, group, block, FORMAT: tl.constexpr):
    """fp32 [rows, GROUP]: one group of some rows, dequantised, 0 outside. Of shared scales: rows of this block of 32."""
    k = tl.arange(0, GROUP)
    row_bytes = w.groups * (group_bytes(FORMAT) if w.shared is None else code_bytes(FORMAT))
    codes = w.bytes + rows.to(tl.int64) * row_bytes + group * code_bytes(FORMAT)
    if FORMAT == INT8:
        code = tl.load(codes[:, None] + k[None, :], live[:, None], other=0).to(tl.int8, bitcast=True).to(tl.float32)
    else:
        raw = tl.load(codes[:, None] + (k % 16)[None, :], live[:, None], other=0).to(tl.int32)
        code = ((raw >> (k // 16 * 4)[None, :]) & 15).to(tl.float32)
        if FORMAT == INT4:
            code -= 8.0
    if w.shared is None:
        values = code * scales(w, rows, live, group, FORMAT, False)[:, None]
        if FORMAT == INT4_MIN:
            values += scales(w, rows, live, group, FORMAT, True)[:, None]
        return values
    else:
        values = code * _shared_scales(w, block, group, FORMAT, False)[None, :]
        if FORMAT == INT4_MIN:
            values += _shared_scales(w, block, group, FORMAT, True)[None, :]
        return tl.where(live[:, None], values, 0.0)


@triton.jit
def _part(x, codes, acc):
    """acc + x codes^T; the interpreter's bfloat16 is wrong, and float32 the same."""
    codes = codes.to(tl.float32) if INTERPRET else codes.to(x.dtype)
    return tl.dot(widen_if_interpreted(x), tl.trans(codes), acc, input_precision=tf32x3())


@triton.jit
def product(x_ptr, w, first, tokens, rows, live, FORMAT: tl.constexpr, BM: tl.constexpr):
    """fp32 [BM, rows]: x[first + m] @ w[rows].T. Codes are operands as they are, which is exact in every dtype of x; the sum of
    a group leaves in fp32 and is multiplied by its scale there. Results outside `tokens` and `live` mean nothing."""
    token = first + tl.arange(0, BM)
    alive = token < tokens
    x_rows = x_ptr + token.to(tl.int64) * (w.groups * GROUP)
    codes = w.bytes + rows.to(tl.int64) * (w.groups * group_bytes(FORMAT))
    half = tl.arange(0, 16)
    acc = tl.zeros([BM, rows.shape[0]], tl.float32)
    for group in range(w.groups):
        part = tl.zeros([BM, rows.shape[0]], tl.float32)
        at = codes + group * code_bytes(FORMAT)
        if FORMAT == INT8:
            k = tl.arange(0, GROUP)
            x = tl.load(x_rows[:, None] + (k + group * GROUP)[None, :], alive[:, None], other=0.0)
            raw = tl.load(at[:, None] + k[None, :], live[:, None], other=0)
            part = _part(x, raw.to(tl.int8, bitcast=True), part)
        else:
            low = tl.load(x_rows[:, None] + (half + group * GROUP)[None, :], alive[:, None], other=0.0)
            high = tl.load(x_rows[:, None] + (half + 16 + group * GROUP)[None, :], alive[:, None], other=0.0)
            raw = tl.load(at[:, None] + half[None, :], live[:, None], other=0).to(tl.int32)
            middle = 8 if FORMAT == INT4 else 0
            part = _part(low, (raw & 15) - middle, part)
            part = _part(high, (raw >> 4) - middle, part)
            if FORMAT == INT4_MIN:
                sums = tl.sum(low.to(tl.float32), axis=1) + tl.sum(high.to(tl.float32), axis=1)  # [BM]
                acc += sums[:, None] * scales(w, rows, live, group, FORMAT, True)[None, :]
        acc += part * scales(w, rows, live, group, FORMAT, False)[None, :]
    # Where x or a scale is infinite, the order of the products matters: then with weights as they are.
    if tl.min(tl.min(is_finite(acc).to(tl.int32), axis=1), axis=0) == 0:
        exact = tl.zeros([BM, rows.shape[0]], tl.float32)
        for group in tl.range(0, w.groups, num_stages=1):
            k = tl.arange(0, GROUP) + group * GROUP
            values = weights(w, rows, live, group, 0, FORMAT)  # [rows, GROUP]
            for i in range(BM):
                this = first + i
                row = tl.minimum(this, tokens - 1).to(tl.int64)  # what is behind the last is not stored
                x = tl.load(x_ptr + row * (w.groups * GROUP) + k)
                terms = tl.sum(values * x.to(tl.float32)[None, :], axis=1)  # [rows]
                exact = tl.where((token == this)[:, None], exact + terms[None, :], exact)
        acc = tl.where(is_finite(acc), acc, exact)
    return acc


def codes_of(
    name: str,
    weight: torch.Tensor,
    columns: int,
    format: int,
    bias: torch.Tensor | None = None,
    shared: torch.Tensor | None = None,
) -> Codes:
    """What the kernels take, after the checks that keep them inside their tensors."""
    if not 0 <= format < len(_GROUP_BYTES):
        raise ValueError(f"{name}: expected format 0 to {len(_GROUP_BYTES) - 1}, got {format}")
    groups, numbers = columns // GROUP.value, _GROUP_BYTES[format] - _CODE_BYTES[format]
    size = row_bytes(columns, format, shared is not None)
    fits = weight.dim() == 2 and weight.shape[1] == size and columns % GROUP.value == 0
    require(fits and weight.dtype == torch.uint8 and weight.is_contiguous(), name, "contiguous uint8 rows", weight)
    rows = weight.shape[0]
    if shared is not None:
        fits = rows % GROUP.value == 0 and shared.shape == (rows // GROUP.value, columns * numbers)
        fits = fits and shared.dtype == torch.uint8 and shared.is_contiguous()
        require(fits, f"scales of {name}", f"contiguous uint8 [{rows} / 32, {columns * numbers}]", shared)
    halves = _halves(weight) if shared is None else None
    return Codes(weight, halves, None if shared is None else _halves(shared), rows, groups, bias)


def row_bytes(columns: int, format: int, shared: bool = False) -> int:
    """Of a row of so many weights; of its codes alone where scales are shared."""
    return columns // GROUP.value * (_CODE_BYTES if shared else _GROUP_BYTES)[format]


def _halves(data: torch.Tensor) -> torch.Tensor:
    """The same bytes as fp16."""
    if not data.numel():
        return data.to(torch.float16)
    return (data.clone() if data.storage_offset() % 2 else data).view(torch.float16)
