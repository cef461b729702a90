"""`SinkCache`: a cache of transformers with sinks and a window, for models as they are and for converted ones."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from ... import _checks
from ..._backends import SubquadWarning
from ...cache.sink_state import SinkState
from ...convert.attentions import ATTENTION
from ...convert.replace import find
from ...nn._inherited import Inherited
from ...nn._options import SinkConfig
from ...nn._rotation import rope_of
from ...nn._scores import scores_of
from ...nn.sink_attention import SinkAttention
from ...rope import RopeSpec, check_rope
from ._versions import Cache, Counting, DynamicCache, DynamicLayer, queries
from .cache import StateLayer


class SinkCache(Cache):
    """The first tokens and a window of every layer, in constant memory (StreamingLLM, arXiv 2309.17453).

    Of a model as it is, with any attention implementation, the cache gives the layers their keys in order, the sinks turned to
    where a rolling cache has them. That is exact for one token at a time, and for a first prompt of up to sink_tokens + window
    tokens. A longer first prompt is dense within itself, as in StreamingLLM's own code: only what comes after it forgets.
    Sequences must be of equal length without padding, and positions count on from 0. Layers that slide keep their own window
    and have no sinks. A cache that holds tokens takes no gradients: none would flow through what it holds.

    A model that `convert(model, attention="sink")` has converted is exact for every prompt, chunk and padding. Its layers put
    their own states here, and `sink_tokens` and `window` must be theirs.

    Args:
        config: of the model, or the model itself. What the layers rotate, and how, is found by calling them; with a config, in
            a model of its kind without weights.
        sink_tokens: S, first tokens of every sequence, which stay.
        window: W, tokens up to the query's own, which counts.
        positions: "cache": those in the cache, below S + W for ever; "absolute": those in the sequence.
        slack: tokens that can be taken back at any time.
        kv_dtype: of the keys and values behind the sinks: None for the model's, "int8" or "float8_e4m3fn".
        rope: the rotation of all layers, for models whose attention cannot be called for it; None to look at them.
        allow_approx: take what is not exact, too: later chunks of several tokens beyond the capacity, of which all see what the
            last one may see and no more than S + W - 1 tokens before the chunk; and padding, as tokens.

    Raises:
        TypeError, ValueError: options of a wrong type or out of range; when it is used, a rotation that cannot be found or
            depends on the length.

    Example:
        >>> cache = subquad.SinkCache(model.config, sink_tokens=4, window=1020)  # doctest: +SKIP
        >>> model.generate(**prompt, cache=cache, max_new_tokens=100_000)  # doctest: +SKIP
    """

    def __init__(
        self,
        config: Any,
        sink_tokens: int = 4,
        window: int = 1020,
        *,
        positions: str = "cache",
        slack: int = 64,
        kv_dtype: str | torch.dtype | None = None,
        rope: RopeSpec | None = None,
        allow_approx: bool = False,
    ) -> None:
        options = SinkConfig(sink_tokens, window, positions, kv_dtype, slack, key_rope="post")
        options.check()
        _checks.flag("allow_approx", allow_approx)
        check_rope("rope", rope)
        model = config if isinstance(config, nn.Module) else None
        config = config if model is None else getattr(model, "config", None)
        if not hasattr(config, "get_text_config"):
            raise TypeError(f"config: expected a config or a model of transformers, got {type(config).__name__}")
        config = config.get_text_config(decoder=True)
        rotations = (
            _Rotations(config if model is None else model, rope) if positions == "cache" and sink_tokens else None
        )
        layers: list[Any] = list(DynamicCache(config=config).layers)
        counting = None if allow_approx else Counting()
        for index, layer in enumerate(layers):
            if type(layer) is DynamicLayer:  # full attention
                layers[index] = SinkLayer(options, index, rotations, counting)
        super().__init__(layers=layers)

    def reset(self) -> None:
        super().reset()
        layers: list[Any] = self.layers
        for layer in layers:  # those of 4.57 that slide would go on from zeros
            layer.is_initialized = False

    @property
    def is_compileable(self) -> bool:
        """`generate` would compile a graph for every number of tokens."""
        return False


class SinkLayer(StateLayer):
    """A layer of a `SinkCache` for attention that nobody has converted: it gives keys and values."""

    holds_keys = True

    def __init__(
        self, options: SinkConfig, index: int, rotations: _Rotations | None, counting: Counting | None
    ) -> None:
        state = SinkState(
            options.slack, sink_tokens=options.sink_tokens, window=options.window, kv_dtype=options.ring_dtype(),
            key_rope="post", positions=options.positions,
        )  # fmt: skip
        super().__init__(state, keep=options.slack)
        self.options, self.index, self.rotations, self.counting = options, index, rotations, counting
        self.rope: RopeSpec | None = None
        self.record_past = True

    state: SinkState

    @property
    def capacity(self) -> int:
        return self.options.sink_tokens + self.options.window

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        return False

    def expect(self, state: Any) -> None:
        """Whether the state of a converted layer may take this place: of sinks, it has those that the user has asked for here."""
        if not isinstance(state, SinkState) or state.slides:
            return
        own = (self.options.sink_tokens, self.options.window)
        if (state.options["sink_tokens"], state.options["window"]) != own:
            theirs = f"sink_tokens={state.options['sink_tokens']}, window={state.options['window']}"
            raise ValueError(
                f"past_key_values: expected a SinkCache with {theirs} as layer {self.index} was converted with, got "
                f"sink_tokens={own[0]}, window={own[1]}"
            )

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        sizes = {
            "num_kv_heads": key_states.shape[1],
            "head_dim": key_states.shape[3],
            "v_head_dim": value_states.shape[3],
        }
        self.state.options |= sizes
        if self.rotations is not None:
            self.rope = self.rotations.of(self.index)
        self.is_initialized = True

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        held = self._held()
        return held + queries(query_length), int(self.state.seen) - held

    def _held(self) -> int:
        """Tokens that are given out before new ones."""
        return min(int(self.state.seen), self.capacity - 1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen, new = int(self.state.seen), key_states.shape[2]
        self._check(seen, new, kwargs.get("kwargs") or next(iter(args), None) or {})
        if seen and torch.is_grad_enabled():  # a first prompt is given back as it came
            for name, x in (("key_states", key_states), ("value_states", value_states)):
                _checks.no_gradient(name, x, "call the model under torch.no_grad(), or train without a cache")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        with torch.no_grad():
            k, v = (x.detach().transpose(1, 2) for x in (key_states, value_states))
            cache = self.state.of(k)
            before = self._before(cache, seen, new) if seen else None
            cache.append(k.to(cache.sink_k.dtype), v.to(cache.sink_v.dtype))
        self.state.advance(new, None)
        if before is None:
            return key_states, value_states
        keys, values = (
            torch.cat([x.to(y.dtype), y], 2) for x, y in zip(before, (key_states, value_states), strict=True)
        )
        return keys, values

    def _before(self, cache: Any, seen: int, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tokens that are given out before `new` ones, in order: sinks turned on by what is forgotten."""
        k, v, _, _ = cache.gather()
        sinks, held = self.options.sink_tokens, self._held()
        first = sinks + 1 if seen > held and self.options.window else sinks  # the place of the new token itself
        count = held - sinks
        parts = []
        for x in (k, v):
            early = x[:, :, : min(sinks, held)]
            parts.append([early, x[:, :, first : first + max(count, 0)]])
        forgotten = seen + new - self.capacity
        if self.rope is not None and forgotten > 0:
            by = torch.full((1, 1, 1), forgotten, dtype=torch.int64, device=k.device)
            parts[0][0] = self.rope.rotate(parts[0][0], by)
        return torch.cat(parts[0], 2), torch.cat(parts[1], 2)

    def _check(self, seen: int, new: int, told: dict[str, Any]) -> None:
        if self.counting is None:
            return
        if (not seen or new > 1) and not torch.compiler.is_compiling() and not self.counting.goes_on(told, seen):
            raise ValueError(
                f"position_ids: expected {seen}, {seen + 1}, ... in every row, without padding, for a SinkCache; convert the "
                "model (attention='sink'), or allow_approx=True"
            )
        if seen and new > 1 and seen + new > self.capacity:
            raise ValueError(
                f"past_key_values: expected one token at a time beyond {self.capacity} tokens, for a SinkCache, got {new} after "
                f"{seen}; convert the model (attention='sink'), or allow_approx=True"
            )
        if not seen and new > self.capacity and self.index == 0:
            warnings.warn(
                f"subquad: a prompt of {new} tokens is more than the {self.capacity} of this SinkCache: attention within it is "
                "dense; a converted model (attention='sink') forgets there, too",
                SubquadWarning,
                stacklevel=2,
            )


