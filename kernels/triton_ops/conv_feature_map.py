"""Causal convolution and feature map in one pass, forward and backward; LAWCAT, arXiv 2509.18467.

A program takes a tile of tokens of one head. It convolves a block of channels at a time in registers and multiplies it with
the head's matrix at once, so that what the convolution makes is written nowhere. Products are fp32 in three tf32 terms, for
what they multiply is not rounded. Backward computes both parts again; the gradient between them is written once, in fp32, for the
backward of the convolution.
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
from ._common.features import ELU1, HEDGEHOG2, gradient, store_features
from ._common.numerics import INTERPRET
from .causal_conv1d import check_channels, check_packed, check_sequences, conv_backward, final_state
from .feature_map import MAX_DIM, chunk_of, reduce_partials

_VARIES = ["rows", "time", "sequences"]


@triton.jit
def _tokens(row, time, cu_ptr, sequence_ptr, sequences, HAS_CU: tl.constexpr):
    """Of each row of the flattened batch: its batch, its token, its sequence and how many tokens of that came before."""
    b = row // time
    t = row - b * time
    n, before, _ = spans(t, time, cu_ptr, sequence_ptr, sequences, b.to(tl.int64), HAS_CU)
    return b.to(tl.int64), t, n, before


@triton.jit
def _convolved(
    x_ptr, x_stride_b, x_stride_t, conv_ptr, bias_ptr, state_ptr, b, t, n, before, live, head, k, inputs, groups, d,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """Channels k of the head [rows, k] in fp32, 0 where there is none."""
    mask = live[:, None] & (k < d)[None, :]
    z = convolve(
        x_ptr + (b * x_stride_b)[:, None], x_stride_t, conv_ptr, bias_ptr, state_ptr, t, before, n, head // groups * d + k,
        head * d + k, mask, inputs, (head + 1) * d, TAPS, HAS_BIAS, HAS_STATE,
    )  # fmt: skip
    if SILU:
        z = activate(z, 0)
    return tl.where(mask, z, 0.0)


@triton.jit
def _project(
    x_ptr, x_stride_b, x_stride_t, conv_ptr, bias_ptr, state_ptr, w_ptr, b, t, n, before, live, head, inputs, groups, d, f,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """What the map is of, [rows, F] in fp32."""
    cols = tl.arange(0, F)
    y = tl.zeros([live.shape[0], F], tl.float32)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        z = _convolved(
            x_ptr, x_stride_b, x_stride_t, conv_ptr, bias_ptr, state_ptr, b, t, n, before, live, head, k, inputs, groups, d,
            TAPS, SILU, HAS_BIAS, HAS_STATE,
        )  # fmt: skip
        w = tl.load(w_ptr + k[:, None] * f + cols[None, :], (k < d)[:, None] & (cols < f)[None, :], other=0.0)
        y = tl.dot(z, w.to(tl.float32), y, input_precision="tf32x3")
    return y


@triton.jit(do_not_specialize=_VARIES)
def _conv_feature_map_fwd_kernel(
    x_ptr, x_stride_b, x_stride_t, conv_ptr, bias_ptr, state_ptr, cu_ptr, sequence_ptr, w_ptr, out_ptr,
    rows, time, sequences, inputs, heads, groups, sharing, d, f, eps,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_CU: tl.constexpr,
    KIND: tl.constexpr, FULLSPACE: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    row = tl.program_id(0) // heads * BM + tl.arange(0, BM)
    live = row < rows
    b, t, n, before = _tokens(row, time, cu_ptr, sequence_ptr, sequences, HAS_CU)
    w_ptr += (head // sharing).to(tl.int64) * d * f
    y = _project(
        x_ptr, x_stride_b, x_stride_t, conv_ptr, bias_ptr, state_ptr, w_ptr, b, t, n, before, live, head, inputs, groups,
        d, f, TAPS, SILU, HAS_BIAS, HAS_STATE, D, F, BK,
    )  # fmt: skip
    store_features(y, out_ptr, row.to(tl.int64) * heads + head, live, f, eps, KIND, FULLSPACE, F)


@triton.jit(do_not_specialize=_VARIES)
def _conv_feature_map_dy_kernel(
    grad_ptr, dy_ptr, x_ptr, x_stride_b, x_stride_t, conv_ptr, bias_ptr, state_ptr, cu_ptr, sequence_ptr, w_ptr,
    rows, time, sequences, inputs, heads, groups, sharing, d, f, eps,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_CU: tl.constexpr,
    KIND: tl.constexpr, FULLSPACE: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The gradient of what the convolution makes, fp32 [rows, heads, d]."""
    head = tl.program_id(0) % heads
    row = tl.program_id(0) // heads * BM + tl.arange(0, BM)
    live = row < rows
    b, t, n, before = _tokens(row, time, cu_ptr, sequence_ptr, sequences, HAS_CU)
    w_ptr += (head // sharing).to(tl.int64) * d * f
    y = _project(
        x_ptr, x_stride_b, x_stride_t, conv_ptr, bias_ptr, state_ptr, w_ptr, b, t, n, before, live, head, inputs, groups,
        d, f, TAPS, SILU, HAS_BIAS, HAS_STATE, D, F, BK,
    )  # fmt: skip
    HALVES: tl.constexpr = 2 if FULLSPACE else 1
    at = row.to(tl.int64) * heads + head
    du = gradient(y, grad_ptr + at * f * HALVES, live, f, eps, KIND, FULLSPACE, F)
    cols = tl.arange(0, F)
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        w = tl.load(w_ptr + k[:, None] * f + cols[None, :], (k < d)[:, None] & (cols < f)[None, :], other=0.0)
        part = tl.dot(du, tl.trans(w.to(tl.float32)), input_precision="tf32x3")
        tl.store(dy_ptr + at[:, None] * d + k[None, :], part, live[:, None] & (k < d)[None, :])


@triton.jit(do_not_specialize=[*_VARIES, "chunk"])
def _conv_feature_map_dw_kernel(
    grad_ptr, partial_ptr, x_ptr, x_stride_b, x_stride_t, conv_ptr, bias_ptr, state_ptr, cu_ptr, sequence_ptr, w_ptr,
    rows, time, sequences, inputs, heads, groups, sharing, d, f, eps, chunk,
    TAPS: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_CU: tl.constexpr,
    KIND: tl.constexpr, FULLSPACE: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Partial sums of the matrix's gradient: [chunk, head, BD of its rows, f]."""
    BLOCKS: tl.constexpr = D // BD
    HALVES: tl.constexpr = 2 if FULLSPACE else 1
    head = tl.program_id(0) % heads
    rest = tl.program_id(0) // heads
    part = rest // BLOCKS
    k = (rest - part * BLOCKS) * BD + tl.arange(0, BD)
    cols = tl.arange(0, F)
    w_ptr += (head // sharing).to(tl.int64) * d * f
    acc = tl.zeros([BD, F], tl.float32)
    for start in range(part * chunk, tl.minimum(rows, (part + 1) * chunk), BM):
        row = start + tl.arange(0, BM)
        live = row < rows
        b, t, n, before = _tokens(row, time, cu_ptr, sequence_ptr, sequences, HAS_CU)
        y = _project(
            x_ptr, x_stride_b, x_stride_t, conv_ptr, bias_ptr, state_ptr, w_ptr, b, t, n, before, live, head, inputs, groups,
            d, f, TAPS, SILU, HAS_BIAS, HAS_STATE, D, F, BK,
        )  # fmt: skip
        at = row.to(tl.int64) * heads + head
        du = gradient(y, grad_ptr + at * f * HALVES, live, f, eps, KIND, FULLSPACE, F)
        z = _convolved(
            x_ptr, x_stride_b, x_stride_t, conv_ptr, bias_ptr, state_ptr, b, t, n, before, live, head, k, inputs, groups, d,
            TAPS, SILU, HAS_BIAS, HAS_STATE,
        )  # fmt: skip
        acc = tl.dot(tl.trans(z), du, acc, input_precision="tf32x3")
    out = partial_ptr + ((part.to(tl.int64) * heads + head) * d + k)[:, None] * f + cols[None, :]
    tl.store(out, acc, (k < d)[:, None] & (cols < f)[None, :])


def _call(
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
) -> tuple[tuple[tuple[Any, ...], tuple[Any, ...]], dict[str, Any], int]:
    """((tensors and strides, sizes and eps); constants and warps; number of sequences) after the checks that protect memory."""
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
    arguments = (
        x, x.stride(0), x.stride(1), conv_weight, conv_bias, initial_state, cu_seqlens, sequence, fm_weight,
    )  # fmt: skip
    sizes = (batch * time, time, sequences, inputs, heads, groups, heads // max(1, maps), d, f)
    width, cols = (max(16, triton.next_power_of_2(n)) for n in (d, f))
    constants = {
        "TAPS": taps, "SILU": silu, "HAS_BIAS": conv_bias is not None, "HAS_STATE": initial_state is not None and taps > 1,
        "HAS_CU": cu_seqlens is not None, "KIND": kind, "FULLSPACE": fullspace, "D": width, "F": cols,
        "BK": min(width, 32), "num_warps": 8 if cols >= 128 else 4, "enable_fp_fusion": True,
    }  # fmt: skip
    return (arguments, (*sizes, float("-inf") if kind == ELU1.value else eps)), constants, sequences


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
    (arguments, sizes), constants, sequences = _call(
        x, conv_weight, fm_weight, conv_bias, initial_state, cu_seqlens, sequence, groups, silu, kind, fullspace, eps
    )
    rows, heads, f = sizes[0], sizes[4], sizes[8]
    out = x.new_empty((*x.shape[:2], heads, 2 * f if fullspace else f))
    if rows * heads:
        block = 32 if INTERPRET.value else 64
        grid = (triton.cdiv(rows, block) * heads,)
        _conv_feature_map_fwd_kernel[grid](*arguments, out, *sizes, BM=block, **constants)
    if not output_final_state:
        return out, x.new_empty((0,))
    return out, final_state(x, initial_state, cu_seqlens, conv_weight.shape[1], sequences)


def conv_feature_map_bwd(
    grad_phi: torch.Tensor,
    grad_final: torch.Tensor | None,
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
) -> tuple[torch.Tensor, ...]:
    """(dx, dconv_weight, dfm_weight, dbias, dstate); the last two are empty where the forward had no such argument.

    Args: as `conv_feature_map_fwd`; grad_phi of the shape of phi and grad_final `[N, Hx d, W - 1]`, contiguous, in x's dtype.

    Returns:
        Contiguous tensors of the shapes and dtype of x, the weights, conv_bias and initial_state.

    Raises:
        ValueError: as `conv_feature_map_fwd`.
    """
    (arguments, sizes), constants, sequences = _call(
        x, conv_weight, fm_weight, conv_bias, initial_state, cu_seqlens, sequence, groups, silu, kind, fullspace, eps
    )
    rows, heads, d, f = sizes[0], sizes[4], sizes[7], sizes[8]
    check_packed("grad_phi", grad_phi, (*x.shape[:2], heads, 2 * f if fullspace else f), x)
    check_packed("grad_final", grad_final, (sequences, x.shape[2], conv_weight.shape[1] - 1), x)
    dmaps = torch.zeros_like(fm_weight) if rows * heads == 0 else torch.empty_like(fm_weight)
    dy = x.new_empty((*x.shape[:2], heads * d), dtype=torch.float32)
    if rows * heads:
        block, chunk = 32 if INTERPRET.value else 16, chunk_of(rows)
        _conv_feature_map_dy_kernel[(triton.cdiv(rows, block) * heads,)](
            grad_phi, dy, *arguments, *sizes, BM=block, **constants
        )
        chunks, depth = triton.cdiv(rows, chunk), min(constants["D"], max(16, 4096 // constants["F"]))
        partials = dy.new_empty((chunks, heads, d, f))
        _conv_feature_map_dw_kernel[(constants["D"] // depth * chunks * heads,)](
            grad_phi, partials, *arguments, *sizes, chunk, BM=block, BD=depth, **constants
        )
        reduce_partials(partials, dmaps)
    dx, dconv, dbias, dstate = conv_backward(
        dy, grad_final, x, conv_weight, conv_bias, initial_state, cu_seqlens, sequence, groups, d, silu, sequences
    )
    return dx, dconv, dmaps, dbias, dstate


def _aot_args(dtype: torch.dtype, d: int, f: int, kind: int, full: bool, backward: bool) -> tuple[Any, ...]:
    """Queries of a 7B model, 4096 tokens; `full`: every option, with four heads of results per head of inputs."""
    time, heads, taps, groups = 4096, 32, 4, 4 if full else 1
    new = partial(torch.empty, dtype=dtype, device="meta")
    integers = partial(torch.empty, dtype=torch.int32, device="meta")
    inputs = heads // groups * d
    cu, sequence = (integers((4,)), integers((time,))) if full else (None, None)
    bias, state = (new((heads * d,)), new((3, inputs, taps - 1))) if full else (None, None)
    weights = new((heads * d, taps)), new((heads // groups, d, f))
    call = (new((1, time, inputs)), *weights, bias, state, cu, sequence, groups, full, kind, True, 1e-12)
    return (new((1, time, heads, 2 * f)), state, *call) if backward else (*call, full)


_SPILLS = dict.fromkeys(
    ("_causal_conv1d_bwd_kernel", "_conv_feature_map_fwd_kernel", "_conv_feature_map_dw_kernel"),
    "all options at once in float32: a few words",
)
# Every tap and bias is read per channel, in whatever width: "options".
AOT = [
    AotCase(
        f"{name} d{d} f{f} {label}",
        launcher,
        partial(_aot_args, dtype, d, f, kind, full, backward),
        _SPILLS if full else {},
    )
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    for d, f, label, kind, full in (
        (64, 32, "softmax options", 0, False),
        (128, 64, "softmax options", 0, False),
        (128, 64, "softmax all options", 0, True),
        (128, 128, "hedgehog2 all options", 4, True),
    )
    for launcher, backward in ((conv_feature_map_fwd, False), (conv_feature_map_bwd, True))
]

__all__ = ["AOT", "conv_feature_map_bwd", "conv_feature_map_fwd"]
