"""Causal depthwise convolution over time: whole sequences with gradients, and one step on a state in place."""

from __future__ import annotations

from typing import Any

import torch

from .. import _checks
from .._packing import Packed
from ..contract.causal_conv1d import MAX_TAPS
from ..reference import causal_conv1d as reference
from . import _call

ACTIVATIONS = (None, "silu", "swish")


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | Packed | None = None,
    channel_groups: int = 1,
    head_dim: int | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    r"""y[t, c] = act(bias[c] + sum_w weight[c, w] x[t - (W-1) + w, c]) + residual, the short convolution of LAWCAT (2509.18467).

    A tap that reaches before its sequence reads `initial_state`, or does not exist. Differentiable in x, weight, bias,
    initial_state and residual, through both results. Sums in float32, rounded once; gradients of parameters are added up in a
    fixed order. Under autocast everything is converted to autocast's dtype first.

    Args:
        x: [B, T, D / G], float32, bfloat16, float16 (float64 on the reference backend); strides of B and T are free.
        weight: [D, W] or [D, 1, W], 1 <= W <= 8, in x's dtype; the last tap belongs to the current token.
        bias: [D], in x's dtype.
        initial_state: the W-1 raw inputs before each sequence, oldest first, [N, D / G, W-1] in x's dtype; N is B, or the number
            of sequences in `cu_seqlens`. A state of width W (flash-linear-attention's) is accepted: its first column is ignored.
        output_final_state: also return the last W-1 raw inputs of every sequence.
        activation: None, "silu" or "swish" (the same).
        residual: [B, T, D] in x's dtype, added after the activation.
        cu_seqlens: int32 or int64 [N + 1], 0 first, T last, never decreasing: B is 1 and holds N sequences in a row, some perhaps
            empty (their final state is the initial one). On a GPU the values are checked under SUBQUAD_DEBUG=1 only. Or a
            `subquad.Packed` of them, checked before.
        channel_groups: G heads of outputs read one head of inputs (what repeating heads for grouped queries would give): output
            channel h * head_dim + e reads input channel (h // G) * head_dim + e.
        head_dim: width of a head; needed when G > 1.
        backend: "native", "triton", "reference", or None to choose.

    Returns:
        (y [B, T, D] in x's dtype, final state [N, D / G, W-1] in x's dtype or None).

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes, devices or sequence bounds that do not fit, unknown activation, backend that cannot run.

    Example:
        >>> import torch, subquad
        >>> y, state = subquad.causal_conv1d(torch.ones(1, 4, 1), torch.tensor([[1.0, 10.0]]), output_final_state=True)
        >>> y.flatten(), state.flatten()
        (tensor([10., 11., 11., 11.]), tensor([1.]))
    """
    x, weight, bias, initial_state, residual = _call.autocast(x, weight, bias, initial_state, residual)
    _checks.tensor("x", x)
    if x.dim() != 3:
        raise ValueError(f"x: expected shape [B, T, D], got {list(x.shape)}")
    silu = activation_flag(activation)
    _checks.flag("output_final_state", output_final_state)
    weight, groups, width = _channels(x, weight, bias, channel_groups, head_dim)
    channels, taps = weight.shape
    packed = None if cu_seqlens is None else Packed.of(cu_seqlens, x)
    state = initial_state_of(initial_state, packed, taps, x)
    if residual is not None:
        _checks.like("residual", residual, (*x.shape[:2], channels), x, "x")
    bounds = (None, None) if packed is None else (packed.int32, packed.sequence)
    arguments = (x, weight, bias, state, residual, *bounds, groups, width, silu, output_final_state)
    y, final = _call.run("causal_conv1d_fwd", backend, arguments, _define)
    return y, final if output_final_state else None


