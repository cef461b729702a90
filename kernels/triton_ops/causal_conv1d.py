"""causal_conv1d, forward and backward, in Triton."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from ._common.aot import AotCase
from ._common.numerics import cast

_LAUNCH = {"BLOCK": 1024, "num_warps": 4}


@triton.jit
def _causal_conv1d_fwd_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, cast(x * x, y_ptr.dtype.element_ty), i < n)


@triton.jit
def _causal_conv1d_bwd_kernel(grad_ptr, x_ptr, dx_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, i < n, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + i, i < n, other=0.0).to(tl.float32)
    tl.store(dx_ptr + i, cast(2.0 * x * grad, dx_ptr.dtype.element_ty), i < n)


def causal_conv1d_fwd(x: torch.Tensor) -> torch.Tensor:
    """y like x; x contiguous."""
    y = torch.empty_like(x)
    if x.numel():
        _causal_conv1d_fwd_kernel[(triton.cdiv(x.numel(), _LAUNCH["BLOCK"]),)](x, y, x.numel(), **_LAUNCH)
    return y


def causal_conv1d_bwd(grad_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dx like x; both contiguous."""
    dx = torch.empty_like(x)
    if x.numel():
        _causal_conv1d_bwd_kernel[(triton.cdiv(x.numel(), _LAUNCH["BLOCK"]),)](grad_y, x, dx, x.numel(), **_LAUNCH)
    return dx


def _aot_args(tensors: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty((512, 4096), dtype=dtype, device="meta") for _ in range(tensors))


AOT = [
    AotCase(f"{name} {launcher.__name__}", launcher, partial(_aot_args, tensors, dtype))
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for launcher, tensors in ((causal_conv1d_fwd, 1), (causal_conv1d_bwd, 2))
]

__all__ = ["AOT", "causal_conv1d_bwd", "causal_conv1d_fwd"]
