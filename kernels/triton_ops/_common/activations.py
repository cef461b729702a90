"""Activations of gated MLPs, their derivatives, and the threshold test of CATS; fp32 in, fp32 out.

Codes, as in the op schemas: 0 silu, 1 gelu with tanh, 2 gelu with erf, 3 relu.
"""

from __future__ import annotations

import triton
import triton.language as tl

SILU = tl.constexpr(0)
GELU_TANH = tl.constexpr(1)
GELU = tl.constexpr(2)

# Tensors stand left of these in products: the interpreter would keep constant * tensor as a constant.
SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
GELU_CUBIC = tl.constexpr(0.044715)


def check_activation(code: int) -> None:
    """Raise ValueError for a code that no branch below stands for."""
    if not 0 <= code <= 3:
        raise ValueError(f"activation: expected 0 to 3, got {code}")


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x). silu(-inf) is NaN as in torch; NaN stays NaN."""
    if ACTIVATION == SILU:
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == GELU_TANH:
        # (1 + tanh(y)) / 2 = sigmoid(2y), without the cancellation for y << 0.
        return x / (1.0 + tl.exp(-(x + x * x * x * GELU_CUBIC) * SQRT_8_OVER_PI))
    elif ACTIVATION == GELU:
        return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    else:
        return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def activate_grad(x, ACTIVATION: tl.constexpr):
    """d act(x) / dx. relu'(NaN) is 1, as in torch: the NaN itself arrives through the forward value."""
    if ACTIVATION == SILU:
        sig = 1.0 / (1.0 + tl.exp(-x))
        return sig + sig * (1.0 - sig) * x
    elif ACTIVATION == GELU_TANH:
        sig = 1.0 / (1.0 + tl.exp(-(x + x * x * x * GELU_CUBIC) * SQRT_8_OVER_PI))
        # sig (1 - sig) is 0 long before the bound on x * x matters: it only keeps 0 * inf away.
        slope = (1.0 + 3.0 * (tl.minimum(x * x, 1e6) * GELU_CUBIC)) * SQRT_8_OVER_PI
        return sig + sig * (1.0 - sig) * x * slope
    elif ACTIVATION == GELU:
        return 0.5 * (1.0 + tl.erf(x * SQRT_HALF)) + x * INV_SQRT_2PI * tl.exp(-0.5 * x * x)
    else:
        return tl.where(x <= 0.0, 0.0, 1.0)


@triton.jit
def is_active(s, threshold, INCLUSIVE: tl.constexpr):
    """The CATS mask: dead iff |s| <= threshold (|s| < threshold when inclusive), negated so that NaN is active."""
    if INCLUSIVE:
        return (tl.abs(s) < threshold) == 0
    return (tl.abs(s) <= threshold) == 0
