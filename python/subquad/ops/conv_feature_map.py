"""A causal convolution and the feature map of its result in one pass over memory: the queries and keys of LAWCAT."""

from __future__ import annotations

from typing import Any

import torch

from .. import _checks, reference
from .._packing import Packed
from ..contract.causal_conv1d import MAX_TAPS
from ..contract.feature_map import MAX_DIM
from . import _call
from .causal_conv1d import activation_flag, initial_state_of
from .feature_map import map_options


def conv_feature_map(
    x: torch.Tensor,
    conv_weight: torch.Tensor,
    fm_weight: torch.Tensor,
    conv_bias: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    cu_seqlens: torch.Tensor | Packed | None = None,
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
    x, conv_weight, fm_weight, conv_bias, initial_state = _call.autocast(
        x, conv_weight, fm_weight, conv_bias, initial_state
    )
    _checks.tensor("x", x)
    if x.dim() != 4 or not 1 <= x.shape[3] <= MAX_DIM:
        raise ValueError(f"x: expected shape [B, T, Hx, d] with d in 1..{MAX_DIM}, got {list(x.shape)}")
    silu = activation_flag(activation)
    _checks.flag("output_final_state", output_final_state)
    code, eps = map_options(kind, fullspace, eps)
    conv_weight, groups = _weights(x, conv_weight, fm_weight, conv_bias)
    flat = x.flatten(2)
    packed = None if cu_seqlens is None else Packed.of(cu_seqlens, flat)
    state = initial_state_of(initial_state, packed, conv_weight.shape[1], flat)
    bounds = (None, None) if packed is None else (packed.int32, packed.sequence)

    def define(flat: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.conv_feature_map.conv_feature_map(
            flat.unflatten(2, x.shape[2:]), *arguments[:5], silu=silu, kind=kind, fullspace=fullspace, eps=eps
        )

    arguments = (
        flat, conv_weight, fm_weight, conv_bias, state, *bounds, groups, silu, code, fullspace, eps, output_final_state,
    )  # fmt: skip
    phi, final = _call.run("conv_feature_map_fwd", backend, arguments, define)
    return phi, final if output_final_state else None


def _weights(
    x: torch.Tensor, conv_weight: torch.Tensor, fm_weight: torch.Tensor, conv_bias: torch.Tensor | None
) -> tuple[torch.Tensor, int]:
    """(conv_weight [H d, W], H / Hx) after checking them against x and the other weights."""
    heads, width = x.shape[2:]
    _checks.like("conv_weight", conv_weight, None, x, "x")
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
        _checks.like("conv_bias", conv_bias, (channels,), x, "x")
    _checks.like("fm_weight", fm_weight, None, x, "x")
    made = channels // width
    fits = fm_weight.dim() == 3 and fm_weight.shape[1] == width and 1 <= fm_weight.shape[2] <= MAX_DIM
    sharing = made // fm_weight.shape[0] if fits and fm_weight.shape[0] else 1
    if not fits or sharing < 1 or made != sharing * fm_weight.shape[0]:
        expected = f"[M, {width}, f] with f in 1..{MAX_DIM} and M a divisor of the {made} heads of conv_weight"
        raise ValueError(f"fm_weight: expected shape {expected}, got {list(fm_weight.shape)}")
    return conv_weight, groups
