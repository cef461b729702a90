"""Thresholded activation and thresholded GLU of CATS, forward and backward: one fused element-wise pass each.

a = act(z) where |act(z)| > threshold, else 0;  h = a * u, where dead entries are exactly 0 whatever u holds. For
prefill and training, beside dense matrix products. All arithmetic is fp32 with one rounding at the end.

Backward: dz = g * act'(z) (times u for the GLU) on active entries, or on all of them with `straight_through`;
du = g * act(z) on active entries. Source: CATS, arXiv 2404.08763.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ._common.activations import activate, activate_grad, check_activation, is_active
from ._common.aot import AotCase
from ._common.checks import check_threshold, require
from ._common.numerics import cast

# 16 elements per thread: two 128-bit loads of 16-bit data.
_LAUNCH = {"ROWS": 4, "COLS": 512, "num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _tile(threshold_ptr, threshold_stride, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(offsets, mask, threshold) of this program's [ROWS, COLS] tile of a contiguous [rows, cols] matrix."""
    blocks = tl.cdiv(cols, COLS)
    r = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    threshold = tl.load(threshold_ptr + c.to(tl.int64) * threshold_stride, c < cols, other=0.0)
    return r.to(tl.int64)[:, None] * cols + c[None, :], (r < rows)[:, None] & (c < cols)[None, :], threshold[None, :]


