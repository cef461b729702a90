"""What a layer takes over from the softmax attention that it is made from, and gives back to it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..cache.state import adapter_for
from ._children import placement, set_mode
from ._sharded import check_restored
from ._sizes import NORMS, PROJECTIONS
from ._tokens import chunk_size


@dataclass(frozen=True)
class Inherited:
    """Parts of an attention, shared, and its sizes.

    Attributes:
        parts: projections, and the norms of q and k that there are, by name.
        hidden_size, heads, kv_heads, head_dim: of the projections.
        layer_idx: number of the layer in a cache, or None.
        device, dtype: of new parameters beside these.
    """

    parts: dict[str, nn.Module]
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    layer_idx: int | None
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, attention: nn.Module, heir: str, *, sinks: bool = False) -> Inherited:
        """The parts of an attention of transformers.

        Args:
            attention: with q_proj, k_proj, v_proj, o_proj and head_dim.
            heir: what takes its place, for messages.
            sinks: whether the heir has a place for sink logits, a parameter named `sinks`.

        Raises:
            ValueError: one of another form, or with chunks, dropout or parts that the heir has no place for.
        """
        parts: dict[str, Any] = {name: getattr(attention, name, None) for name in PROJECTIONS}
        width = getattr(attention, "head_dim", None)
        if not all(isinstance(part, nn.Module) for part in parts.values()) or not isinstance(width, int):
            kind = type(attention).__name__
            raise ValueError(f"attention: expected q_proj, k_proj, v_proj, o_proj and head_dim, got a {kind}")
        q, k, v, o = parts.values()
        sizes = [getattr(part, "out_features", 0) for part in (q, k, v)] + [getattr(o, "in_features", 0)]
        if 0 in sizes or sizes[0] % width or sizes[1] % width or sizes[1] != sizes[2] or sizes[0] != sizes[3]:
            raise ValueError(f"attention: expected projections to heads of {width}, got sizes {sizes} of q, k, v and o")
        for name in ("attention_dropout",) if sinks else ("attention_dropout", "sinks"):
            value = getattr(attention, name, None)
            if value is not None and not (isinstance(value, (int, float)) and value == 0):
                raise ValueError(f"attention: expected none with {name}, which {heir} has not")
        if (chunks := chunk_size(attention)) is not None:
            raise ValueError(f"attention: expected none in chunks, got one with config.attention_chunk_size = {chunks}")
        known = (*PROJECTIONS, *NORMS, *(("sinks",) if sinks else ()))
        others = [name for name in _computing(attention) if name not in known]
        if others:
            raise ValueError(f"attention: expected none with {others[0]}, which would be left out")
        parts |= {name: norm for name in NORMS if (norm := getattr(attention, name, None)) is not None}
        device, dtype = placement(q)
        index = getattr(attention, "layer_idx", None)
        return cls(parts, q.in_features, sizes[0] // width, sizes[1] // width, width, index, device, dtype)


def remember(layer: nn.Module, original: nn.Module | None) -> None:
    """Keep the original out of the layer's registry, whose parameters are its own, and be in its mode."""
    object.__setattr__(layer, "original", original)
    if original is None:
        return
    with suppress(ImportError):
        adapter_for(original)  # imports what its library's caches need: compiled code cannot
    if hasattr(original, "is_sliding"):  # Gemma 3 in transformers 4.57 asks its layers, and rotates accordingly
        object.__setattr__(layer, "is_sliding", original.is_sliding)
    set_mode(layer, original.training, besides=original)


def give_back(layer: Any, names: tuple[str, ...] = PROJECTIONS + NORMS) -> nn.Module:
    """The original of a layer, with the parts of these names that the layer has now.

    Raises:
        ValueError: it was not made from one.
    """
    original: nn.Module | None = layer.original
    if original is None:
        raise ValueError("original: expected a layer made by from_attention, got one made on its own")
    check_restored(layer.o_proj)
    for name in names:
        if getattr(layer, name) is not getattr(original, name, None):
            setattr(original, name, getattr(layer, name))
    set_mode(original, layer.training, besides=layer)
    return original


def _computing(attention: nn.Module) -> list[str]:
    """Names of its own parameters, and of children that have some or normalise: what its output depends on."""
    own = [name for name, _ in attention.named_parameters(recurse=False)]
    return own + [
        name
        for name, child in attention.named_children()
        if next(child.parameters(), None) is not None or type(child).__name__.endswith("Norm")
    ]
