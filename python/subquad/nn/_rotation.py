"""The rotation of a softmax attention as frequencies, from its config, and whether the positions it is given agree with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..rope import RopeSpec
from ._scores import Scores

# What a cosine may be off: rounding of the model's dtype comes on top, and of its positions times frequencies in float32.
TOLERANCE = 1e-3
_PLACES = 256  # positions compared


def rope_of(attention: nn.Module, scores: Scores, longest: int | None = None) -> RopeSpec | None:
    """How an attention of transformers rotates queries and keys: None if it does not.

    Args:
        attention: with a config, that of its kind of layer where there are several.
        scores: what a probe of it has found.
        longest: positions that will be needed; None: any. See `RopeSpec.from_hf`.

    Raises:
        ValueError: no config that `RopeSpec.from_hf` can read.
    """
    if scores.rotation == "none":
        return None
    config = getattr(attention, "config", None)
    if config is None:
        raise ValueError(f"attention: expected a config that names its rotation, got a {type(attention).__name__}")
    try:
        spec = RopeSpec.from_hf(_OfLayer(config, attention), longest)
    except ValueError as error:
        raise ValueError(f"attention: no rotation of its config: {error}") from error
    spec.interleaved = scores.rotation in ("interleaved", "spread")
    return spec


class _OfLayer:
    """A config with the head size of a layer, and with the rotation of its kind where there is one for each."""

    def __init__(self, config: Any, attention: Any) -> None:
        self._config, self.head_dim = config, attention.head_dim
        parameters = getattr(config, "rope_parameters", None)
        if isinstance(parameters, Mapping) and any(isinstance(value, Mapping) for value in parameters.values()):
            kinds, index = getattr(config, "layer_types", None), getattr(attention, "layer_idx", None)
            kind = getattr(attention, "layer_type", None)
            parameters = parameters.get(kind if kind is not None or not kinds else kinds[index]) or {}
        elif getattr(config, "rope_local_base_freq", None) and getattr(attention, "is_sliding", False):
            parameters = {"rope_theta": config.rope_local_base_freq}  # Gemma 3 in transformers 4.57
        self.rope_parameters = parameters

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def check_positions(
    spec: RopeSpec, scores: Scores, given: tuple[torch.Tensor, torch.Tensor], positions: torch.Tensor
) -> None:
    """Whether a model's cosines and sines [B|1, T, n] at `positions` [B|1, T] are those of `spec`.

    Frequencies may have been rounded: a model that was cast to 16 bits has such ones for good.

    Raises:
        ValueError: they are not.
    """
    places, scaling = positions[:1, :_PLACES].long(), spec.attention_scaling
    if spec.max_positions is not None and int(places.max()) >= spec.max_positions:
        return  # the model uses other frequencies there, and what it does is no stream
    eps = torch.finfo(given[0].dtype).eps
    exact = spec.inv_freq.to(places.device).double()
    differ = []
    for frequencies in (exact, exact.to(torch.bfloat16).double(), exact.to(torch.float16).double()):
        angles = places[..., None] * frequencies
        own = [angles.cos(), angles.sin(), angles.abs() * max(eps, 2.0**-21)]  # the model's angles are in float32
        if scores.rotation == "interleaved":
            own = [x.repeat_interleave(2, -1) for x in own]
        elif scores.rotation != "once":
            own = [torch.cat([x, x], -1) for x in own]
        if own[0].shape[-1] != given[0].shape[-1]:
            expected = f"{own[0].shape[-1]} channels, as the config says"
            raise ValueError(f"position_embeddings: expected {expected}, got {given[0].shape[-1]}")
        far = torch.stack([x[:1, :_PLACES].double() - y * scaling for x, y in zip(given, own[:2], strict=True)]).abs()
        if bool((far <= TOLERANCE + scaling * (2 * eps + own[2])).all()):
            return
        differ.append(float(far.max()))
    raise ValueError(
        f"position_embeddings: expected the rotation of the config, got one that differs by {differ[0]:.3g}: "
        "the layer would rotate otherwise than the model does"
    )
