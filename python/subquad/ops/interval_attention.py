"""Softmax attention where every query row sees a union of key intervals."""

from __future__ import annotations

from typing import Any

import torch

from .. import _checks
from ..contract.interval_attention import MAX_HEAD_DIM
from ..masks import IntervalMask
from ..reference import interval_attention as reference
from ..rope import RopeSpec, check_rope
from . import _call


def interval_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: IntervalMask,
    *,
    scale: float | None = None,
    sink_logits: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    q_shift: RopeSpec | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(cap(scale q k^T) + biases) v over the keys that `mask` lets each row see, in one pass (FlashAttention, 2205.14135).

    Work is proportional to the visible keys; no [Tq, Tk] tensor exists on any backend but "reference". Differentiable in
    q, k, v, key_bias and sink_logits, through both results. A row that sees nothing gives 0, and lse -inf.

    Args:
        q: queries [B, Tq, Hq, D], float32, bfloat16, float16 (float64 on the reference backend), D in 1..512; any strides.
        k: keys [B, Tk, Hkv, D]; Hkv divides Hq, and query head h reads key head h // (Hq // Hkv).
        v: values [B, Tk, Hkv, Dv], Dv in 1..512.
        mask: which keys each row sees; see `IntervalMask`. Its sizes, where it has any, must be those of q and k.
        scale: factor of the scores; None for D ** -0.5.
        sink_logits: [Hq], any float dtype: one more term exp(sink_logits[h]) in the softmax denominator (gpt-oss).
        key_bias: [Tk], [B, Tk] or [B|1, Hq|1, Tk], any float dtype, added to the scores; -inf masks a key.
        alibi_slopes: [Hq] or [B, Hq], any float dtype, without a gradient: -alibi_slopes[h] * |i + Tk - Tq - j| is added to the
            score of row i and key j (ALiBi, arXiv 2108.12409; the distance counts both ways, as in flash-attn).
        softcap: scores become softcap * tanh(score / softcap) before anything is added to them (Gemma 2, arXiv 2408.00118);
            0 leaves them.
        q_shift: rotates the query of every interval by `mask.shift` positions; q and k are already rotated (PINE).
        return_lse: also return the log-sum-exp of the scores, sink logit included.
        backend: "native", "triton", "reference", or None to choose.

    Returns:
        out [B, Tq, Hq, Dv] in q's dtype; with `return_lse`, (out, lse) with lse [B, Tq, Hq] float32.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: shapes or devices that do not fit, a mask of other sizes, a scale that is not finite, a softcap that is not
            finite or negative, slopes that require a gradient, `q_shift` without
            `mask.shift` or the reverse, a backend that cannot run.

    Example:
        >>> import torch, subquad
        >>> q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
        >>> subquad.interval_attention(q, k, v, subquad.IntervalMask.sliding(4)).shape
        torch.Size([1, 6, 2, 8])
    """
    q, k, v = _call.autocast(q, k, v)
    _check_tensors(q, k, v)
    if not isinstance(mask, IntervalMask):
        raise TypeError(f"mask: expected a subquad.IntervalMask, got {type(mask).__name__}")
    scale = _scale(scale, q.shape[3])
    bias, sinks = _key_bias(key_bias, q, k), _sink_logits(sink_logits, q)
    slopes, softcap = _alibi_slopes(alibi_slopes, q), _softcap(softcap)
    _checks.flag("return_lse", return_lse)
    lowered = _lower(mask, q, k)
    queries = _rotated(q, mask, q_shift)

    def plan(backend: str, arguments: list[Any]) -> None:
        if backend == "triton" and lowered[0] is not None:
            arguments[-1] = mask.plan(per_slot=queries.shape[3] > 1)

    arguments = (queries, k, v, *lowered, bias, sinks, slopes, scale, softcap, [])
    out, lse, *_ = _call.run("interval_attention_fwd", backend, arguments, _define, tokens=q.shape[1], prepare=plan)
    return (out, lse) if return_lse else out


def _define(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.interval_attention(*arguments[:-1])


@_call.gradient_hook("interval_attention_fwd")
def _small_gradients(found: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Of the bias, which may have been broadcast, and of the sinks: delta, the sum of grad_out * out less grad_lse, suffices."""
    bias, sinks = given["key_bias"], given["sink_logits"]
    grads = {"q": found["dq"], "k": found["dk"], "v": found["dv"]}
    if bias is not None:
        grads["key_bias"] = found["dkey_bias"].sum_to_size(bias.shape)
    if sinks is not None:
        largest, log_sum = given["stats"].unbind(-1)
        weight = torch.exp(sinks - largest - log_sum)
        grads["sink_logits"] = -(weight * found["delta"]).sum((0, 1))
    return grads


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
    _checks.memory("key_bias", bias)
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
    _checks.memory("sink_logits", sinks)
    if sinks.shape != (q.shape[2],):
        raise ValueError(f"sink_logits: expected shape [{q.shape[2]}], one per query head, got {list(sinks.shape)}")
    return _wide("sink_logits", sinks, q).contiguous()


