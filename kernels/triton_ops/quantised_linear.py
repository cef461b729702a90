"""The product with quantised weights, forward and backward, in Triton.

Forward: codes are operands of the matrix units as they are, for in every dtype of x they are exact; the sum of a group leaves
in fp32 and is multiplied by its scale there. Weights are not rounded; fp32 x goes in three tf32 terms. A minimum meets the
sum of a group's x.
Backward: rows are dequantised to fp32 in registers, multiplied in three tf32 terms.

Source of the formats: GGUF's Q8_0, Q4_0 and Q4_1; see reference/quantised_linear.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ._common.aot import AotCase
from ._common.checks import check_packed
from ._common.device import tf32x3
from ._common.numerics import cast
from ._common.quantised import GROUP, codes_of, product, row_bytes, weights


@triton.jit(do_not_specialize=["tokens"])
def _quantised_linear_fwd_kernel(
    x_ptr, w, y_ptr, tokens, FORMAT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y[BM tokens, BN rows of the weight]."""
    tiles = tl.cdiv(tokens, BM)
    first = tl.program_id(0) % tiles * BM
    token = first + tl.arange(0, BM)
    rows = tl.program_id(0) // tiles * BN + tl.arange(0, BN)
    live = rows < w.rows
    acc = product(x_ptr, w, first, tokens, rows, live, FORMAT, BM)
    if w.bias is not None:
        acc += tl.load(w.bias + rows, live, other=0.0).to(tl.float32)[None, :]
    y = y_ptr + token.to(tl.int64)[:, None] * w.rows + rows[None, :]
    tl.store(y, cast(acc, y_ptr.dtype.element_ty), (token < tokens)[:, None] & live[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _quantised_linear_bwd_kernel(
    grad_ptr, w, out_ptr, tokens, FORMAT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
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
        values = weights(w, rows, live, group, 0, FORMAT)  # [BN, GROUP]
        at = grad_ptr + token.to(tl.int64)[:, None] * w.rows + rows[None, :]
        grad = tl.load(at, alive[:, None] & live[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(grad, values, acc, input_precision=tf32x3())
    out = out_ptr + token.to(tl.int64)[:, None] * (w.groups * GROUP) + (tl.arange(0, GROUP) + group * GROUP)[None, :]
    tl.store(out, cast(acc, out_ptr.dtype.element_ty), alive[:, None])


def quantised_linear_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, columns: int, format: int
) -> torch.Tensor:
    """y [M, N] of x [M, K] and weight uint8 [N, row bytes]; all contiguous.

    Raises:
        ValueError: for shapes or strides outside the above.
    """
    w = codes_of("weight", weight, columns, format, bias)
    check_packed("x", x, (x.shape[0], columns), x)
    check_packed("bias", bias, (w.rows,), x)
    tokens = x.shape[0]
    y = torch.empty((tokens, w.rows), dtype=x.dtype, device=x.device)
    if y.numel():
        bm, bn = 16 if tokens <= 16 else 64, 32 if x.dtype == torch.float32 else 64
        grid = (triton.cdiv(tokens, bm) * triton.cdiv(w.rows, bn),)
        _quantised_linear_fwd_kernel[grid](x, w, y, tokens, FORMAT=format, BM=bm, BN=bn, num_warps=4)
    return y


def quantised_linear_bwd(grad_y: torch.Tensor, weight: torch.Tensor, columns: int, format: int) -> torch.Tensor:
    """grad_x [M, K] of grad_y [M, N]; all contiguous.

    Raises:
        ValueError: for shapes or strides outside the above.
    """
    w = codes_of("weight", weight, columns, format)
    check_packed("grad_y", grad_y, (grad_y.shape[0], w.rows), grad_y)
    tokens = grad_y.shape[0]
    grad_x = torch.empty((tokens, columns), dtype=grad_y.dtype, device=grad_y.device)
    if grad_x.numel():
        bm, bn = 16 if tokens <= 16 else 64, 64
        grid = (triton.cdiv(tokens, bm) * w.groups,)
        _quantised_linear_bwd_kernel[grid](grad_y, w, grad_x, tokens, FORMAT=format, BM=bm, BN=bn, num_warps=4)
    return grad_x


def _aot_args(dtype: torch.dtype, tokens: int, format: int, backward: bool) -> tuple[Any, ...]:
    rows, columns = 11008, 4096
    weight = torch.empty((rows, row_bytes(columns, format)), dtype=torch.uint8, device="meta")
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
