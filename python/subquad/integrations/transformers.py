"""Converting models of the transformers library, or any `nn.Module` built like them.

The library itself is never imported: modules are recognised by their attributes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from torch import nn

from ..nn.cats_mlp import dense_state_dict
from ..nn.conversion import CatsConfig, convert_mlps, revert_mlps

MLPS = ("cats",)


def convert(
    model: nn.Module,
    *,
    mlp: str | CatsConfig | None = None,
    attention: str | None = None,
    layers: Iterable[int | str] | None = None,
    **options: Any,
) -> list[str]:
    """Replace layers of a model by subquad's, in place, sharing the weights. All or nothing: errors change nothing.

    A converted MLP is dense until it has a threshold: see `subquad.CatsCalibrator`, or pass `threshold=`. Layers that
        are
    converted already stay as they are; `revert` first to change their options.

    Args:
        model: a model with gated MLPs named `mlp` or `feed_forward`: Llama, Mistral, Qwen, Gemma, Phi-3 and others like
            them.
        mlp: "cats", or a `CatsConfig`.
        attention: no conversion of attention is in this version.
        layers: decoder layer numbers (negative from the end) or qualified module names; None for all.
        options: fields of `CatsConfig`, for `mlp="cats"`.

    Returns:
        Qualified names of the modules converted.

    Raises:
        ValueError: for an unknown conversion, an unknown entry of `layers`, a model without gated MLPs, or a layer that
            cannot be converted (named in the message).
        TypeError: for an unknown option.

    Example:
        >>> convert(model, mlp="cats")  # doctest: +SKIP
        ['model.layers.0.mlp', 'model.layers.1.mlp']
    """
    if attention is not None:
        raise ValueError(
            f"attention: attention conversions are not in this version, only mlp='cats'; got {attention!r}"
        )
    if mlp is None:
        raise ValueError(f"mlp: expected one of {', '.join(map(repr, MLPS))} or a CatsConfig, got None")
    if isinstance(mlp, CatsConfig):
        if options:
            raise TypeError(f"{next(iter(options))}: options come with mlp='cats'; with a CatsConfig, set them there")
        return convert_mlps(model, mlp, layers)
    if mlp not in MLPS:
        raise ValueError(f"mlp: expected one of {', '.join(map(repr, MLPS))} or a CatsConfig, got {mlp!r}")
    known = [field.name for field in fields(CatsConfig)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"{unknown[0]}: unknown option; expected some of {', '.join(known)}")
    return convert_mlps(model, CatsConfig(**options), layers)


def revert(model: nn.Module) -> list[str]:
    """Undo every `convert`: the original module objects return, with their weights in the original layout.

    Returns:
        Qualified names of the modules put back; empty when nothing was converted.
    """
    return revert_mlps(model)


__all__ = ["CatsConfig", "convert", "dense_state_dict", "revert"]
