"""Causal convolution and feature map in one pass, forward and backward; LAWCAT, arXiv 2509.18467.

A program takes a tile of tokens of one head. It convolves a block of channels at a time in registers and multiplies it with
the head's matrix at once, so that what the convolution makes is written nowhere. Products are fp32 in three tf32 terms, for
what they multiply is not rounded. Backward computes both parts again; the gradient between them is written once, in fp32, for the
backward of the convolution.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._common.activations import activate
from ._common.aot import AotCase
from ._common.checks import check_packed, require
from ._common.convolution import Conv, Packed, conv_of, convolve, place
from ._common.device import tf32x3
from ._common.features import (
    MAX_DIM,
    check_map,
    chunk_of,
    depth_of,
    gradient,
    least,
    map_constants,
    reduce_partials,
    store_dx,
    store_features,
)
from ._common.numerics import INTERPRET
from .causal_conv1d import check_channels, check_sequences, conv_backward, final_state

_VARIES = ["rows", "time", "sequences"]


class Projection(NamedTuple):
    """The heads' matrices [heads / sharing, d, f]; d is the convolution's head_dim."""

    weight: Any
    heads: Any
    sharing: Any
    f: Any
    eps: Any  # what the map is clamped to


@triton.jit
def _convolved(conv, b, tokens, live, head, k, TAPS: tl.constexpr, SILU: tl.constexpr):
    """Channels k of the head [rows, k] in fp32, 0 where there is none."""
    d = conv.head_dim
    mask = live[:, None] & (k < d)[None, :]
    x_ptr = conv.x + (b * conv.stride_b)[:, None]
    z = convolve(x_ptr, conv, tokens, head // conv.groups * d + k, head * d + k, (head + 1) * d, mask, TAPS)
    if SILU:
        z = activate(z, 0)
    return tl.where(mask, z, 0.0)


@triton.jit
def _project(
    conv, y, b, tokens, live, head, TAPS: tl.constexpr, SILU: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """What the map is of, [rows, F] in fp32."""
    cols = tl.arange(0, F)
    acc = tl.zeros([live.shape[0], F], tl.float32)
    w_ptr = y.weight + (head // y.sharing).to(tl.int64) * conv.head_dim * y.f
    for start in range(0, D, BK):
        k = start + tl.arange(0, BK)
        z = _convolved(conv, b, tokens, live, head, k, TAPS, SILU)  # [rows, BK]
        w_mask = (k < conv.head_dim)[:, None] & (cols < y.f)[None, :]
        w = tl.load(w_ptr + k[:, None] * y.f + cols[None, :], w_mask, other=0.0)  # [BK, F]
        acc = tl.dot(z, w.to(tl.float32), acc, input_precision=tf32x3())
    return acc


@triton.jit
def _tokens(row, time, packed, sequences):
    """Batch row of each row of the flattened batch, and its place in its sequence."""
    b = row // time
    return b.to(tl.int64), place(row - b * time, time, packed, sequences, b.to(tl.int64))


@triton.jit(do_not_specialize=_VARIES)
def _conv_feature_map_fwd_kernel(
    conv, packed, y, out_ptr, rows, time, sequences, TAPS: tl.constexpr, SILU: tl.constexpr,
    MAP: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % y.heads
    row = tl.program_id(0) // y.heads * BM + tl.arange(0, BM)
    live = row < rows
    b, tokens = _tokens(row, time, packed, sequences)
    projected = _project(conv, y, b, tokens, live, head, TAPS, SILU, D, F, BK)  # [BM, F]
    store_features(projected, out_ptr, row.to(tl.int64) * y.heads + head, live, y.f, y.eps, MAP, F)


@triton.jit(do_not_specialize=_VARIES)
def _conv_feature_map_dconv_kernel(
    conv, packed, y, grad_ptr, dconv_ptr, rows, time, sequences, TAPS: tl.constexpr, SILU: tl.constexpr,
    MAP: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The gradient of what the convolution makes, fp32 [rows, heads, d]."""
    head = tl.program_id(0) % y.heads
    row = tl.program_id(0) // y.heads * BM + tl.arange(0, BM)
    live = row < rows
    b, tokens = _tokens(row, time, packed, sequences)
    projected = _project(conv, y, b, tokens, live, head, TAPS, SILU, D, F, BK)  # [BM, F]
    at = row.to(tl.int64) * y.heads + head
    dy = gradient(projected, grad_ptr, at, live, y.f, y.eps, MAP, F)  # [BM, F]
    w_ptr = y.weight + (head // y.sharing).to(tl.int64) * conv.head_dim * y.f
    store_dx(dy, w_ptr, dconv_ptr, at, live, conv.head_dim, y.f, D, F, BK)


@triton.jit(do_not_specialize=[*_VARIES, "chunk"])
def _conv_feature_map_dw_kernel(
    conv, packed, y, grad_ptr, partial_ptr, rows, time, sequences, chunk, TAPS: tl.constexpr, SILU: tl.constexpr,
    MAP: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Partial sums of the matrix's gradient: [chunk, head, BD of its rows, f]."""
    BLOCKS: tl.constexpr = D // BD
    head = tl.program_id(0) % y.heads
    rest = tl.program_id(0) // y.heads
    part = rest // BLOCKS
    k = (rest - part * BLOCKS) * BD + tl.arange(0, BD)
    cols = tl.arange(0, F)
    acc = tl.zeros([BD, F], tl.float32)
    for start in range(part * chunk, tl.minimum(rows, (part + 1) * chunk), BM):
        row = start + tl.arange(0, BM)
        live = row < rows
        b, tokens = _tokens(row, time, packed, sequences)
        projected = _project(conv, y, b, tokens, live, head, TAPS, SILU, D, F, BK)  # [BM, F]
        dy = gradient(projected, grad_ptr, row.to(tl.int64) * y.heads + head, live, y.f, y.eps, MAP, F)  # [BM, F]
        z = _convolved(conv, b, tokens, live, head, k, TAPS, SILU)  # [BM, BD]
        acc = tl.dot(tl.trans(z), dy, acc, input_precision=tf32x3())
    out = partial_ptr + ((part.to(tl.int64) * y.heads + head) * conv.head_dim + k)[:, None] * y.f + cols[None, :]
    tl.store(out, acc, (k < conv.head_dim)[:, None] & (cols < y.f)[None, :])


class _Call(NamedTuple):
    """What the kernels share."""

    conv: Conv
    packed: Packed
    y: Projection
    constants: dict[str, Any]
    sequences: int


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
) -> _Call:
    """The arguments after the checks that protect memory."""
    fits = fm_weight.dim() == 3 and all(1 <= n <= MAX_DIM for n in fm_weight.shape[1:])
    require(fits, "fm_weight", f"[M, d, f] with d and f in 1..{MAX_DIM}", fm_weight)
    maps, d, f = fm_weight.shape
    taps = check_channels(x, conv_weight, conv_bias, groups, d, "conv_weight", "conv_bias")
    heads = conv_weight.shape[0] // d
    fits = heads % max(1, maps) == 0 and (maps > 0) == (heads > 0)
    require(fits, "fm_weight", f"M to divide the {heads} heads of conv_weight", fm_weight)
    check_packed("fm_weight", fm_weight, (maps, d, f), x)
    check_map(kind, fullspace)
    sequences = check_sequences(x, initial_state, cu_seqlens, sequence, taps)
    constants = {"TAPS": taps, "SILU": silu, **map_constants(kind, fullspace, d, f), "enable_fp_fusion": True}
    conv = conv_of(x, conv_weight, conv_bias, initial_state, groups, d)
    y = Projection(fm_weight, heads, heads // max(1, maps), f, least(kind, eps))
    return _Call(conv, Packed(cu_seqlens, sequence), y, constants, sequences)


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
    c = _call(
        x, conv_weight, fm_weight, conv_bias, initial_state, cu_seqlens, sequence, groups, silu, kind, fullspace, eps
    )
    rows, time, heads, f = x.shape[0] * x.shape[1], x.shape[1], c.y.heads, c.y.f
    out = x.new_empty((*x.shape[:2], heads, 2 * f if fullspace else f))
    if rows * heads:
        block = 32 if INTERPRET.value else 64
        _conv_feature_map_fwd_kernel[(triton.cdiv(rows, block) * heads,)](
            c.conv, c.packed, c.y, out, rows, time, c.sequences, BM=block, **c.constants
        )
    if not output_final_state:
        return out, x.new_empty((0,))
    return out, final_state(x, conv_weight, initial_state, cu_seqlens, c.sequences)


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
    c = _call(
        x, conv_weight, fm_weight, conv_bias, initial_state, cu_seqlens, sequence, groups, silu, kind, fullspace, eps
    )
    rows, time, heads, d, f = x.shape[0] * x.shape[1], x.shape[1], c.y.heads, c.conv.head_dim, c.y.f
    check_packed("grad_phi", grad_phi, (*x.shape[:2], heads, 2 * f if fullspace else f), x)
    check_packed("grad_final", grad_final, (c.sequences, x.shape[2], conv_weight.shape[1] - 1), x)
    dmaps = torch.zeros_like(fm_weight) if rows * heads == 0 else torch.empty_like(fm_weight)
    dconv = x.new_empty((*x.shape[:2], heads * d), dtype=torch.float32)
    if rows * heads:
        block, chunk, depth = 32 if INTERPRET.value else 16, chunk_of(rows), depth_of(c.constants)
        _conv_feature_map_dconv_kernel[(triton.cdiv(rows, block) * heads,)](
            c.conv, c.packed, c.y, grad_phi, dconv, rows, time, c.sequences, BM=block, **c.constants
        )
        chunks = triton.cdiv(rows, chunk)
        partials = dconv.new_empty((chunks, heads, d, f))
        _conv_feature_map_dw_kernel[(c.constants["D"] // depth * chunks * heads,)](
            c.conv, c.packed, c.y, grad_phi, partials, rows, time, c.sequences, chunk, BM=block, BD=depth, **c.constants
        )
        reduce_partials(partials, dmaps)
    dx, dweight, dbias, dstate = conv_backward(
        dconv, grad_final, x, conv_weight, conv_bias, initial_state, cu_seqlens, sequence, groups, d, silu, c.sequences
    )
    return dx, dweight, dmaps, dbias, dstate


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
    ("causal_conv1d_bwd_kernel", "_conv_feature_map_fwd_kernel", "_conv_feature_map_dw_kernel"),
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
