"""Causal convolution and feature map in one pass, forward; LAWCAT, arXiv 2509.18467.

A program takes a tile of tokens of one head. It convolves a block of channels at a time in registers and multiplies it with
the head's matrix at once, so that what the convolution makes is written nowhere. The product is fp32 in three tf32 terms, for
its left operand is not rounded.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ._common.activations import activate
from ._common.aot import AotCase
from ._common.convolution import convolve, spans
from ._common.features import ELU1, HEDGEHOG2, store_features
from .causal_conv1d import check_channels, check_sequences, final_state
from .feature_map import MAX_DIM

ROWS = 64


@triton.jit(do_not_specialize=["time", "tiles", "sequences"])
def _conv_feature_map_fwd_kernel(
    x_ptr, x_stride_b, x_stride_t, conv_ptr, bias_ptr, state_ptr, cu_ptr, sequence_ptr, w_ptr, out_ptr,
    time, tiles, sequences, inputs, heads, groups, sharing, d, f, eps,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_CU: tl.constexpr,
    KIND: tl.constexpr, FULLSPACE: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    i = tl.program_id(0) // heads
    b = (i // tiles).to(tl.int64)
    rows = i % tiles * BM + tl.arange(0, BM)
    live = rows < time
    n, before, _ = spans(rows, time, cu_ptr, sequence_ptr, sequences, b, HAS_CU)
    cols = tl.arange(0, F)
    x_ptr += b * x_stride_b
    w_ptr += (head // sharing).to(tl.int64) * d * f
    y = tl.zeros([BM, F], tl.float32)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        mask = live[:, None] & (k < d)[None, :]
        z = convolve(
            x_ptr, x_stride_t, conv_ptr, bias_ptr, state_ptr, rows, before, n, head // groups * d + k, head * d + k, mask,
            inputs, (head + 1) * d, TAPS, HAS_BIAS, HAS_STATE,
        )  # fmt: skip
        if SILU:
            z = activate(z, 0)
        w = tl.load(w_ptr + k[:, None] * f + cols[None, :], (k < d)[:, None] & (cols < f)[None, :], other=0.0)
        y = tl.dot(z, w.to(tl.float32), y, input_precision="tf32x3")
    store_features(y, out_ptr, (b * time + rows) * heads + head, live, f, eps, KIND, FULLSPACE, F)


def conv_feature_map_fwd(
    x: torch.Tensor,
    conv_weight: torch.Tensor,
    fm_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    sequence: torch.Tensor | None,
    groups: int,
    silu: bool,
    kind: int,
    fullspace: bool,
    eps: float,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """phi and the final state (empty unless asked for).

    Args:
        x: `[B, T, Hx d]`, fp32, bf16 or fp16, last dimension contiguous.
        conv_weight, conv_bias: `[H d, W]` with W in 1..8, `[H d]`, contiguous, in x's dtype; H is `groups` times Hx.
        fm_weight: `[M, d, f]`, contiguous, in x's dtype, d and f in 1..256; M divides H.
        initial_state: `[N, Hx d, W - 1]`, contiguous, in x's dtype.
        cu_seqlens, sequence: int32 `[N + 1]` and the sequence of every token, int32 `[T]`; B is 1.
        groups: heads of phi that read one head of x.
        silu: whether the convolution has an activation.
        kind, fullspace, eps: as `feature_map_fwd`.
        output_final_state: whether to compute the second result.

    Returns:
        (phi `[B, T, H, 2f]`, or `[B, T, H, f]` without `fullspace`; final state `[N, Hx d, W - 1]` or `[0]`).

    Raises:
        ValueError: for shapes, dtypes or strides outside the above.
    """
    if fm_weight.dim() != 3 or not all(1 <= n <= MAX_DIM for n in fm_weight.shape[1:]):
        raise ValueError(f"fm_weight: expected shape [M, d, f], d and f in 1..{MAX_DIM}, got {list(fm_weight.shape)}")
    maps, d, f = fm_weight.shape
    taps = check_channels(x, conv_weight, conv_bias, groups, d, "conv_weight", "conv_bias")
    heads = conv_weight.shape[0] // d
    if heads % max(1, maps) or (maps > 0) != (heads > 0):
        raise ValueError(f"fm_weight: expected M to divide the {heads} heads of conv_weight, got {maps}")
    if fm_weight.dtype is not x.dtype or not fm_weight.is_contiguous():
        got = f"{fm_weight.dtype} with strides {fm_weight.stride()}"
        raise ValueError(f"fm_weight: expected a contiguous tensor of {x.dtype}, got {got}")
    if not 0 <= kind < 5:
        raise ValueError(f"kind: expected a code in 0..4, got {kind}")
    if kind == HEDGEHOG2.value and not fullspace:
        raise ValueError("fullspace: expected True with this kind, got False")
    sequences = check_sequences(x, initial_state, cu_seqlens, sequence, taps)
    batch, time, inputs = x.shape
    out = x.new_empty((batch, time, heads, 2 * f if fullspace else f))
    if out.numel():
        tiles = triton.cdiv(time, ROWS)
        width, cols = (max(16, triton.next_power_of_2(n)) for n in (d, f))
        _conv_feature_map_fwd_kernel[(batch * tiles * heads,)](
            x, x.stride(0), x.stride(1), conv_weight, conv_bias, initial_state, cu_seqlens, sequence, fm_weight, out,
            time, tiles, sequences, inputs, heads, groups, heads // maps, d, f,
            float("-inf") if kind == ELU1.value else eps,
            TAPS=taps, SILU=silu, HAS_BIAS=conv_bias is not None, HAS_STATE=initial_state is not None and taps > 1,
            HAS_CU=cu_seqlens is not None, KIND=kind, FULLSPACE=fullspace, D=width, F=cols, BM=ROWS, BK=min(width, 32),
            num_warps=8 if cols >= 128 else 4, enable_fp_fusion=True,
        )  # fmt: skip
    return out, final_state(x, initial_state, cu_seqlens, taps, sequences) if output_final_state else x.new_empty((0,))


def _aot_args(dtype: torch.dtype, d: int, f: int, kind: int, full: bool) -> tuple[Any, ...]:
    """Queries of a 7B model, 4096 tokens; `full`: every option, with four heads of results per head of inputs."""
    time, heads, taps, groups = 4096, 32, 4, 4 if full else 1
    new = partial(torch.empty, dtype=dtype, device="meta")
    inputs = heads // groups * d
    integers = partial(torch.empty, dtype=torch.int32, device="meta")
    cu, sequence = (integers((4,)), integers((time,))) if full else (None, None)
    bias, state = (new((heads * d,)), new((3, inputs, taps - 1))) if full else (None, None)
    weights = new((heads * d, taps)), new((heads // groups, d, f))
    return new((1, time, inputs)), *weights, bias, state, cu, sequence, groups, full, kind, True, 1e-12, full


AOT = [
    AotCase(f"{name} d{d} f{f} {label}", conv_feature_map_fwd, partial(_aot_args, dtype, d, f, kind, full))
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for d, f, label, kind, full in (
        (64, 32, "softmax", 0, False),
        (128, 64, "softmax", 0, False),
        (128, 64, "softmax all options", 0, True),
        (128, 128, "hedgehog2 all options", 4, True),
    )
]

__all__ = ["AOT", "conv_feature_map_fwd"]
