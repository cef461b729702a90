"""Any `State` as a layer of a cache of transformers, which needs that library to be imported at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...cache.lawcat import KEPT
from ...cache.state import State
from ._versions import CacheLayerMixin, LayerBase, grows_compiled, queries, removed


class StateLayer(LayerBase):
    """A cache layer that holds a state and counts tokens, which the linear layers of transformers do not.

    The first call of the model keeps what a rollback needs even if nobody asked: `generate` announces a rollback before the
    layers of its cache are of this kind. Later calls keep it if `activate_past_recording` or `crop` was called.

    Attributes:
        state: the memory itself.
        record_past: whether a rollback is announced.
        depth: tokens that can be taken back then.
        columns: of the masks of a preallocated cache; None: as many as are looked at.
        siblings: all layers of the cache.
    """

    is_sliding = False
    holds_keys = False  # for attention that nobody has converted

    def __init__(
        self,
        state: State,
        replaced: Any = None,
        keep: int = 0,
        columns: int | None = None,
        siblings: Sequence[Any] = (),
    ) -> None:
        self.state = state
        self.siblings = siblings
        self.keys = self.values = None
        self.depth = keep or KEPT
        self.record_past = keep > 0 or bool(getattr(replaced, "record_past", False))
        self.is_initialized = False
        self.device: Any = None
        self.columns = columns
        if columns is not None:
            state.seen = torch.zeros((), dtype=torch.int64)  # type: ignore[misc]
        if self.record_past:
            state.keep(self.depth)

    def use(self) -> State:
        """The state for one more call of the model."""
        if not self.record_past:
            first = not self.is_initialized and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
            self.state.keep(self.depth if first else 0)
        self.is_initialized = True
        return self.state

    def get_seq_length(self) -> Any:
        return self.state.seen if self.is_initialized else 0

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """As layers that hold keys need it, for all that do not slide share a mask; without such layers the new columns."""
        if self.columns is not None:
            return self.columns, 0
        sizes = (layer.get_mask_sizes(query_length) for layer in self.siblings if _holds_keys(layer))
        return next(sizes, None) or (queries(query_length), self.state.seen)  # type: ignore[return-value]

    def get_max_length(self) -> int:
        return -1

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """As the cache is: a preallocated one that is not leaves steps without the mask that hides its empty columns."""
        return self.columns is not None or grows_compiled(self.record_past)

    # --- going back ----------------------------------------

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.record_past or self.state.kept > 0

    def activate_past_recording(self, tokens: int | None = None) -> None:
        """Keep what `crop` needs to remove up to `tokens` tokens (64 unless told otherwise) from the next call on."""
        self.depth = self.depth if tokens is None else tokens
        self.record_past = True
        self.state.keep(self.depth)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove minus `tokens_to_remove` tokens; what was kept for that is dropped, also where none are removed.

        With transformers 4.57 a number that is not negative says how many tokens stay.

        Raises:
            ValueError: a positive number, or more tokens than were kept. The state is as it was, but layers of softmax before it
                in the cache have been cut, for transformers goes from layer to layer.
        """
        tokens, kept = removed(tokens_to_remove, self.state.seen), self.state.kept
        if tokens > kept:
            raise ValueError(
                f"tokens_to_remove: expected at most the {kept} tokens that this layer keeps, got {-tokens}. "
                f"{self.state.advice} in new caches: 64 for a model that drafts for another, prompt_lookup_num_tokens where "
                "those are more; activate_past_recording(tokens) of this layer says so from now on. Layers before this one "
                "have been cut already: do not use the cache again"
            )
        self.state.rollback(tokens)
        self.record_past = True
        self.state.keep(self.depth)

    # --- rows and devices ----------------------------------------

    def reset(self) -> None:
        self.state.reset()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.state.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        count = next((x.shape[0] for x in self.state.tensors().values()), 0)
        self.state.select(torch.arange(count).repeat_interleave(repeats))

    def offload(self) -> None:
        self.device = next((x.device for x in self.state.tensors().values()), self.device)
        self.state.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        if self.device is not None:
            self.state.to(self.device, non_blocking=True)

    # --- what transformers shows of a linear attention layer ----------------------------------------

    @property
    def conv_states(self) -> dict[int, torch.Tensor | None]:  # type: ignore[override]
        return dict(getattr(self.state, "conv_states", {}))

    @property
    def recurrent_states(self) -> dict[int, torch.Tensor | None]:  # type: ignore[override]
        return dict(getattr(self.state, "recurrent_states", {}))

    @property
    def has_previous_state(self) -> dict[int, bool]:  # type: ignore[override]
        return dict.fromkeys(self.conv_states or (0,), self.is_initialized)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"a {type(self.state).__name__} is made by its layer")

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"a {type(self.state).__name__} keeps no keys and values for other layers")

    update_conv_state = update_recurrent_state = update


def state_in(cache: Any, layer_idx: int, make: Callable[[], State], keep: int = 0) -> State:
    """The state of a layer in a `transformers.Cache` for one more call, made at its first use; see `cache.state.adapter_for`.

    Raises:
        ValueError: an entry that holds keys already, or a cache without layers.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        raise ValueError(
            f"past_key_values: expected a LawcatCache or a Cache of transformers, got {type(cache).__name__}"
        )
    replicate = getattr(cache, "layer_class_to_replicate", None)
    while len(layers) <= layer_idx:
        layers.append(StateLayer(make(), keep=keep, siblings=layers) if replicate is None else replicate())
    layer = layers[layer_idx]
    if getattr(layer, "holds_keys", True):
        if _used(layer):
            raise ValueError(
                f"past_key_values: expected an unused layer {layer_idx}, got one that holds keys and values"
            )
        state = make()
        if (expect := getattr(layer, "expect", None)) is not None:
            expect(state)
        layers[layer_idx] = layer = StateLayer(state, layer, keep, _columns(layers), layers)
    return layer.use()


def _holds_keys(layer: Any) -> bool:
    """Whether a layer is one of softmax that does not slide, and a mask has to show all that it holds."""
    keys = isinstance(layer, CacheLayerMixin) and getattr(layer, "holds_keys", True)
    return keys and not getattr(layer, "is_sliding", False)


def _used(layer: Any) -> bool:
    """Whether a layer holds keys. One that is initialised may hold none: preallocated ones are initialised early."""
    if not getattr(layer, "is_initialized", False):
        return False
    if torch.compiler.is_compiling() and getattr(layer, "max_cache_len", None) is not None:
        return False  # how many it holds is no number there
    return bool(layer.get_seq_length() > 0)


def _columns(layers: list[Any]) -> int | None:
    """Those of a preallocated cache. transformers asks the first layer that does not slide for the mask of all such layers, and a
    state does not slide, whatever it replaces."""
    full = (layer for layer in layers if not getattr(layer, "is_sliding", False))
    sizes = (
        layer.columns if isinstance(layer, StateLayer) else getattr(layer, "max_cache_len", None) for layer in full
    )
    return next((size for size in sizes if size is not None), None)
