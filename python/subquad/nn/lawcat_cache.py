"""What a LAWCAT layer remembers between calls, alone or inside a cache of the transformers library."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass
class LawcatState:
    """The memory of one layer, constant in size: N sequences, raw inputs of the convolutions, sums over all tokens.

    Attributes:
        conv_q, conv_k: last conv_size - 1 queries [N, HQ d, W-1] and keys [N, HKV d, W-1] before the convolution.
        conv_v: such values, where they are convolved.
        s, z: states of `gated_linear_attention`, [N, HS, K, V] and [N, HS, K] float32.
        window_k, window_v: last window_size - 1 rotated keys and values [N, w-1, HKV, d] of the hybrid.
        window_visible: bool [N, w-1], False where there is none.
        late_k, late_v, late_g: features, values and gates of the last window_size tokens, which a linear branch that does not
            cover the window has not seen yet.
        seen: tokens that went by, padding included.
    """

    conv_q: torch.Tensor | None = None
    conv_k: torch.Tensor | None = None
    conv_v: torch.Tensor | None = None
    s: torch.Tensor | None = None
    z: torch.Tensor | None = None
    window_k: torch.Tensor | None = None
    window_v: torch.Tensor | None = None
    window_visible: torch.Tensor | None = None
    late_k: torch.Tensor | None = None
    late_v: torch.Tensor | None = None
    late_g: torch.Tensor | None = None
    seen: int = 0

    @property
    def late(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """late_k, late_v and late_g; None before the first call."""
        return None if self.late_k is None or self.late_v is None else (self.late_k, self.late_v, self.late_g)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is there, by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if isinstance(value, torch.Tensor)}

    def select(self, rows: torch.Tensor) -> None:
        """Go on with these sequences, which may repeat: beams, or a batch that shrinks."""
        for name, value in self.tensors().items():
            setattr(self, name, value.index_select(0, rows.to(value.device)))


class LawcatCache:
    """States by `layer_idx`, for `LawcatAttention` without the transformers library."""

    def __init__(self) -> None:
        self.states: dict[int, LawcatState] = {}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Go on with these sequences [M]."""
        for state in self.states.values():
            state.select(beam_idx)


def state_of(cache: Any, layer_idx: int | None) -> LawcatState | None:
    """The state of a layer in a cache, made at its first use; None without a cache.

    In a cache of the transformers library the layer's entry becomes a linear attention layer that also counts tokens: those of
    the library do not, and a model of linear layers alone could not tell its positions.

    Raises:
        ValueError: no `layer_idx`, an entry that holds keys already, or a cache of another kind.
    """
    if cache is None:
        return None
    if layer_idx is None:
        raise ValueError("layer_idx: expected the layer's number, since past_key_values is given, got None")
    if isinstance(cache, LawcatCache):
        return cache.states.setdefault(layer_idx, LawcatState())
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        raise ValueError(
            f"past_key_values: expected a LawcatCache or a Cache of transformers, got {type(cache).__name__}"
        )
    kind = cache_layer_class()
    replicate = getattr(cache, "layer_class_to_replicate", None)
    while len(layers) <= layer_idx:
        layers.append(kind() if replicate is None else replicate())
    if not isinstance(layers[layer_idx], kind):
        if getattr(layers[layer_idx], "is_initialized", False):
            raise ValueError(
                f"past_key_values: expected an unused layer {layer_idx}, got one that holds keys and values"
            )
        layers[layer_idx] = kind(layers[layer_idx])
    state: LawcatState = layers[layer_idx].state
    return state


@functools.cache
def cache_layer_class() -> type:
    """transformers' linear attention cache layer, holding a `LawcatState`.

    Raises:
        ImportError: a transformers without linear attention layers (before 5).
    """
    try:
        from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer
    except ImportError as error:
        raise ImportError(
            f"subquad: a LAWCAT layer in a transformers cache needs transformers >= 5: {error}"
        ) from error

    class LawcatCacheLayer(LinearAttentionLayer, CacheLayerMixin):  # type: ignore[misc, override]
        """conv_states: queries, keys; recurrent_states: S, z."""

        is_sliding = False
        is_croppable = False

        def __init__(self, replaced: Any = None) -> None:
            LinearAttentionLayer.__init__(self, number_of_states=2)
            self.state = LawcatState()
            self.keys = self.values = None
            # transformers may make the mask of all layers after this one: it has the columns of a preallocated cache.
            preallocated = not getattr(replaced, "is_sliding", False)
            self.columns: int | None = getattr(replaced, "max_cache_len", None) if preallocated else None

        def __getattribute__(self, name: str) -> Any:
            if name in ("conv_states", "recurrent_states", "has_previous_state"):
                state = object.__getattribute__(self, "__dict__").get("state") or LawcatState()
                if name == "has_previous_state":
                    return dict.fromkeys(range(2), state.seen > 0)
                names = ("conv_q", "conv_k") if name == "conv_states" else ("s", "z")
                return {i: getattr(state, field) for i, field in enumerate(names)}
            return super().__getattribute__(name)

        @property
        def is_initialized(self) -> bool:
            return self.state.seen > 0

        @is_initialized.setter
        def is_initialized(self, value: bool) -> None:
            pass

        def get_seq_length(self) -> int:
            return self.state.seen

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.columns or self.state.seen + query_length, 0

        def get_max_length(self) -> int:
            return -1

        def update(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("a LAWCAT layer keeps no keys and values")

        def reset(self) -> None:
            self.state = LawcatState()

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            self.state.select(beam_idx)

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            self.state.select(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            if self.state.s is not None:
                self.state.select(torch.arange(self.state.s.shape[0]).repeat_interleave(repeats))

        def crop(self, tokens_to_remove: int) -> None:
            if tokens_to_remove:
                raise RuntimeError("a LAWCAT layer cannot forget its last tokens: its states are sums")

        def _move(self, device: torch.device | str) -> None:
            for name, value in self.state.tensors().items():
                setattr(self.state, name, value.to(device, non_blocking=True))

        def offload(self) -> None:
            if self.state.s is not None:
                self.device = self.state.s.device  # type: ignore[assignment]
                self._move("cpu")

        def prefetch(self) -> None:
            if self.device is not None:
                self._move(self.device)

    return LawcatCacheLayer
