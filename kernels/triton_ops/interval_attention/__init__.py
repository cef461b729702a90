"""Interval attention: softmax attention where every query row sees a few key intervals; forward and backward.

Three kernels: the forward; dq, which also makes delta = rowsum(dout * out) - dlse; dk and dv. Tiles that no row sees are not
visited, and tiles that every row of a program sees wholly go through a loop without predicates.

Sources: FlashAttention (arXiv 2205.14135) for the running softmax and its backward; the plan is this project's.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton

from .._common.aot import AotCase
from .._common.device import precision
from .arguments import Flags, Heads, Mask, Plan, RowResults
from .backward import interval_attention_dkdv_kernel, interval_attention_dq_kernel
from .forward import interval_attention_fwd_kernel
from .tiles import PLAN_K, PLAN_Q, launch_options


class _Call(NamedTuple):
    """What the three kernels share."""

    tensors: tuple[Any, ...]  # q, k, v, mask
    by_rows: Plan
    by_keys: Plan
    sizes: dict[str, Any]
    constants: dict[str, Any]
    width: int  # the larger head dimension, padded


def _broadcast_strides(x: torch.Tensor, head_size: int) -> tuple[int, int]:
    """Steps of batch and head; 0 where broadcast."""
    return (head_size * x.shape[1] if x.shape[0] > 1 else 0, head_size if x.shape[1] > 1 else 0)


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor | None,
    ends: torch.Tensor | None,
    key_start: torch.Tensor | None,
    key_stop: torch.Tensor | None,
    sink_tokens: int,
    window: int,
    causal: bool,
    key_bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    scale: float,
    softcap: float,
    plan: list[torch.Tensor],
) -> _Call:
    _, tq, heads, slots, d = q.shape
    tk, kv_heads, dv = k.shape[1], k.shape[2], v.shape[3]
    intervals, strides, key_strides, bias_strides = 1, (0, 0), (0, 0), (0, 0)
    if starts is not None:
        if len(plan) != 4:
            raise ValueError(
                f"plan: expected the 4 tensors of IntervalMask.plan for a mask of tensors, got {len(plan)}"
            )
        intervals = starts.shape[3]
        strides = _broadcast_strides(starts, 1)
    if slots not in (1, intervals):
        raise ValueError(f"q: expected one slot, or one for each of {intervals} intervals, got {slots}")
    if key_start is not None:
        key_strides = _broadcast_strides(key_start, tk)
    if key_bias is not None:
        bias_strides = _broadcast_strides(key_bias, tk)
    slope_stride = heads if alibi_slopes is not None and alibi_slopes.shape[0] > 1 else 0
    mask = Mask(
        starts, ends, *strides, key_start, key_stop, *key_strides, key_bias, *bias_strides, alibi_slopes, slope_stride
    )  # fmt: skip
    tensors = (
        Heads(q, q.stride(0), q.stride(1), q.stride(2), d, q.stride(3)),
        Heads(k, k.stride(0), k.stride(1), k.stride(2), d),
        Heads(v, v.stride(0), v.stride(1), v.stride(2), dv),
        mask,
    )
    flags = Flags(
        CAUSAL=causal,
        WINDOWED=causal and window >= 0,
        PER_KEY=key_start is not None or key_bias is not None,
        CAPPED=softcap != 0.0,
        INTERVALS=intervals,
        SLOTS=slots,
        GROUP=heads // kv_heads,
        PRECISION=precision("tf32x3" if q.dtype is torch.float32 else "tf32"),
    )
    sizes: dict[str, Any] = {"tq": tq, "tk": tk, "sink_tokens": sink_tokens, "window": window}
    sizes |= {"heads": heads, "scale": scale, "softcap": softcap}
    blocks = {"BD": max(16, triton.next_power_of_2(d)), "BDV": max(16, triton.next_power_of_2(dv))}
    by_rows, by_keys = (Plan(None, None),) * 2 if starts is None else (Plan(*plan[:2]), Plan(*plan[2:]))
    return _Call(tensors, by_rows, by_keys, sizes, {"FLAGS": flags, **blocks}, max(blocks.values()))


def interval_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor | None,
    ends: torch.Tensor | None,
    key_start: torch.Tensor | None,
    key_stop: torch.Tensor | None,
    sink_tokens: int,
    window: int,
    causal: bool,
    key_bias: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    scale: float,
    softcap: float,
    plan: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, stats) of softmax attention over the intervals.

    Args:
        q: `[B, Tq, Hq, R, D]`, R = 1 or the number of intervals; k `[B, Tk, Hkv, D]`; v `[B, Tk, Hkv, Dv]`; last dimension
            contiguous.
        starts, ends: int32 `[B|1, Hq|1, Tq, m]` or None for the plain mask of `sink_tokens`, `window` (-1: none), `causal`.
        key_start, key_stop: int32 `[B|1, Hq|1, Tk]` or None.
        key_bias: fp32 `[B|1, Hq|1, Tk]` or None; sink_logits: fp32 `[Hq]` or None; alibi_slopes: fp32 `[B|1, Hq]` or None.
        softcap: 0 for none.
        plan: of the mask, where `starts` is given; per interval when R > 1.

    Returns:
        out `[B, Tq, Hq, Dv]` like q, lse fp32 `[B, Tq, Hq]`, stats fp32 `[B, Tq, Hq, 2]` (see `RowResults`), contiguous.

    Raises:
        ValueError: a mask without its plan, or slots that do not fit it.
    """
    batch, tq, heads = q.shape[:3]
    c = _call(
        q, k, v, starts, ends, key_start, key_stop, sink_tokens, window, causal, key_bias, alibi_slopes, scale, softcap, plan
    )  # fmt: skip
    out = q.new_empty((batch, tq, heads, v.shape[3]))
    lse = q.new_empty((batch, tq, heads), dtype=torch.float32)
    stats = lse.new_empty((batch, tq, heads, 2))
    options = launch_options(c.width, q.dtype is torch.float32, "fwd")
    if lse.numel():
        interval_attention_fwd_kernel[(triton.cdiv(tq, options["BM"]) * heads * batch,)](
            *c.tensors, c.by_rows, sink_logits, RowResults(out, lse, stats), **c.sizes, **c.constants, **options
        )
    return out, lse, stats


