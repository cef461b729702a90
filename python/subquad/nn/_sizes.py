"""Sizes that a user gives a layer, and the parts that he gives to it, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import _checks
from ._children import features

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")


def check_sizes(least: int = 1, **sizes: int) -> None:
    """Numbers of at least `least`, of weights that can be asked for."""
    for name, size in sizes.items():
        _checks.size(name, size, least)
    _checks.elements(**sizes)


def add_projections(
    layer: Any,
    parts: Mapping[str, Any] | None,
    *,
    bias: bool,
    qk_norm: bool,
    o_bias: bool | None = None,
    queries: tuple[str, ...] = (),
    also: tuple[str, ...] = (),
    **made: Any,
) -> None:
    """Projections and norms of an attention with its sizes: those in `parts`, new ones for the others.

    Args:
        layer: with hidden_size, num_heads, num_kv_heads and head_dim.
        parts: modules by name.
        bias, qk_norm: of new projections; whether there are new norms.
        o_bias: of o_proj; None for that of the others.
        queries: names of more projections of the size of q_proj, which follow it.
        also: names that `parts` may have besides.
        made: device and dtype of new parameters.
    """
    given = {} if parts is None else parts
    _checks.mapping("parts", given)
    inner, keys = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    sizes = dict.fromkeys(("q_proj", *queries), (layer.hidden_size, inner))
    sizes |= dict.fromkeys(("k_proj", "v_proj"), (layer.hidden_size, keys))
    sizes |= {"o_proj": (inner, layer.hidden_size)}
    known = (*sizes, *NORMS, *also)
    for name in given:
        if name not in known:
            raise ValueError(f"parts: expected names of {', '.join(known)}, got {name!r}")
    for name, size in sizes.items():
        biased = o_bias if name == "o_proj" and o_bias is not None else bias
        part = given[name] if name in given else nn.Linear(*size, bias=biased, **made)
        _checks.module(f"parts[{name!r}]", part)
        if (features(part) or size) != size:
            raise ValueError(f"parts[{name!r}]: expected a map of {size[0]} to {size[1]}, got {features(part)}")
        layer.add_module(name, part)
    for name, width in zip(NORMS, (inner, keys), strict=True):
        norm = given.get(name, nn.RMSNorm(layer.head_dim, eps=1e-6, **made) if qk_norm and name not in given else None)
        if norm is not None:
            _checks.module(f"parts[{name!r}]", norm)
            weight = getattr(norm, "weight", None)
            widths = (0, 1, layer.head_dim, width)  # of a head, or of all heads together; 0 where a weight is sharded
            if isinstance(weight, torch.Tensor) and weight.dim() == 1 and weight.shape[0] not in widths:
                raise ValueError(
                    f"parts[{name!r}]: expected a norm of {layer.head_dim} or {width}, got {weight.shape[0]}"
                )
        layer.add_module(name, norm)
