"""Matrix products of narrow types with a float32 result, for the dense (prefill and training) paths."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_BLOCK_ELEMENTS = 1 << 22  # float32 elements upcast at a time: 16 MB stays in a shared cache


def linear_fp32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [N, K] @ weight [M, K]^T + bias, accumulated and returned in float32; any strides.

    float16 x may hold float32 values beyond 65504 (the products of a gated unit), so it is scaled per row by a power of two.
    """
    if weight.dtype is torch.float32:
        return F.linear(x.float(), weight, bias)
    wide_bias = None if bias is None else bias.float()
    if weight.device.type == "cuda":
        y = _cuda_product(x, weight)
        return y if wide_bias is None else y + wide_bias
    rows = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    wide = x.float()
    y = torch.cat([F.linear(wide, block.float()) for block in weight.split(rows)], dim=1)
    return y if wide_bias is None else y + wide_bias


def _cuda_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if x.dtype is weight.dtype:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    if weight.dtype is torch.float16:
        exponent = torch.frexp(x.abs().amax(1, keepdim=True)).exponent.clamp_min(15) - 15
        narrow = torch.ldexp(x, -exponent).to(torch.float16)
        return torch.ldexp(torch.mm(narrow, weight.t(), out_dtype=torch.float32), exponent)
    return torch.mm(x.to(weight.dtype), weight.t(), out_dtype=torch.float32)
