"""Causal depthwise convolution over time: whole sequences with gradients, and one step on a state in place."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from .. import _env, reference
from .._backends import resolve
from .._schemas import HANDLES
from . import _checks
from ._autograd import once_differentiable

STEM = "causal_conv1d"
MAX_TAPS = 8
ACTIVATIONS = (None, "silu", "swish")
_DEBUG = _env.read().debug


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
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
        cu_seqlens: int32 or int64 [N + 1], 0 first, T last, ascending: B is 1 and holds N sequences in a row, some perhaps empty
            (their final state is the initial one). On a GPU the values are checked under SUBQUAD_DEBUG=1 only.
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
    if isinstance(x, torch.Tensor) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias, initial_state, residual = cast_all(dtype, x, weight, bias, initial_state, residual)
    _checks.tensor("x", x)
    if x.dim() != 3:
        raise ValueError(f"x: expected shape [B, T, D], got {list(x.shape)}")
    silu = activation_flag(activation)
    _checks.flag("output_final_state", output_final_state)
    weight, groups, width = _channels(x, weight, bias, channel_groups, head_dim)
    channels, taps = weight.shape
    cu, sequence = sequence_bounds(cu_seqlens, x)
    sequences = x.shape[0] if cu is None else cu.shape[0] - 1
    state = initial_state_of(initial_state, sequences, taps, x)
    if residual is not None:
        require_like("residual", residual, (*x.shape[:2], channels), x)
    name = resolve(STEM, x.device.type, backend)
    if name == "reference" or torch._C._are_functorch_transforms_active():
        y, final = reference.causal_conv1d.causal_conv1d(x, weight, bias, state, residual, cu, groups, width, silu)
        return y.contiguous(), final.contiguous() if output_final_state else None
    _checks.not_double("x", x, name)
    x = _last_contiguous(x)
    residual = None if residual is None else _last_contiguous(residual)
    weight, bias, state = weight.contiguous(), contiguous_or_none(bias), contiguous_or_none(state)
    inputs = (x, weight, bias, state, residual)
    options = (cu, sequence, groups, width, silu, output_final_state)
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in inputs):
        y, final = _CausalConv1d.apply(*inputs, *options, name)
    else:
        y, final = HANDLES[name]["causal_conv1d_fwd"](*inputs, *options)
    return y, final if output_final_state else None


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *call, backend = args
        x, weight, bias, state, residual, cu, sequence, *ctx.options, ctx.final = call
        ctx.save_for_backward(x, weight, bias, state, cu, sequence)
        ctx.backend, ctx.residual = backend, residual is not None
        return HANDLES[backend]["causal_conv1d_fwd"](*call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor, grad_final: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, state, cu, sequence = ctx.saved_tensors
        through_state = grad_final.contiguous() if ctx.final and weight.shape[1] > 1 else None
        dx, dweight, dbias, dstate = HANDLES[ctx.backend]["causal_conv1d_bwd"](
            grad_y.contiguous(), through_state, x, weight, bias, state, cu, sequence, *ctx.options
        )
        grads = (dx, dweight, None if bias is None else dbias, None if state is None else dstate)
        return *grads, grad_y if ctx.residual else None, None, None, None, None, None, None, None


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
        cache_seqlens: int32 [B], how many tokens came before: conv_state is a ring, and token n lives in slot n mod L.
        conv_state_indices: int32 [B], which of the P states belongs to each row, each at most once; -1 skips a row: its output is
            0 and no state changes. Without it P is B. On a GPU values outside -1..P-1 skip as well.
        channel_groups, head_dim: as in `causal_conv1d`.
        backend: as in `causal_conv1d`.

    Returns:
        y [B, D] or [B, s, D] in x's dtype.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes, devices or indices that do not fit, unknown activation, a tensor that requires a gradient while
            gradients are enabled, backend that cannot run.

    Example:
        >>> import torch, subquad
        >>> state = torch.tensor([[[1.0]]])
        >>> subquad.causal_conv1d_update(torch.tensor([[2.0]]), state, torch.tensor([[1.0, 10.0]])), state.flatten()
        (tensor([[21.]]), tensor([2.]))
    """
    if isinstance(conv_state, torch.Tensor) and torch.is_autocast_enabled(conv_state.device.type):
        x, weight, bias, residual = cast_all(conv_state.dtype, x, weight, bias, residual)
    _checks.tensor("x", x)
    if x.dim() not in (2, 3):
        raise ValueError(f"x: expected shape [B, D] or [B, s, D], got {list(x.shape)}")
    silu = activation_flag(activation)
    weight, groups, width = _channels(x, weight, bias, channel_groups, head_dim)
    batch, taps = x.shape[0], weight.shape[1]
    require_like("conv_state", conv_state, None, x)
    lacking = conv_state_indices is None and conv_state.dim() > 0 and conv_state.shape[0] != batch
    if conv_state.dim() != 3 or conv_state.shape[1] != x.shape[-1] or conv_state.shape[2] < taps - 1 or lacking:
        pool = "P" if conv_state_indices is not None else batch
        expected = f"[{pool}, {x.shape[-1]}, L >= {taps - 1}]"
        raise ValueError(f"conv_state: expected shape {expected}, got {list(conv_state.shape)}")
    if residual is not None:
        require_like("residual", residual, (*x.shape[:-1], weight.shape[0]), x)
    _index("cache_seqlens", cache_seqlens, batch, x, 0, None)
    _index("conv_state_indices", conv_state_indices, batch, x, -1, conv_state.shape[0])
    named = {"x": x, "conv_state": conv_state, "weight": weight, "bias": bias, "residual": residual}
    for argument, value in named.items():
        if torch.is_grad_enabled() and value is not None and value.requires_grad:
            hint = "call it under torch.no_grad(), or use causal_conv1d with initial_state"
            raise ValueError(
                f"{argument}: expected a tensor without requires_grad, for there is no gradient here; {hint}"
            )
    name = resolve(STEM, x.device.type, backend)
    tokens = x if x.dim() == 3 else x[:, None]
    if residual is not None:
        residual = (residual if x.dim() == 3 else residual[:, None]).contiguous()
    seqlens, indices = contiguous_or_none(cache_seqlens), contiguous_or_none(conv_state_indices)
    if name == "reference":
        y, state = reference.causal_conv1d.causal_conv1d_update(
            tokens, conv_state, weight, bias, residual, seqlens, indices, groups, width, silu
        )
        conv_state.copy_(state)
        y = y.contiguous()
    else:
        _checks.not_double("x", x, name)
        y = HANDLES[name]["causal_conv1d_update_"](
            tokens.contiguous(), conv_state, weight.contiguous(), contiguous_or_none(bias), residual,
            seqlens, indices, groups, width, silu,
        )  # fmt: skip
    return y if x.dim() == 3 else y.squeeze(1)


