"""The product with weights in few bits."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import _checks
from ..reference import quantised_linear as reference
from ..reference.quantised_linear import FORMATS, GROUP
from . import _call

_NAMES = tuple(FORMATS)
_CHUNK = 2**18  # weights that are quantised at a time


def quantised_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    format: str,
    backend: str | None = None,
) -> torch.Tensor:
    """y = x W^T + b with W in groups of 32 codes, each group with an fp16 scale and, in one format, an fp16 minimum.

    Products are of the dequantised weights, accumulated in float32 and rounded once. The activations are not rounded; up to 16
    tokens beside four bits on AVX2 are, to 24 bits of the largest of a group, unless that shows. Differentiable in x and bias.
    Up to 16 tokens a token's result does not depend on the others in the call.

    Args:
        x: [..., K], float32, bfloat16 or float16 (float64 on the reference backend).
        weight: uint8 [N, K / 32 * group bytes], as `quantise` makes it.
        bias: [N] in x's dtype.
        format: "int8" (34 bytes a group), "int4" (18) or "int4_min" (20): the numbers of GGUF's Q8_0, Q4_0 and Q4_1.
        backend: "native", "triton", "reference", or None to choose.

    Returns:
        y [..., N] in x's dtype.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes or devices that do not fit, an unknown format, a backend that cannot run.

    Example:
        >>> import torch, subquad
        >>> weight = subquad.quantise(torch.randn(8, 64), "int4")
        >>> subquad.quantised_linear(torch.randn(3, 64), weight, format="int4").shape
        torch.Size([3, 8])
    """
    at_once: torch.Tensor | None = _call.at_once("quantised_linear_fwd", backend, _arguments, x, weight, bias, format)
    if at_once is not None:
        return at_once
    x, bias = _call.autocast(x, bias)
    _checks.tensor("x", x)
    code = _checks.choice("format", format, _NAMES)
    columns = check_weight("weight", weight, format)
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"x: expected shape [..., {columns}] to match weight {list(weight.shape)}, got {list(x.shape)}"
        )
    _checks.same_device("weight", weight, x.device, "x")
    rows = weight.shape[0]
    if bias is not None:
        _checks.like("bias", bias, (rows,), x, "x")
    flat = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), columns)

    def define(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *_: object) -> torch.Tensor:
        return reference.quantised_linear(x, weight, bias, format=format)

    y: torch.Tensor = _call.run(
        "quantised_linear_fwd", backend, (flat, weight, bias, columns, code), define, tokens=flat.shape[0]
    )
    return y if flat is x else y.view(*x.shape[:-1], rows)


def _arguments(x: torch.Tensor, weight: Any, bias: Any, format: Any) -> tuple[Any, ...]:
    """Those of the operator, unchecked but for the format's name."""
    return x, weight, bias, x.shape[-1], _checks.choice("format", format, _NAMES)


@_call.gradient_hook("quantised_linear_fwd")
def _bias(found: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The bias is added last: its gradient is the sum of y's."""
    grad_y = given["grad_y"]
    return {**found, "bias": grad_y.float().sum(0).to(grad_y.dtype)}


def quantise(weight: torch.Tensor, format: str) -> torch.Tensor:
    """The bytes of a weight for `quantised_linear`.

    Scales are rounded away from 0 and codes chosen for the rounded scale: |w - w'| is at most half a scale, in "int4" one scale
    for what lies opposite to a group's largest magnitude.

    Args:
        weight: [N, K], K a multiple of 32; finite.
        format: "int8", "int4" or "int4_min".

    Returns:
        uint8 [N, K / 32 * group bytes], on weight's device.

    Raises:
        TypeError: weight is no floating tensor.
        ValueError: a shape that has no groups of 32, weights that are not finite or beyond what an fp16 scale reaches.
    """
    _checks.tensor("weight", weight)
    _checks.choice("format", format, _NAMES)
    if weight.dim() != 2 or weight.shape[1] % GROUP:
        raise ValueError(f"weight: expected shape [N, K] with K a multiple of {GROUP}, got {list(weight.shape)}")
    if weight.is_meta:
        rows, columns = weight.shape
        return weight.new_empty((rows, columns // GROUP * FORMATS[format].group_bytes), dtype=torch.uint8)
    limit = 65504.0 * {"int8": 127, "int4": 8, "int4_min": 1}[format]
    largest = (
        float(weight.detach().abs().max()) if weight.numel() else 0.0
    )  # in its own dtype the limit may be infinite
    if not largest <= limit:
        raise ValueError(f"weight: expected finite numbers of at most {limit:g}, got {largest:g}")
    rows = max(1, _CHUNK // max(1, weight.shape[1]))  # in float64 they fit a cache
    return torch.cat([reference.quantise(part, format) for part in weight.split(rows)])


def dequantise(weight: torch.Tensor, format: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The numbers [N, K] that bytes of `quantise` stand for.

    Args:
        weight: uint8 [N, row bytes].
        format: the one it was made in.
        dtype: float32 and float64 hold them exactly; the others are rounded to.

    Raises:
        TypeError: weight is not uint8, dtype is no floating one.
        ValueError: a row that is no number of groups.
    """
    _checks.choice("format", format, _NAMES)
    check_weight("weight", weight, format)
    if dtype not in _checks.FLOAT_DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
    wide = dtype if dtype == torch.float64 else torch.float32
    return reference.dequantise(weight, format, wide).to(dtype)


def check_weight(name: str, weight: object, format: str) -> int:
    """The number of columns of the bytes of a weight."""
    if not isinstance(weight, torch.Tensor) or weight.dtype != torch.uint8:
        got = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise TypeError(f"{name}: expected a uint8 tensor as `quantise` makes it, got {got}")
    _checks.dense(name, weight)
    step = FORMATS[format].group_bytes
    if weight.dim() != 2 or weight.shape[1] % step:
        raise ValueError(f"{name}: expected shape [N, n * {step}] for format {format!r}, got {list(weight.shape)}")
    return weight.shape[1] // step * GROUP
