"""Decoding of linear attention whose states are split by channels of the keys, where there are fewer heads than ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .. import _checks
from ..ops import _call
from ..ops.gated_linear_attention import _check_rows
from ..ops.gated_linear_attention import gated_linear_attention_step as _step
from . import _collectives
from ._collectives import Group
from .agreement import checked

_AGREED: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()  # signatures of calls, by group


def gated_linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    state: torch.Tensor,
    *,
    group: Group = None,
    normalize: bool = False,
    scale: float | None = None,
    eps: float = 1e-10,
    backend: str | None = None,
) -> torch.Tensor:
    """`subquad.gated_linear_attention_step` with a state of which every rank has K / R channels. Not differentiable.

    A state's update needs no other rank, and outputs are sums over channels: one all-reduce of [B, HQ, V], or V + 1, in float32.
    Where the ranks divide the heads, split by heads instead, which sends nothing.

    Args:
        q, k, v, g: of all channels, equal on all ranks, as in `subquad.gated_linear_attention_step`.
        state: float32 [B, HS, K / R, V], channels rank * K / R and on; updated in place. With `normalize` [.., V + 1], whose last
            column are the sums of keys, as `gated_linear_attention` takes an `initial_state` in one tensor.
        group: a process group, a one-dimensional DeviceMesh, or None for the default group.
        normalize: divide by the sum of the weights plus `eps`.
        scale: factor of the scores; None for K ** -0.5.
        eps, backend: as in `subquad.gated_linear_attention_step`.

    Returns:
        o [B, HQ, V] in q's dtype, the same on all ranks.

    Raises:
        TypeError, ValueError: as `subquad.gated_linear_attention_step`; channels that the ranks do not divide, a state of another
            shape, ranks that differ: on all ranks, before any state has moved.
    """
    group = _collectives.group_of(group)
    rank, size = _collectives.rank_and_size(group)
    q, k, v = _call.autocast(q, k, v)

    def check() -> None:
        _checks.flag("normalize", normalize)
        states, width = _check_rows(q, k, v, g, 3), q.shape[2]
        if width % size:
            raise ValueError(f"q: expected a multiple of {size} channels, as many as the group has ranks, got {width}")
        for name, number in (("scale", 1.0 if scale is None else scale), ("eps", eps)):
            _checks.number(name, number)
        shape = (q.shape[0], states, width // size, v.shape[2] + normalize)
        if isinstance(state, torch.Tensor) and state.shape != shape:
            raise ValueError(f"state: expected shape {list(shape)}, this rank's channels, got {list(state.shape)}")

    def signature() -> dict[str, Any]:
        shapes = {name: (list(x.shape), x.dtype) for name, x in (("q", q), ("k", k), ("v", v))}
        gate = None if g is None else list(g.shape)
        return {"op": "gated_linear_attention_step", "options": (normalize, scale, eps), "g": gate, **shapes}

    known = _AGREED.setdefault(torch.distributed.group.WORLD if group is None else group, set())
    checked(SimpleNamespace(group=group, size=size, agreed=known), signature, check)
    width, wide = q.shape[2], torch.promote_types(q.dtype, torch.float32)
    own = slice(rank * width // size, (rank + 1) * width // size)
    queries, keys, values = (x.to(wide) for x in (q[..., own], k[..., own], v))
    if normalize:
        values = torch.nn.functional.pad(values, (0, 1), value=1.0)
    gate = None if g is None else (g[..., own] if g.dim() == 3 else g).to(wide)
    factor = width**-0.5 if scale is None else scale
    o = _step(queries, keys, values, gate, state, scale=factor, backend=backend)
    if size > 1:
        _collectives.all_reduce(o, group)
    if normalize:
        o = o[..., :-1] / (o[..., -1:] + eps)
    return o.to(q.dtype)
