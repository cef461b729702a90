"""A causal convolution and the feature map of its result in one pass over memory: the queries and keys of LAWCAT."""

from __future__ import annotations

from typing import Any

import torch

from .. import reference
from .._backends import resolve
from .._schemas import HANDLES
from . import _checks
from ._autograd import once_differentiable
from .causal_conv1d import (
    MAX_TAPS,
    activation_flag,
    cast_all,
    contiguous_or_none,
    initial_state_of,
    require_like,
    sequence_bounds,
)
from .feature_map import MAX_DIM, map_options

STEM = "conv_feature_map"


def conv_feature_map(
    x: torch.Tensor,
    conv_weight: torch.Tensor,
    fm_weight: torch.Tensor,
    conv_bias: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    cu_seqlens: torch.Tensor | None = None,
    kind: str = "softmax",
    fullspace: bool = True,
    eps: float = 1e-12,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""`feature_map(causal_conv1d(x))`, where the convolved x never goes to memory (LAWCAT, arXiv 2509.18467).

    What the convolution gives is not rounded before the map; with float32 the results are those of the two ops up to the order of
    additions. Differentiable in x, both weights, bias and state, through both results; backward computes the convolution
    again, and keeps its gradient in float32. Under autocast everything is converted to its dtype first.

    Args:
        x: queries or keys [B, T, Hx, d], float32, bfloat16, float16 (float64 on the reference backend), d in 1..256. Read in
            place if a token's elements lie side by side, else copied.
        conv_weight: [H d, W] or [H d, 1, W], 1 <= W <= 8, in x's dtype; H is a multiple of Hx, and head h of the result is
            made from head h // (H / Hx) of x: keys are repeated for the queries that share them.
        fm_weight: [M, d, f] in x's dtype, f in 1..256; M divides H, and H / M heads in a row share a matrix.
        conv_bias: [H d] in x's dtype.
        initial_state: the W-1 inputs before each sequence, oldest first, [N, Hx d, W-1], see `causal_conv1d`.
        output_final_state: also return the last W-1 inputs of every sequence.
        activation: of the convolution; None, "silu" or "swish" (the same).
        cu_seqlens: bounds [N + 1] of sequences packed into B = 1, see `causal_conv1d`.
        kind, fullspace, eps: see `feature_map`.
        backend: "native", "triton", "reference", or None to choose.

    Returns:
        (phi [B, T, H, 2f], or [B, T, H, f] without `fullspace`, contiguous; final state [N, Hx d, W-1] or None), in x's dtype.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes, devices, options or sequence bounds that do not fit, a backend that cannot run.

    Example:
        >>> import torch, subquad
        >>> x, taps, maps = torch.randn(1, 10, 2, 8), torch.randn(4 * 8, 4), torch.randn(4, 8, 4)
        >>> subquad.conv_feature_map(x, taps, maps)[0].shape
        torch.Size([1, 10, 4, 8])
    """
    if isinstance(x, torch.Tensor) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, conv_weight, fm_weight, conv_bias, initial_state = cast_all(
            dtype, x, conv_weight, fm_weight, conv_bias, initial_state
        )
    _checks.tensor("x", x)
    if x.dim() != 4 or not 1 <= x.shape[3] <= MAX_DIM:
        raise ValueError(f"x: expected shape [B, T, Hx, d] with d in 1..{MAX_DIM}, got {list(x.shape)}")
    silu = activation_flag(activation)
    _checks.flag("output_final_state", output_final_state)
    code, eps = map_options(kind, fullspace, eps)
    conv_weight, groups = _weights(x, conv_weight, fm_weight, conv_bias)
    flat = x.flatten(2)
    cu, sequence = sequence_bounds(cu_seqlens, flat)
    sequences = x.shape[0] if cu is None else cu.shape[0] - 1
    state = initial_state_of(initial_state, sequences, conv_weight.shape[1], flat)
    name = resolve(STEM, x.device.type, backend)
    if name == "reference" or torch._C._are_functorch_transforms_active():
        with torch.autocast(x.device.type, enabled=False):  # y is not rounded
            phi, final = reference.conv_feature_map.conv_feature_map(
                x, conv_weight, fm_weight, conv_bias, state, cu, silu=silu, kind=kind, fullspace=fullspace, eps=eps
            )
        return phi.contiguous(), final.contiguous() if output_final_state else None
    _checks.not_double("x", x, name)
    flat = flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()
    inputs = (flat, conv_weight.contiguous(), fm_weight.contiguous(), *map(contiguous_or_none, (conv_bias, state)))
    options = (cu, sequence, groups, silu, code, fullspace, eps, output_final_state)
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in inputs):
        phi, final = _ConvFeatureMap.apply(*inputs, *options, name)
    else:
        phi, final = HANDLES[name]["conv_feature_map_fwd"](*inputs, *options)
    return phi, final if output_final_state else None


class _ConvFeatureMap(torch.autograd.Function):
    """Saves the arguments; the convolution and its map are computed again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *call, backend = args
        x, conv_weight, fm_weight, bias, state, cu, sequence, *ctx.options, ctx.final = call
        ctx.save_for_backward(x, conv_weight, fm_weight, bias, state, cu, sequence)
        ctx.backend = backend
        return HANDLES[backend]["conv_feature_map_fwd"](*call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_phi: torch.Tensor, grad_final: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        _, conv_weight, _, bias, state, *_ = saved
        through_state = grad_final.contiguous() if ctx.final and conv_weight.shape[1] > 1 else None
        *grads, dbias, dstate = HANDLES[ctx.backend]["conv_feature_map_bwd"](
            grad_phi.contiguous(), through_state, *saved, *ctx.options
        )
        grads += [None if bias is None else dbias, None if state is None else dstate]
        return *grads, None, None, None, None, None, None, None, None, None


def _weights(
    x: torch.Tensor, conv_weight: torch.Tensor, fm_weight: torch.Tensor, conv_bias: torch.Tensor | None
) -> tuple[torch.Tensor, int]:
    """(conv_weight [H d, W], H / Hx) after checking them against x and the other weights."""
    heads, width = x.shape[2:]
    require_like("conv_weight", conv_weight, None, x)
    if conv_weight.dim() == 3 and conv_weight.shape[1] == 1:
        conv_weight = conv_weight[:, 0]
    if conv_weight.dim() != 2 or not 1 <= conv_weight.shape[1] <= MAX_TAPS:
        expected = f"[H d, W] or [H d, 1, W] with W in 1..{MAX_TAPS}"
        raise ValueError(f"conv_weight: expected shape {expected}, got {list(conv_weight.shape)}")
    channels = conv_weight.shape[0]
    groups = channels // (heads * width) if heads else 1
    if groups < 1 or channels != groups * heads * width:
        expected = f"[H * {width}, W] with H a multiple of the {heads} heads of x"
        raise ValueError(f"conv_weight: expected shape {expected}, got {list(conv_weight.shape)}")
    if conv_bias is not None:
        require_like("conv_bias", conv_bias, (channels,), x)
    require_like("fm_weight", fm_weight, None, x)
    made = channels // width
    fits = fm_weight.dim() == 3 and fm_weight.shape[1] == width and 1 <= fm_weight.shape[2] <= MAX_DIM
    sharing = made // fm_weight.shape[0] if fits and fm_weight.shape[0] else 1
    if not fits or sharing < 1 or made != sharing * fm_weight.shape[0]:
        expected = f"[M, {width}, f] with f in 1..{MAX_DIM} and M a divisor of the {made} heads of conv_weight"
        raise ValueError(f"fm_weight: expected shape {expected}, got {list(fm_weight.shape)}")
    return conv_weight, groups