def activation_flag(activation: str | None) -> bool:
    """Whether it is silu."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected None, 'silu' or 'swish', got {activation!r}")
    return activation is not None


def require_like(name: str, value: object, shape: tuple[int, ...] | None, x: torch.Tensor) -> None:
    """`value` is a tensor with x's dtype and device, and of this shape if one is given."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    _checks.like(name, value, tuple(value.shape), x, "x")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def _channels(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, channel_groups: int, head_dim: int | None
) -> tuple[torch.Tensor, int, int]:
    """(weight [D, W], G, head width) after checking them, and the bias, against the channels of x."""
    require_like("weight", weight, None, x)
    if weight.dim() == 3 and weight.shape[1] == 1:
        weight = weight[:, 0]
    if weight.dim() != 2 or not 1 <= weight.shape[1] <= MAX_TAPS:
        expected = f"[D, W] or [D, 1, W] with W in 1..{MAX_TAPS}"
        raise ValueError(f"weight: expected shape {expected}, got {list(weight.shape)}")
    channels, inputs = weight.shape[0], x.shape[-1]
    groups = _positive("channel_groups", channel_groups)
    if groups == 1:
        width = max(1, inputs)
    else:
        if head_dim is None:
            raise ValueError(f"head_dim: expected an int because channel_groups is {groups}, got None")
        width = _positive("head_dim", head_dim)
        if inputs % width:
            raise ValueError(f"head_dim: expected a divisor of the {inputs} channels of x, got {width}")
    if channels != inputs * groups:
        expected = f"[{inputs * groups}, W] for {inputs} channels of x and channel_groups {groups}"
        raise ValueError(f"weight: expected shape {expected}, got {list(weight.shape)}")
    if bias is not None:
        require_like("bias", bias, (channels,), x)
    return weight, groups, width