@triton.jit
def _load(ptr, offsets, mask):
    return tl.load(ptr + offsets, mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, offsets, value, mask):
    tl.store(ptr + offsets, cast(value, ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def _cats_activation_fwd_kernel(
    z_ptr, threshold_ptr, threshold_stride, a_ptr, rows, cols,
    ACTIVATION: tl.constexpr, INCLUSIVE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    offsets, mask, threshold = _tile(threshold_ptr, threshold_stride, rows, cols, ROWS, COLS)
    s = activate(_load(z_ptr, offsets, mask), ACTIVATION)
    _store(a_ptr, offsets, tl.where(is_active(s, threshold, INCLUSIVE), s, 0.0), mask)


@triton.jit(do_not_specialize=["rows"])
def _cats_activation_bwd_kernel(
    grad_ptr, z_ptr, threshold_ptr, threshold_stride, dz_ptr, rows, cols,
    ACTIVATION: tl.constexpr, INCLUSIVE: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    offsets, mask, threshold = _tile(threshold_ptr, threshold_stride, rows, cols, ROWS, COLS)
    z = _load(z_ptr, offsets, mask)
    dz = _load(grad_ptr, offsets, mask) * activate_grad(z, ACTIVATION)
    if not STRAIGHT_THROUGH:
        dz = tl.where(is_active(activate(z, ACTIVATION), threshold, INCLUSIVE), dz, 0.0)
    _store(dz_ptr, offsets, dz, mask)


@triton.jit(do_not_specialize=["rows"])
def _cats_glu_fwd_kernel(
    z_ptr, u_ptr, threshold_ptr, threshold_stride, h_ptr, rows, cols,
    ACTIVATION: tl.constexpr, INCLUSIVE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    offsets, mask, threshold = _tile(threshold_ptr, threshold_stride, rows, cols, ROWS, COLS)
    s = activate(_load(z_ptr, offsets, mask), ACTIVATION)
    h = s * _load(u_ptr, offsets, mask)
    _store(h_ptr, offsets, tl.where(is_active(s, threshold, INCLUSIVE), h, 0.0), mask)


@triton.jit(do_not_specialize=["rows"])
def _cats_glu_bwd_kernel(
    grad_ptr, z_ptr, u_ptr, threshold_ptr, threshold_stride, dz_ptr, du_ptr, rows, cols,
    ACTIVATION: tl.constexpr, INCLUSIVE: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    offsets, mask, threshold = _tile(threshold_ptr, threshold_stride, rows, cols, ROWS, COLS)
    z = _load(z_ptr, offsets, mask)
    grad = _load(grad_ptr, offsets, mask)
    s = activate(z, ACTIVATION)
    active = is_active(s, threshold, INCLUSIVE)
    dz = grad * _load(u_ptr, offsets, mask) * activate_grad(z, ACTIVATION)
    if not STRAIGHT_THROUGH:
        dz = tl.where(active, dz, 0.0)
    _store(dz_ptr, offsets, dz, mask)
    _store(du_ptr, offsets, tl.where(active, grad * s, 0.0), mask)


def _shape(
    z: torch.Tensor, threshold: torch.Tensor, activation: int, **same: torch.Tensor
) -> tuple[tuple[int], int, int, int]:
    """(grid, rows, columns, stride of the threshold), after the checks that keep the kernels inside their tensors."""
    check_activation(activation)
    for name, tensor in {"z": z, **same}.items():
        fits = tensor.shape == z.shape and tensor.is_contiguous()
        require(fits, name, f"a contiguous tensor of shape {list(z.shape)}", tensor)
    cols = z.shape[-1] if z.dim() else 1
    check_threshold(threshold, cols)
    rows = z.numel() // cols if cols else 0
    grid = (triton.cdiv(rows, _LAUNCH["ROWS"]) * triton.cdiv(cols, _LAUNCH["COLS"]),)
    return grid, rows, cols, threshold.stride(0) if threshold.numel() > 1 else 0


def cats_activation_fwd(z: torch.Tensor, threshold: torch.Tensor, activation: int, inclusive: bool) -> torch.Tensor:
    """a = act(z) where |act(z)| > threshold, else 0.

    Args:
        z: `[N, I]` contiguous, fp32, bf16 or fp16.
        threshold: fp32 `[1]` or `[I]`, any stride.
        activation: 0 silu, 1 gelu_tanh, 2 gelu, 3 relu.
        inclusive: an entry whose |act(z)| equals the threshold is active.

    Returns:
        a, like z.

    Raises:
        ValueError: for shapes or strides outside the above.
    """
    grid, rows, cols, stride = _shape(z, threshold, activation)
    a = torch.empty_like(z)
    _cats_activation_fwd_kernel[grid](
        z, threshold, stride, a, rows, cols, ACTIVATION=activation, INCLUSIVE=inclusive, **_LAUNCH
    )
    return a


def cats_activation_bwd(
    grad_a: torch.Tensor,
    z: torch.Tensor,
    threshold: torch.Tensor,
    activation: int,
    inclusive: bool,
    straight_through: bool,
) -> torch.Tensor:
    """dz = grad_a * act'(z) on active entries, or everywhere with `straight_through`; else 0.

    Args: as `cats_activation_fwd`; grad_a has the shape of z and any of the dtypes.

    Returns:
        dz, like z.

    Raises:
        ValueError: as `cats_activation_fwd`.
    """
    grid, rows, cols, stride = _shape(z, threshold, activation, grad_a=grad_a)
    dz = torch.empty_like(z)
    _cats_activation_bwd_kernel[grid](
        grad_a, z, threshold, stride, dz, rows, cols,
        ACTIVATION=activation, INCLUSIVE=inclusive, STRAIGHT_THROUGH=straight_through, **_LAUNCH,
    )  # fmt: skip
    return dz


def cats_glu_fwd(
    z: torch.Tensor, u: torch.Tensor, threshold: torch.Tensor, activation: int, inclusive: bool
) -> torch.Tensor:
    """h = act(z) * u where |act(z)| > threshold, else exactly 0.

    Args: as `cats_activation_fwd`; u has the shape of z, and may have a lower precision.

    Returns:
        h, like u.

    Raises:
        ValueError: as `cats_activation_fwd`.
    """
    grid, rows, cols, stride = _shape(z, threshold, activation, u=u)
    h = torch.empty_like(u)
    _cats_glu_fwd_kernel[grid](
        z, u, threshold, stride, h, rows, cols, ACTIVATION=activation, INCLUSIVE=inclusive, **_LAUNCH
    )
    return h


def cats_glu_bwd(
    grad_h: torch.Tensor,
    z: torch.Tensor,
    u: torch.Tensor,
    threshold: torch.Tensor,
    activation: int,
    inclusive: bool,
    straight_through: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dz = grad_h * u * act'(z) and du = grad_h * act(z) on active entries, else 0; `straight_through` unmasks dz only.

    Args: as `cats_glu_fwd`; grad_h has the shape of z and any of the dtypes.

    Returns:
        (dz like z, du like u).

    Raises:
        ValueError: as `cats_activation_fwd`.
    """
    grid, rows, cols, stride = _shape(z, threshold, activation, grad_h=grad_h, u=u)
    dz, du = torch.empty_like(z), torch.empty_like(u)
    _cats_glu_bwd_kernel[grid](
        grad_h, z, u, threshold, stride, dz, du, rows, cols,
        ACTIVATION=activation, INCLUSIVE=inclusive, STRAIGHT_THROUGH=straight_through, **_LAUNCH,
    )  # fmt: skip
    return dz, du


def _aot_args(tensors: int, dtype: torch.dtype, options: tuple[Any, ...]) -> tuple[Any, ...]:
    """A prefill of 512 tokens in a Llama-2-7B layer."""
    matrices = [torch.empty((512, 11008), dtype=dtype, device="meta") for _ in range(tensors)]
    return (*matrices, torch.empty(1, dtype=torch.float32, device="meta"), *options)


AOT = [
    AotCase(f"{dtype_name} {name}", launcher, partial(_aot_args, tensors, dtype, (code, False, *more)))
    for dtype_name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for name, code in (("silu", 0), ("gelu", 2))
    for launcher, tensors, more in (
        (cats_activation_fwd, 1, ()),
        (cats_activation_bwd, 2, (False,)),
        (cats_glu_fwd, 2, ()),
        (cats_glu_bwd, 3, (False,)),
    )
]

__all__ = ["AOT", "cats_activation_bwd", "cats_activation_fwd", "cats_glu_bwd", "cats_glu_fwd"]
