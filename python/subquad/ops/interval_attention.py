"""Softmax attention where every query row sees a union of key intervals."""

from __future__ import annotations

from typing import Any

import torch

from .. import _backends, reference
from .._backends import resolve
from .._schemas import HANDLES
from ..masks import IntervalMask
from ..rope import RopeSpec
from . import _checks
from ._autograd import once_differentiable

STEM = "interval_attention"
MAX_HEAD_DIM = 256
DECODE_ROWS = 16  # up to here the CUDA C++ kernel, which splits the keys, is the better choice


def interval_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: IntervalMask,
    *,
    scale: float | None = None,
    sink_logits: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    q_shift: RopeSpec | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    r"""softmax(scale q k^T + key_bias) v over the keys that `mask` lets each row see, in one pass (FlashAttention, 2205.14135).

    Work is proportional to the visible keys; no [Tq, Tk] tensor exists on any backend but "reference". Differentiable in
    q, k, v, key_bias and sink_logits, through both results. A row that sees nothing gives 0, and lse -inf.

    Args:
        q: queries [B, Tq, Hq, D], float32, bfloat16, float16 (float64 on the reference backend), D in 1..256; any strides.
        k: keys [B, Tk, Hkv, D]; Hkv divides Hq, and query head h reads key head h // (Hq // Hkv).
        v: values [B, Tk, Hkv, Dv], Dv in 1..256.
        mask: which keys each row sees; see `IntervalMask`. Its sizes, where it has any, must be those of q and k.
        scale: factor of the scores; None for D ** -0.5.
        sink_logits: [Hq], any float dtype: one more term exp(sink_logits[h]) in the softmax denominator (gpt-oss).
        key_bias: [Tk], [B, Tk] or [B|1, Hq|1, Tk], any float dtype, added to the scores; -inf masks a key.
        q_shift: rotates the query of every interval by `mask.shift` positions; q and k are already rotated (PINE).
        return_lse: also return the log-sum-exp of the scores, sink logit included.
        backend: "native", "triton", "reference", or None to choose.

    Returns:
        out [B, Tq, Hq, Dv] in q's dtype; with `return_lse`, (out, lse) with lse [B, Tq, Hq] float32.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes or devices that do not fit, a mask of other sizes, a scale that is not finite, `q_shift` without
            `mask.shift` or the reverse, a backend that cannot run.

    Example:
        >>> import torch, subquad
        >>> q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
        >>> subquad.interval_attention(q, k, v, subquad.IntervalMask.sliding(4)).shape
        torch.Size([1, 6, 2, 8])
    """
    if torch.is_autocast_enabled(q.device.type if isinstance(q, torch.Tensor) else "cpu"):
        q, k, v = _autocast(q, k, v)
    _check_tensors(q, k, v)
    if not isinstance(mask, IntervalMask):
        raise TypeError(f"mask: expected a subquad.IntervalMask, got {type(mask).__name__}")
    scale = _scale(scale, q.shape[3])
    bias, sinks = _key_bias(key_bias, q, k), _sink_logits(sink_logits, q)
    _checks.flag("return_lse", return_lse)
    lowered = _lower(mask, q, k)
    name = _backend(backend, q, k, v, bias, sinks)
    queries = _rotated(q, mask, q_shift)
    if name == "reference" or torch._C._are_functorch_transforms_active():
        rest: tuple[Any, ...] = (*lowered, bias, sinks, scale)
        out, lse = reference.interval_attention.interval_attention(queries, k, v, *rest)
        return (out, lse) if return_lse else out
    _checks.not_double("q", q, name)
    queries, k, v = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (queries, k, v))
    plan = mask.plan(per_slot=queries.shape[3] > 1) if name == "triton" and lowered[0] is not None else []
    differentiable = (queries, k, v, *(x for x in (bias, sinks) if x is not None))
    if torch.is_grad_enabled() and any(x.requires_grad for x in differentiable):
        out, lse = _Attention.apply(queries, k, v, bias, sinks, lowered, scale, plan, name)
    else:
        out, lse = HANDLES[name][f"{STEM}_fwd"](queries, k, v, *lowered, bias, sinks, scale, plan)
    return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    """Forward and backward operators; the tensors of the mask and of its plan are constants."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        sinks: torch.Tensor | None,
        lowered: tuple[Any, ...],
        scale: float,
        plan: list[torch.Tensor],
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = HANDLES[backend][f"{STEM}_fwd"](q, k, v, *lowered, bias, sinks, scale, plan)
        ctx.save_for_backward(q, k, v, bias, sinks, out, lse)
        ctx.lowered, ctx.scale, ctx.plan, ctx.backend = lowered, scale, plan, backend
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, bias, sinks, out, lse = ctx.saved_tensors
        backend, plan = _backward_backend(ctx.backend, q.device.type), ctx.plan
        dq, dk, dv, dbias, delta = HANDLES[backend][f"{STEM}_bwd"](
            grad_out.contiguous(),
            grad_lse.contiguous(),
            out,
            lse,
            q,
            k,
            v,
            *ctx.lowered,
            bias,
            sinks,
            ctx.scale,
            plan,
        )
        if bias is not None:
            dbias = dbias.sum_to_size(bias.shape)
        dsinks = None
        if sinks is not None:
            weight = torch.where(lse == -torch.inf, 0.0, torch.exp(sinks - lse))
            dsinks = -(weight * delta).sum((0, 1))
        return dq, dk, dv, None if bias is None else dbias, dsinks, None, None, None, None


def _backward_backend(forward: str, device: str) -> str:
    """The CUDA C++ kernel is for decoding: gradients of what it computed come from the backend that trains there."""
    if forward == "simt":
        return resolve(STEM, device, "native")
    return resolve(STEM, device, "triton") if forward == "native" and device == "cuda" else forward


def _backend(requested: str | None, *tensors: torch.Tensor | None) -> str:
    q = tensors[0]
    assert q is not None
    name = resolve(STEM, q.device.type, requested)
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if q.device.type == "cuda" and q.shape[1] <= DECODE_ROWS and not training and _backends.is_automatic(requested):
        return "native" if _backends.unavailable(STEM, "native", "cuda") is None else name
    return name


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Float tensors in autocast's dtype, as matrix products under autocast have them."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type) if isinstance(tensors[0], torch.Tensor) else None
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype in narrow else x for x in tensors)


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x, of in (("q", q, None), ("k", k, q), ("v", v, q)):
        _checks.tensor(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name}: expected shape [B, T, H, D], got {list(x.shape)}")
        if of is not None and x.dtype is not of.dtype:
            raise TypeError(f"{name}: expected {of.dtype} as q has, got {x.dtype}")
        if of is not None and x.device != of.device:
            raise ValueError(f"{name}: expected device {of.device} as q has, got {x.device}")
        if not 1 <= x.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: expected a head dimension in 1..{MAX_HEAD_DIM}, got {x.shape[3]}")
    batch, _, heads, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(f"k: expected shape [{batch}, Tk, Hkv, {dim}] to fit q {list(q.shape)}, got {list(k.shape)}")
    if k.shape[2] == 0 or heads % k.shape[2] != 0:
        raise ValueError(f"k: expected a number of heads that divides the {heads} of q, got {k.shape[2]}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected shape [{', '.join(map(str, k.shape[:3]))}, Dv] as k has, got {list(v.shape)}")


def _scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return float(head_dim**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a float or None, got {type(scale).__name__}")
    if not abs(scale) <= torch.finfo(torch.float32).max:
        raise ValueError(f"scale: expected a finite float32, got {scale}")
    return float(scale)


def _key_bias(bias: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """As float32 [B|1, Hq|1, Tk], contiguous (float64 beside a float64 q)."""
    if bias is None:
        return None
    _checks.tensor("key_bias", bias)
    batch, heads, keys = q.shape[0], q.shape[2], k.shape[1]
    wide = bias[None, None] if bias.dim() == 1 else bias[:, None] if bias.dim() == 2 else bias
    fits = wide.dim() == 3 and wide.shape[2] == keys and wide.shape[0] in (1, batch) and wide.shape[1] in (1, heads)
    if not fits:
        expected = f"[{keys}], [{batch}, {keys}] or [{batch} or 1, {heads} or 1, {keys}]"
        raise ValueError(f"key_bias: expected shape {expected}, got {list(bias.shape)}")
    return _wide("key_bias", wide, q).contiguous()


def _sink_logits(sinks: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """As float32 [Hq], contiguous (float64 beside a float64 q)."""
    if sinks is None:
        return None
    _checks.tensor("sink_logits", sinks)
    if sinks.shape != (q.shape[2],):
        raise ValueError(f"sink_logits: expected shape [{q.shape[2]}], one per query head, got {list(sinks.shape)}")
    return _wide("sink_logits", sinks, q).contiguous()


def _wide(name: str, x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    if x.device != q.device:
        raise ValueError(f"{name}: expected device {q.device} as q has, got {x.device}")
    return x.to(torch.float64 if q.dtype is torch.float64 else torch.float32)


def _lower(mask: IntervalMask, q: torch.Tensor, k: torch.Tensor) -> tuple[Any, ...]:
    """The mask as arguments of the operators, after checking that it fits."""
    lowered = mask.lower(q.shape[1], k.shape[1])
    batch, heads = q.shape[0], q.shape[2]
    for tensor in lowered[:4]:
        if tensor is None:
            continue
        if tensor.device != q.device:
            raise ValueError(f"mask: expected device {q.device} as q has, got {tensor.device}; see IntervalMask.to")
        if tensor.shape[0] not in (1, batch) or tensor.shape[1] not in (1, heads):
            got = f"[{tensor.shape[0]}, {tensor.shape[1]}]"
            raise ValueError(f"mask: expected batch and heads of [{batch} or 1, {heads} or 1], got {got}")
    return lowered


def _rotated(q: torch.Tensor, mask: IntervalMask, rope: RopeSpec | None) -> torch.Tensor:
    """q [B, Tq, Hq, R, D]: as it is with R = 1, or rotated for every interval."""
    if rope is None:
        if mask.shift is not None:
            raise ValueError("q_shift: expected a RopeSpec because mask.shift is given, got None")
        return q.unsqueeze(3)
    if not isinstance(rope, RopeSpec):
        raise TypeError(f"q_shift: expected a subquad.RopeSpec or None, got {type(rope).__name__}")
    if mask.shift is None:
        raise ValueError("q_shift: expected a mask with `shift`, got one without")
    if rope.rotary_dim > q.shape[3]:
        raise ValueError(f"q_shift: expected rotary_dim <= {q.shape[3]}, the head dimension, got {rope.rotary_dim}")
    shift = mask.shift.transpose(1, 2)  # [B|1, Tq, Hq|1, m]
    repeated = q.unsqueeze(3).expand(*q.shape[:3], shift.shape[-1], q.shape[3])
    return rope.rotate(repeated, shift.expand(repeated.shape[:-1]))