def sequence_bounds(
    cu_seqlens: torch.Tensor | None, x: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(bounds [N + 1], sequence of every token [T]) as int32, made without asking the device for a value."""
    if cu_seqlens is None:
        return None, None
    _integers("cu_seqlens", cu_seqlens, x, (torch.int32, torch.int64))
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens: expected shape [N + 1], got {list(cu_seqlens.shape)}")
    batch, tokens = x.shape[:2]
    if batch != 1:
        raise ValueError(f"cu_seqlens: expected x with B = 1, got {list(x.shape)}")
    if _readable(cu_seqlens):
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in pairwise(bounds)):
            shown = bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-3:]]
            raise ValueError(f"cu_seqlens: expected ascending numbers from 0 to {tokens}, got {shown}")
    cu = cu_seqlens.to(torch.int32).contiguous()
    sequence = torch.searchsorted(
        cu, torch.arange(tokens, device=x.device, dtype=torch.int32), right=True, out_int32=True
    )
    return cu, sequence - 1


def _readable(value: torch.Tensor) -> bool:
    """Whether looking at the numbers is possible and costs no synchronisation."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return value.device.type == "cpu" or (_DEBUG and value.device.type == "cuda")


def _integers(name: str, value: object, x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(str(t)[6:] for t in dtypes)}, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} as x has, got {value.device}")


def _index(name: str, value: torch.Tensor | None, batch: int, x: torch.Tensor, low: int, high: int | None) -> None:
    """`value` is int32 [B] with low <= value < high."""
    if value is None:
        return
    _integers(name, value, x, (torch.int32,))
    if value.shape != (batch,):
        raise ValueError(f"{name}: expected shape [{batch}], got {list(value.shape)}")
    if _readable(value) and batch:
        least, most = value.min().item(), value.max().item()
        if least < low or (high is not None and most >= high):
            expected = f"at least {low}" if high is None else f"{low} to {high - 1}"
            raise ValueError(f"{name}: expected numbers of {expected}, got {least} to {most}")


def initial_state_of(state: torch.Tensor | None, sequences: int, taps: int, x: torch.Tensor) -> torch.Tensor | None:
    """[N, D/G, W-1], without the column that flash-linear-attention keeps in front."""
    if state is None:
        return None
    require_like("initial_state", state, None, x)
    if state.shape == (sequences, x.shape[2], taps):
        state = state[:, :, 1:]
    if state.shape != (sequences, x.shape[2], taps - 1):
        expected = f"[{sequences}, {x.shape[2]}, {taps - 1}]"
        raise ValueError(f"initial_state: expected shape {expected}, got {list(state.shape)}")
    return state if taps > 1 else None


def cast_all(dtype: torch.dtype, *values: Any) -> Any:
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(v.to(dtype) if isinstance(v, torch.Tensor) and v.dtype in narrow else v for v in values)


def contiguous_or_none(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.contiguous()


def _last_contiguous(value: torch.Tensor) -> torch.Tensor:
    return value if value.stride(-1) == 1 or value.shape[-1] == 1 else value.contiguous()