class _Rotations:
    """How the layers of a model rotate, looked at when the first of them is used."""

    def __init__(self, source: Any, rope: RopeSpec | None) -> None:
        self.source, self.rope = source, rope
        self.found: dict[int, RopeSpec | None] | None = None

    def of(self, index: int) -> RopeSpec | None:
        """Of the layer with this number; None for one that does not rotate."""
        if self.rope is not None:
            return self.rope
        if self.found is None:
            self.found, self.source = _found(self.source), None
        if index not in self.found:
            raise ValueError(f"config: expected one that tells how layer {index} rotates; pass rope=")
        return self.found[index]


def _found(source: Any) -> dict[int, RopeSpec | None]:
    found: dict[int, RopeSpec | None] = {}
    model = source if isinstance(source, nn.Module) else _without_weights(source)
    for name, attention in find(model, ATTENTION).items():
        index = getattr(attention, "layer_idx", None)
        if index is None or isinstance(attention, SinkAttention):
            continue
        try:
            given = Inherited.of(attention, "a SinkCache", sinks=True)
            found[index] = rope_of(attention, scores_of(attention, given.heads, given.kv_heads, given.head_dim))
        except ValueError as error:
            raise ValueError(
                f"config: expected one that tells how layers rotate, or rope=, got {name}: {error}"
            ) from error
    return found


def _without_weights(config: Any) -> nn.Module:
    from transformers import AutoModel

    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(copy.deepcopy(config))
    return model