def _define(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, bias, state, residual, cu, _, groups, width, silu, _ = arguments
    return reference.causal_conv1d(x, weight, bias, state, residual, cu, groups, width, silu)


@_call.gradient_hook("causal_conv1d_fwd")
def _residual(found: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The residual is added last: its gradient is that of y."""
    return {**found, "residual": given["grad_y"]}


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    channel_groups: int = 1,
    head_dim: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    r"""The next outputs of `causal_conv1d`, and `conv_state` advanced in place: decoding, without a gradient.

    Args:
        x: the new tokens, [B, D / G] or [B, s, D / G], float32, bfloat16, float16 (float64 on the reference backend).
        conv_state: raw inputs [P, D / G, L] in x's dtype, L >= W-1, any strides; written to. The last L inputs, oldest first, or
            a ring (see `cache_seqlens`). Under autocast the other arguments are converted to its dtype.
        weight, bias: as in `causal_conv1d`.
        residual: of the shape of y, added after the activation.
        activation: None, "silu" or "swish".
        cache_seqlens: int32 or int64 [B], how many tokens came before: conv_state is a ring, and token n lives in slot n mod L.
        conv_state_indices: int32 or int64 [B], which of the P states belongs to each row, each at most once; -1 skips a row: its
            output is 0 and no state changes. Without it P is B. On a GPU values outside -1..P-1 skip as well.
        channel_groups, head_dim: as in `causal_conv1d`.
        backend: as in `causal_conv1d`.

    Returns:
        y [B, D] or [B, s, D] in x's dtype.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes, devices or indices that do not fit, unknown activation, a state that shares memory, a tensor that
            requires a gradient while gradients are enabled, backend that cannot run.

    Example:
        >>> import torch, subquad
        >>> state = torch.tensor([[[1.0]]])
        >>> subquad.causal_conv1d_update(torch.tensor([[2.0]]), state, torch.tensor([[1.0, 10.0]])), state.flatten()
        (tensor([[21.]]), tensor([2.]))
    """
    at_once: torch.Tensor | None = _call.at_once(
        "causal_conv1d_update_", backend, _update_arguments,
        x, conv_state, weight, bias, residual, cache_seqlens, conv_state_indices, channel_groups, head_dim, activation,
    )  # fmt: skip
    if at_once is not None:
        return at_once
    x, weight, bias, residual = _call.autocast(x, weight, bias, residual, to=conv_state)
    _checks.tensor("x", x)
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected shape [B, D] or [B, s, D], got {list(x.shape)}")
    silu = activation_flag(activation)
    weight, groups, width = _channels(x, weight, bias, channel_groups, head_dim)
    batch, taps = x.shape[0], weight.shape[1]
    _checks.like("conv_state", conv_state, None, x, "x")
    lacking = conv_state_indices is None and conv_state.dim() > 0 and conv_state.shape[0] != batch
    if conv_state.dim() != 3 or conv_state.shape[1] != x.shape[-1] or conv_state.shape[2] < taps - 1 or lacking:
        pool = "P" if conv_state_indices is not None else batch
        expected = f"[{pool}, {x.shape[-1]}, L >= {taps - 1}]"
        raise ValueError(f"conv_state: expected shape {expected}, got {list(conv_state.shape)}")
    if residual is not None:
        _checks.like("residual", residual, (*x.shape[:-1], weight.shape[0]), x, "x")
    cache_seqlens, conv_state_indices = _narrow(cache_seqlens, conv_state_indices, x, conv_state)
    tokens = x if x.dim() == 3 else x[:, None]
    if residual is not None and x.dim() == 2:
        residual = residual[:, None]
    arguments = (
        tokens, conv_state, weight, bias, residual, cache_seqlens, conv_state_indices, groups, width, silu,
    )  # fmt: skip
    define = reference.causal_conv1d_update
    hint = "call it under torch.no_grad(), or use causal_conv1d with initial_state"
    y: torch.Tensor = _call.step("causal_conv1d_update_", backend, arguments, define, hint=hint)
    return y if x.dim() == 3 else y.squeeze(1)


def _update_arguments(
    x: torch.Tensor, conv_state: torch.Tensor, weight: Any, bias: Any, residual: Any,
    lengths: Any, indices: Any, groups: Any, head_dim: Any, activation: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Those of the operator, unchecked but for the activation's name and the numbers of lengths and indices."""
    if lengths is not None or indices is not None:
        lengths, indices = _narrow(lengths, indices, x, conv_state)
    width = max(1, x.shape[-1]) if groups == 1 else head_dim
    return x, conv_state, weight, bias, residual, lengths, indices, groups, width, activation_flag(activation)


def _narrow(
    lengths: torch.Tensor | None, indices: torch.Tensor | None, x: torch.Tensor, conv_state: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`cache_seqlens` and `conv_state_indices`, checked, in int32."""
    batch, (pool, _, length) = x.shape[0], conv_state.shape
    if lengths is not None:
        lengths = _lengths(lengths, batch, x)
        # Only the place in the ring counts; more tokens than 32 bits count stay right.
        lengths = lengths if lengths.dtype is torch.int32 else lengths.remainder(max(1, length))
        lengths = lengths.to(torch.int32)
    if indices is not None:
        indices = _checks.indices("conv_state_indices", indices, batch, pool, x.device)
        indices = indices.clamp(-1, pool).to(torch.int32)  # what is outside must not wrap to the inside
    return lengths, indices


def _lengths(value: object, batch: int, x: torch.Tensor) -> torch.Tensor:
    """`cache_seqlens`: numbers of tokens, at least 0."""
    lengths = _checks.integers("cache_seqlens", value)
    _checks.same_device("cache_seqlens", lengths, x.device, "x")
    if lengths.shape != (batch,):
        raise ValueError(f"cache_seqlens: expected shape [{batch}], got {list(lengths.shape)}")
    if batch and _checks.readable(lengths) and int(lengths.min()) < 0:
        raise ValueError(f"cache_seqlens: expected numbers of at least 0, got {_checks.shown(lengths.tolist())}")
    return lengths


def activation_flag(activation: str | None) -> bool:
    """Whether it is silu."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected None, 'silu' or 'swish', got {activation!r}")
    return activation is not None


def _channels(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, channel_groups: int, head_dim: int | None
) -> tuple[torch.Tensor, int, int]:
    """(weight [D, W], G, head width) after checking them, and the bias, against the channels of x."""
    _checks.like("weight", weight, None, x, "x")
    if weight.dim() == 3 and weight.shape[1] == 1:
        weight = weight[:, 0]
    if weight.dim() != 2 or not 1 <= weight.shape[1] <= MAX_TAPS:
        expected = f"[D, W] or [D, 1, W] with W in 1..{MAX_TAPS}"
        raise ValueError(f"weight: expected shape {expected}, got {list(weight.shape)}")
    channels, inputs = weight.shape[0], x.shape[-1]
    _checks.size("channel_groups", channel_groups, 1)
    groups = channel_groups
    if groups == 1:
        width = max(1, inputs)
    else:
        if head_dim is None:
            raise ValueError(f"head_dim: expected an int because channel_groups is {groups}, got None")
        _checks.size("head_dim", head_dim, 1)
        width = head_dim
        if inputs % width:
            raise ValueError(f"head_dim: expected a divisor of the {inputs} channels of x, got {width}")
    if channels != inputs * groups:
        expected = f"[{inputs * groups}, W] for {inputs} channels of x and channel_groups {groups}"
        raise ValueError(f"weight: expected shape {expected}, got {list(weight.shape)}")
    if bias is not None:
        _checks.like("bias", bias, (channels,), x, "x")
    return weight, groups, width


def initial_state_of(
    state: torch.Tensor | None, packed: Packed | None, taps: int, x: torch.Tensor
) -> torch.Tensor | None:
    """[N, D/G, W-1], without the column that flash-linear-attention keeps in front."""
    if state is None:
        return None
    _checks.like("initial_state", state, None, x, "x")
    sequences = x.shape[0] if packed is None else packed.sequences
    if state.shape == (sequences, x.shape[2], taps):
        state = state[:, :, 1:]
    if state.shape != (sequences, x.shape[2], taps - 1):
        expected = f"[{sequences}, {x.shape[2]}, {taps - 1}]"
        raise ValueError(f"initial_state: expected shape {expected}, got {list(state.shape)}")
    return state if taps > 1 else None
