"""span_attention, forward and backward, in Triton.

Arguments that travel together through several functions are one NamedTuple, and a tile's shape stands beside it.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from ._common.aot import AotCase
from ._common.numerics import cast

_LAUNCH = {"BLOCK": 1024, "num_warps": 4}


@triton.jit
def _span_attention_fwd_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n, other=0.0).to(tl.float32)  # [BLOCK]
    tl.store(y_ptr + i, cast(x * x, y_ptr.dtype.element_ty), i < n)


@triton.jit
def _span_attention_bwd_kernel(grad_ptr, x_ptr, dx_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n, other=0.0).to(tl.float32)  # [BLOCK]
    grad = tl.load(grad_ptr + i, i < n, other=0.0).to(tl.float32)
    tl.store(dx_ptr + i, cast(2.0 * x * grad, dx_ptr.dtype.element_ty), i < n)


def span_attention_fwd(x: torch.Tensor) -> torch.Tensor:
    """y like x; x contiguous."""
    y = torch.empty_like(x)
    if x.numel():
        _span_attention_fwd_kernel[(triton.cdiv(x.numel(), _LAUNCH["BLOCK"]),)](x, y, x.numel(), **_LAUNCH)
    return y


def span_attention_bwd(grad_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dx like x; both contiguous."""
    dx = torch.empty_like(x)
    if x.numel():
        _span_attention_bwd_kernel[(triton.cdiv(x.numel(), _LAUNCH["BLOCK"]),)](grad_y, x, dx, x.numel(), **_LAUNCH)
    return dx


def _aot_args(tensors: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty((512, 4096), dtype=dtype, device="meta") for _ in range(tensors))


AOT = [
    AotCase(f"{name} {launcher.__name__}", launcher, partial(_aot_args, tensors, dtype))
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for launcher, tensors in ((span_attention_fwd, 1), (span_attention_bwd, 2))
]

__all__ = ["AOT", "span_attention_bwd", "span_attention_fwd"]
