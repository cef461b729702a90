"""Checks of new tokens and of the states that they enter, for `sink_attention_step` and for the caches above it."""

from __future__ import annotations

import torch

from .. import _checks
from ..contract.sink_attention_step import MAX_HEAD_DIM, RING_DTYPES


def check_tokens(q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in (("k", k), ("v", v)):
        _checks.tensor(name, x)
        if x.dim() != 4 or x.shape[2] < 1 or not 1 <= x.shape[3] <= MAX_HEAD_DIM:
            expected = f"[B, T, H, D] with H of at least 1 and D in 1..{MAX_HEAD_DIM}"
            raise ValueError(f"{name}: expected shape {expected}, got {list(x.shape)}")
    batch, width, heads, head_dim = k.shape
    _checks.like("v", v, (batch, width, heads, v.shape[3]), k, "k")
    if q is None:
        return
    _checks.tensor("q", q)
    if q.dim() != 4:
        raise ValueError(f"q: expected shape [B, T, H, D], got {list(q.shape)}")
    _checks.like("q", q, (batch, width, q.shape[2], head_dim), k, "k")
    if q.shape[2] < 1 or q.shape[2] % heads:
        raise ValueError(f"q: expected a multiple of the {heads} heads of k, got {q.shape[2]}")


def check_states(
    k: torch.Tensor,
    v: torch.Tensor,
    sink_k: torch.Tensor,
    sink_v: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    batch, heads = k.shape[0], k.shape[2]
    for name, x in (("sink_k", sink_k), ("ring_k", ring_k)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name}: expected shape [B, H, places, D], got {list(x.shape)}")
    sinks, ring = sink_k.shape[2], ring_k.shape[2]
    if ring < 1:
        raise ValueError(f"ring_k: expected at least one place, got {list(ring_k.shape)}")
    _checks.like("sink_k", sink_k, (batch, heads, sinks, k.shape[3]), k, "k")
    _checks.like("sink_v", sink_v, (batch, heads, sinks, v.shape[3]), k, "k")
    if ring_k.dtype is not k.dtype and ring_k.dtype not in RING_DTYPES:
        raise TypeError(f"ring_k: expected {k.dtype} as k has, int8 or float8_e4m3fn, got {ring_k.dtype}")
    of = k if ring_k.dtype is k.dtype else ring_k
    _checks.like("ring_k", ring_k, (batch, heads, ring, k.shape[3]), of, "k")
    _checks.like("ring_v", ring_v, (batch, heads, ring, v.shape[3]), of, "ring_k")
    for name, scale, of_ring in (("k_scale", k_scale, ring_k), ("v_scale", v_scale, ring_v)):
        if (scale is None) is not (of_ring.dtype is k.dtype):
            wanted = "None" if of_ring.dtype is k.dtype else "a float32 tensor"
            raise ValueError(f"{name}: expected {wanted} for a ring of {of_ring.dtype}, got {type(scale).__name__}")
        if scale is None:
            continue
        if not isinstance(scale, torch.Tensor) or scale.dtype is not torch.float32:
            raise TypeError(f"{name}: expected a float32 tensor, got {getattr(scale, 'dtype', type(scale).__name__)}")
        _checks.dense(name, scale)
        if scale.shape != (batch, heads, ring):
            raise ValueError(f"{name}: expected shape {[batch, heads, ring]}, got {list(scale.shape)}")
        _checks.same_device(name, scale, k.device, "k")
    for name, x in (("sink_k", sink_k), ("ring_k", ring_k), ("ring_v", ring_v)):
        _checks.same_device(name, x, k.device, "k")


def check_counter(name: str, counter: torch.Tensor, k: torch.Tensor) -> None:
    if counter.shape != (k.shape[0],):
        raise ValueError(f"{name}: expected shape [{k.shape[0]}], got {list(counter.shape)}")
    _checks.same_device(name, counter, k.device, "k")


def count_of(m: object, k: torch.Tensor) -> torch.Tensor:
    count = _checks.integers("m", m, 1)
    check_counter("m", count, k)
    if _checks.readable(count) and any(not 0 <= n <= k.shape[1] for n in count.tolist()):
        raise ValueError(f"m: expected numbers in 0..{k.shape[1]}, got {_checks.shown(count.tolist())}")
    return count.to(torch.int64)
