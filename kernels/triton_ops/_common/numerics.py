"""Numeric helpers for kernels, including what Triton's interpreter needs to compute what a GPU would."""

from __future__ import annotations

import triton
import triton.language as tl

# Fixed when Triton is imported, as @triton.jit itself is. The interpreter keeps bf16 as raw 16-bit integers: there,
# loads are widened before arithmetic or tl.dot.
INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def is_finite(x):
    """False for NaN and for both infinities."""
    return tl.abs(x) < float("inf")


@triton.jit
def tanh(x):
    """To three ulp, also near 0, of fp32 `x`; NaN stays NaN, and nothing overflows into one."""
    z = x * x
    p = z * -0.0060967142 + 0.020997179  # (tanh(x) - x) / x^3 by powers of x^2, as on the CPU
    p = p * z - 0.05385091
    p = p * z + 0.1333277
    p = p * z - 0.33333329
    large = 1.0 - 2.0 / (1.0 + tl.exp2(tl.abs(x) * (2.0 * LOG2E)))
    return tl.where(tl.abs(x) < 0.625, x + x * (p * z), tl.where(x < 0.0, -large, large))


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 `x` rounded to nearest even in `dtype`."""
    if INTERPRET and dtype == tl.bfloat16:
        # The interpreter's own conversion truncates.
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def widen_if_interpreted(x):
    """`x` for use as an operand of tl.dot: its own dtype on a GPU, fp32 in the interpreter."""
    return x.to(tl.float32) if INTERPRET else x


@triton.jit
def split_bf16(x):
    """fp32 `x` as a pair of bf16, x = high + low up to 2**-18 relative; exact for the 11 significant bits of fp16."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)