def _alibi_slopes(slopes: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    """As float32 [B|1, Hq], contiguous (float64 beside a float64 q)."""
    if slopes is None:
        return None
    _checks.tensor("alibi_slopes", slopes)
    _checks.memory("alibi_slopes", slopes)
    batch, heads = q.shape[0], q.shape[2]
    wide = slopes[None] if slopes.dim() == 1 else slopes
    if wide.dim() != 2 or wide.shape[0] not in (1, batch) or wide.shape[1] != heads:
        raise ValueError(f"alibi_slopes: expected shape [{heads}] or [{batch} or 1, {heads}], got {list(slopes.shape)}")
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes: expected a tensor without a gradient, got one that requires it")
    return _wide("alibi_slopes", wide, q).contiguous()


def _softcap(softcap: float) -> float:
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
        raise TypeError(f"softcap: expected a float, got {type(softcap).__name__}")
    if softcap != 0 and not torch.finfo(torch.float32).tiny <= softcap <= torch.finfo(torch.float32).max:
        raise ValueError(f"softcap: expected 0 or a finite positive float32, got {softcap}")
    return float(softcap)


def _wide(name: str, x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    if x.device != q.device:
        raise ValueError(f"{name}: expected device {q.device} as q has, got {x.device}")
    if q.dtype is torch.float64:
        return x.double()
    if x.dtype is torch.float64:  # what is finite there is finite here
        limit = torch.finfo(torch.float32).max
        x = torch.where(x.isinf(), x, x.clamp(-limit, limit))
    return x.float()


def _lower(mask: IntervalMask, q: torch.Tensor, k: torch.Tensor) -> tuple[Any, ...]:
    """The mask as arguments of the operators, after checking that it fits."""
    lowered = mask.lower(q.shape[1], k.shape[1])
    for tensor in lowered[:4]:
        if tensor is None:
            continue
        if tensor.device != q.device:
            raise ValueError(f"mask: expected device {q.device} as q has, got {tensor.device}; see IntervalMask.to")
        _check_lead(tensor, q)
    return lowered


def _check_lead(tensor: torch.Tensor, q: torch.Tensor) -> None:
    batch, heads = q.shape[0], q.shape[2]
    if tensor.shape[0] not in (1, batch) or tensor.shape[1] not in (1, heads):
        got = f"[{tensor.shape[0]}, {tensor.shape[1]}]"
        raise ValueError(f"mask: expected batch and heads of [{batch} or 1, {heads} or 1], got {got}")


def _rotated(q: torch.Tensor, mask: IntervalMask, rope: RopeSpec | None) -> torch.Tensor:
    """q [B, Tq, Hq, R, D]: as it is with R = 1, or rotated for every interval."""
    _checks.memory("q", q)
    if rope is None:
        if mask.shift is not None:
            raise ValueError("q_shift: expected a RopeSpec because mask.shift is given, got None")
        return q.unsqueeze(3)
    check_rope("q_shift", rope)
    if mask.shift is None:
        raise ValueError("q_shift: expected a mask with `shift`, got one without")
    if rope.rotary_dim > q.shape[3]:
        raise ValueError(f"q_shift: expected rotary_dim <= {q.shape[3]}, the head dimension, got {rope.rotary_dim}")
    shift = mask.shift.transpose(1, 2)  # [B|1, Tq, Hq|1, m]
    repeated = q.unsqueeze(3).expand(*q.shape[:3], shift.shape[-1], q.shape[3])
    return rope.rotate(repeated, shift)
