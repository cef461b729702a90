"""Peers from other libraries on a GPU, by op: None where the library is not installed, or has no such call.

What each is, where it differs from the op: flash-attn is causal whatever the mask; flash-linear-attention's GLA does
not normalise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import torch

from ..testing.spec import Sample

Peer = Callable[[Sample], Callable[[], Any] | None]


def _of(module: str, name: str) -> Callable[..., Any] | None:
    """A function of a library, None when that cannot be imported: it may be built for another torch."""
    try:
        return getattr(import_module(module), name, None)
    except (ImportError, OSError, RuntimeError):
        return None


def _flash_attn(sample: Sample) -> Callable[[], Any] | None:
    call = _of("flash_attn", "flash_attn_func")
    if call is None or sample["q"].dtype is torch.float32:
        return None
    q, k, v = (sample[n] for n in ("q", "k", "v"))
    return lambda: call(q, k, v, causal=True)


def _fla(sample: Sample) -> Callable[[], Any] | None:
    q, k, v, g = (sample.args.get(n) for n in ("q", "k", "v", "g"))
    if g is None:
        return None
    channel = g.dim() == 4
    call = _of("fla.ops.gla", "chunk_gla") if channel else _of("fla.ops.simple_gla", "chunk_simple_gla")
    return None if call is None else lambda: call(q, k, v, g)[0]


def _fla_step(sample: Sample) -> Callable[[], Any] | None:
    call = _of("fla.ops.gla", "fused_recurrent_gla")
    heads = {sample[n].shape[1] for n in ("q", "k", "v", "g") if sample.args.get(n) is not None}
    if call is None or len(heads) != 1 or sample["g"].dim() != 3:
        return None
    q, k, v, g = (sample[n][:, None] for n in ("q", "k", "v", "g"))
    state = sample["state"]
    return lambda: call(q, k, v, gk=g, initial_state=state, output_final_state=True)


def _causal_conv1d(sample: Sample) -> Callable[[], Any] | None:
    call = _of("causal_conv1d", "causal_conv1d_fn")
    if call is None or sample.kwargs.get("channel_groups", 1) != 1:
        return None
    x, weight, bias = sample["x"].transpose(1, 2), sample["weight"], sample.args.get("bias")
    activation = sample.kwargs.get("activation")
    return lambda: call(x, weight, bias, activation=activation).transpose(1, 2)


def _causal_conv1d_update(sample: Sample) -> Callable[[], Any] | None:
    call = _of("causal_conv1d", "causal_conv1d_update")
    if call is None or sample["x"].dim() != 2:
        return None
    x, state, weight = sample["x"], sample["conv_state"].clone(), sample["weight"]
    activation = sample.kwargs.get("activation")
    return lambda: call(x, state, weight, activation=activation)


OUTSIDE: Mapping[str, Mapping[str, Peer]] = {
    "interval_attention": {"flash-attn": _flash_attn},
    "gated_linear_attention": {"fla": _fla},
    "gated_linear_attention_step": {"fla": _fla_step},
    "causal_conv1d": {"causal-conv1d": _causal_conv1d},
    "causal_conv1d_update": {"causal-conv1d": _causal_conv1d_update},
}