def interval_attention_bwd(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor | None,
    ends: torch.Tensor | None,
    key_start: torch.Tensor | None,
    key_stop: torch.Tensor | None,
    sink_tokens: int,
    window: int,
    causal: bool,
    key_bias: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    scale: float,
    softcap: float,
    plan: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and key_bias, and delta = rowsum(grad_out * out) - grad_lse.

    Args: as `interval_attention_fwd`, its results, and their gradients, contiguous.

    Returns:
        dq, dk, dv like q, k, v; dkey_bias fp32 `[B, Hq, Tk]` (`[0]` without key_bias); delta fp32 `[B, Tq, Hq]`.

    Raises:
        ValueError: as `interval_attention_fwd`.
    """
    batch, tq, heads = q.shape[:3]
    tk, kv_heads = k.shape[1:3]
    c = _call(
        q, k, v, starts, ends, key_start, key_stop, sink_tokens, window, causal, key_bias, alibi_slopes, scale, softcap, plan
    )  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dkey_bias = grad_lse.new_empty((0,) if key_bias is None else (batch, heads, tk))
    delta = torch.empty_like(grad_lse)
    if delta.numel():
        options = launch_options(c.width, q.dtype is torch.float32, "dq")
        interval_attention_dq_kernel[(triton.cdiv(tq, options["BM"]) * heads * batch,)](
            *c.tensors, c.by_rows, RowResults(out, None, stats), RowResults(grad_out, grad_lse, None), dq, delta,
            **c.sizes, **c.constants, **options,
        )  # fmt: skip
    if batch * tk * kv_heads:
        options = launch_options(c.width, q.dtype is torch.float32, "dkdv")
        interval_attention_dkdv_kernel[(triton.cdiv(tk, options["BN"]) * kv_heads * batch,)](
            *c.tensors, c.by_keys, grad_out, stats, delta, dk, dv, dkey_bias, **c.sizes, **c.constants, **options
        )
    return dq, dk, dv, dkey_bias, delta


def _aot_args(dtype: torch.dtype, d: int, kind: str, backward: bool = False) -> tuple[Any, ...]:
    """A prefill of 4096 tokens with 8 key heads of 32."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    t, heads, kv_heads = 4096, 32, 8
    index = partial(empty, dtype=torch.int32)
    nq, nk = t // PLAN_Q.value, t // PLAN_K.value
    mask: tuple[Any, ...] = (None, None, None, None, 4 if kind == "sink" else 0, 1020 if kind == "sink" else -1, True)
    plan: list[torch.Tensor] = []
    if kind == "planned":
        mask = (index(1, 1, t, 2), index(1, 1, t, 2), None, None, 0, -1, False)
        plan = [index(1, 1, nq, 2), index(1, 1, nq, nk), index(1, 1, nk, 2), index(1, 1, nk, nq)]
    q, k, v = empty(1, t, heads, 1, d), empty(1, t, kv_heads, d), empty(1, t, kv_heads, d)
    call = (q, k, v, *mask, None, None, None, 0.125, 50.0 if kind == "capped" else 0.0, plan)
    if not backward:
        return call
    out, wide = empty(1, t, heads, d), partial(empty, 1, t, heads, dtype=torch.float32)
    return (out, wide(), out, wide(2), *call)


_SPILL = (
    "136 bytes on sm_90: the sums of dk and dv and 64 keys and values of width 128 fill the registers of wgmma's warps"
)
_SPILL_PLANNED = "16 bytes on sm_90: the places of the plan beside 128 sums of width 128, where 255 registers end"
_SPILL_WIDE = (
    "wider than 128, sums and what they are made of exceed 255 registers; smaller tiles would read keys more often"
)
_SPILLS: dict[int, dict[str, str]] = {
    64: {},
    128: {"interval_attention_dkdv_kernel": _SPILL, "interval_attention_fwd_kernel": _SPILL_PLANNED},
    256: {f"interval_attention_{name}_kernel": _SPILL_WIDE for name in ("fwd", "dq", "dkdv")},
    512: {f"interval_attention_{name}_kernel": _SPILL_WIDE for name in ("fwd", "dq", "dkdv")},
}

AOT = [
    AotCase(f"{name} D{d} {kind}", launcher, partial(_aot_args, dtype, d, kind, backward), _SPILLS[d])
    for name, dtype, d, kind in (
        ("bf16", torch.bfloat16, 64, "causal"),
        ("bf16", torch.bfloat16, 64, "sink"),
        ("bf16", torch.bfloat16, 128, "causal"),
        ("bf16", torch.bfloat16, 128, "planned"),
        ("bf16", torch.bfloat16, 256, "capped"),
        ("bf16", torch.bfloat16, 512, "causal"),
        ("fp32", torch.float32, 64, "causal"),
    )
    for launcher, backward in ((interval_attention_fwd, False), (interval_attention_bwd, True))
]

__all__ = ["AOT", "interval_attention_bwd", "interval_attention_fwd"]
