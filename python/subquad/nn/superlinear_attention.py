"""Attention to a window and to spans that every head chooses, as a layer that learns where to look: Superlinear attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import _checks
from .._packing import Packed
from ..masks import IntervalMask
from ..ops import _call, _spans
from ..recipes.superlinear import attended
from ..rope import RopeSpec, check_rope
from ..superlinear import SuperlinearConfig, warn_of_gaps
from ._attention import AttentionLayer
from ._children import check_whole, plain
from ._inherited import Inherited, remember
from ._scores import normed, scores_of
from ._sharded import in_parts
from ._sizes import add_projections
from ._tokens import Tokens, firsts_of, keys_of, read, refuse_packed, sliding_window

SEARCHES = ("copy_q", "random")
_OPTIONS = tuple(field.name for field in dataclasses.fields(SuperlinearConfig) if field.init)


class SuperlinearAttention(AttentionLayer):
    r"""Causal attention to a window and to a few spans that every head of every token chooses (Superlinear, arXiv 2601.18401).

    Beside the queries of attention there are queries of the search, `q_search_proj`: their products with the keys choose the
    spans, and weigh them, by which the choice learns. Time grows as T ** (1 + max(power, span_power)), every key can be reached,
    and a cache holds keys and values, nothing else. See `subquad.superlinear_attention`.

    Args:
        hidden_size: width of the input.
        num_heads, num_kv_heads: Hq and Hkv, which divides it; None for as many.
        head_dim: D; None for hidden_size / num_heads.
        config: a `SuperlinearConfig`; None for one of `options`, its fields.
        rope: the rotation of queries and keys where a call gives no `position_embeddings`; None for none.
        qk_norm: RMSNorm of every head of q and k before the rotation. Queries of the search have that of q.
        qkv_bias, o_bias: whether the projections have one; that of the search as that of q.
        layer_idx: number of the layer in a cache.
        parts: modules to use instead of new ones, by name: projections, q_norm, k_norm.
        backend: of the operators.
        device, dtype: of the parameters.
        options: fields of the config.

    Attributes:
        q_proj, k_proj, v_proj, o_proj, q_norm, k_norm: as in transformers' attention; the last two may be None.
        q_search_proj: of the queries of the search, [Hq D, hidden_size].
        config: as it was given; without `sm_scale`, a layer made from an attention has the scale of that.
        original: the attention that `from_attention` was given, or None; not a submodule.

    Raises:
        TypeError: wrong type of an option.
        ValueError: sizes that do not fit, options together with a config.

    Example:
        >>> import torch, subquad
        >>> layer = subquad.nn.SuperlinearAttention(64, 4, 2, sw_index=3)
        >>> layer(torch.randn(2, 40, 64))[0].shape
        torch.Size([2, 40, 64])
    """

    q_search_proj: nn.Module

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        config: SuperlinearConfig | None = None,
        rope: RopeSpec | None = None,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        o_bias: bool = False,
        layer_idx: int | None = None,
        parts: Mapping[str, nn.Module] | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.config = config = _config(config, options)
        self._set_sizes(hidden_size, num_heads, num_kv_heads, head_dim, layer_idx)
        if self.head_dim > _spans.MAX_HEAD_DIM:
            raise ValueError(f"head_dim: expected at most {_spans.MAX_HEAD_DIM}, got {self.head_dim}")
        for name, value in (("qk_norm", qk_norm), ("qkv_bias", qkv_bias), ("o_bias", o_bias)):
            _checks.flag(name, value)
        check_rope("rope", rope)
        self.rope, self.backend = rope, backend
        made: dict[str, Any] = {"device": _checks.device("device", device), "dtype": dtype}
        queries = ("q_search_proj",)
        add_projections(self, parts, bias=qkv_bias, qk_norm=qk_norm, o_bias=o_bias, queries=queries, **made)
        self._used = config  # with the scale of an original
        warn_of_gaps(config)
        remember(self, None)

    @classmethod
    def from_attention(
        cls,
        attention: nn.Module,
        config: SuperlinearConfig | None = None,
        init_search: str = "copy_q",
        *,
        backend: str | None = None,
        **options: Any,
    ) -> SuperlinearAttention:
        """A layer with the projections and norms of a softmax attention, shared, not copied, and a search of its own.

        While a sequence is no longer than the window, it computes what the attention does. How that scales and rotates is found
        by calling it with numbers of ours.

        Args:
            attention: a module of transformers with q_proj, k_proj, v_proj, o_proj and head_dim: Llama, Mistral, Qwen, SmolLM.
            config: a `SuperlinearConfig`; None for one of `options`, its fields.
            init_search: "copy_q": `q_search_proj` computes what q_proj does at this moment, adapters included; "random": it is
                a new linear map.
            backend: of the operators.

        Raises:
            TypeError: wrong type of an option.
            ValueError: one of another form, or with chunks, a sliding window, dropout, sinks, a cap of scores or parts that there
                is no place for; scores that are none of those known.
        """
        config = _config(config, options)
        _checks.choice("init_search", init_search, SEARCHES)
        check_whole(attention)
        given = Inherited.of(attention, "Superlinear attention")
        if (own := sliding_window(attention)) is not None:
            raise ValueError(
                f"attention: expected one that sees every key before it, got one with a sliding window of {own}, whose time is "
                "linear as it is; leave this layer out by layers=[...]"
            )
        scores = scores_of(attention, given.heads, given.kv_heads, given.head_dim)
        if scores.softcap is not None:
            raise ValueError(
                "attention: expected none with attn_logit_softcapping, which Superlinear attention has not"
            )
        made: dict[str, Any] = {"device": given.device, "dtype": given.dtype}
        search = _search(given, init_search, made)
        layer = cls(
            given.hidden_size, given.heads, given.kv_heads, given.head_dim, config=config, layer_idx=given.layer_idx,
            parts=given.parts | {"q_search_proj": search}, backend=backend, **made,
        )  # fmt: skip
        layer.scores = scores
        if config.sm_scale is None and scores.scaling is not None:
            layer._used = dataclasses.replace(config, sm_scale=scores.scaling)
        remember(layer, attention)
        return layer

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """What the layer has and softmax attention has not: those of the search."""
        return {f"q_search_proj.{name}": p for name, p in self.q_search_proj.named_parameters()}

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | IntervalMask | None = None,
        past_key_values: Any = None,
        cu_seqlens: torch.Tensor | Packed | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """As transformers' attention is called, or with a tensor alone.

        Places are columns: padding before the first token of a row counts as nothing, a hole behind it as a key that is not seen.

        Args:
            hidden_states: [B, T, hidden_size].
            position_embeddings: (cos, sin) [B|1, T, d], which rotate q, k and the queries of the search alike; None for `rope`.
            attention_mask: as for `LawcatAttention.forward`. In two dimensions it has a column for all that a cache has seen.
            past_key_values: a cache of transformers that grows or is preallocated, which holds keys and values as for the
                model's own attention; it is advanced, and may be cropped, reordered or quantised.
            cu_seqlens: [N + 1], bounds of sequences packed into B = 1, without a cache.
            cache: another name of `past_key_values`, which transformers uses from 5.24 on.
            kwargs: what else the model passes. Bounds named `cu_seq_lens_q`, `seq_idx` [B, T], and `position_ids` that start
                again tell packed sequences apart too; `output_attentions` is refused.

        Returns:
            (output [B, T, hidden_size], None). Rows of padding mean nothing, but are finite.

        Raises:
            TypeError: a mask that is none; hidden states that are no float tensor.
            ValueError: hidden states of another shape; a mask that is not causal with padding or packed sequences; packed
                sequences with a cache; a cache that forgets keys, or holds something else.
        """
        if position_embeddings is None and self.original is not None and self.scores.positions_needed:
            raise ValueError("position_embeddings: expected (cos, sin), which the original rotates by, got None")
        _checks.hidden(hidden_states, self.hidden_size)
        cache = cache if past_key_values is None else past_key_values
        if cu_seqlens is not None:
            kwargs["cu_seqlens"] = cu_seqlens

        def attend(x: torch.Tensor) -> torch.Tensor:
            return self._forward(x, position_embeddings, attention_mask, cache, **kwargs)

        return in_parts(self, self.o_proj, attend, hidden_states), None

    def _forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: Any,
        cache: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The output of the heads there are."""
        b, t, _ = hidden_states.shape
        seen = None if cache is None else _seen(cache, self.layer_idx)
        tokens = read(attention_mask, b, t, None, seen, position_embeddings, **kwargs)
        device = hidden_states.device
        # Before the cache counts on, which it may do in place.
        place = tokens.once(("place", device), lambda: _places(t, seen, device))
        q, k, v, search = (
            p(hidden_states).unflatten(-1, (-1, self.head_dim))
            for p in (self.q_proj, self.k_proj, self.v_proj, self.q_search_proj)
        )
        q, k, search = normed(self.q_norm, q), normed(self.k_norm, k), normed(self.q_norm, search)
        q, k, search = self._rotated(q, k, search, position_embeddings, place)
        if cache is not None:
            tokens.once("alone", lambda: refuse_packed(tokens))
            k, v = self._kept(cache, k, v, kwargs)
        mixed = self._attend(search, q, k, v, place, attention_mask, tokens, seen)
        y: torch.Tensor = self.o_proj(mixed.flatten(2))
        return y

    def _rotated(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        search: torch.Tensor,
        given: tuple[torch.Tensor, torch.Tensor] | None,
        place: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All three by the model's angles, or by `rope` at their columns: only differences of positions count."""
        if given is not None:
            q, k, search = (self.scores.rotate(x, given) for x in (q, k, search))
        elif self.rope is not None:
            factor = self.rope.attention_scaling**2
            q, search = (self.rope.rotate(x, place[:, None], factor) for x in (q, search))
            k = self.rope.rotate(k, place[:, None])
        return q, k, search

    def _kept(
        self, cache: Any, k: torch.Tensor, v: torch.Tensor, told: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values [B, N, Hkv, D] of a cache that has taken these in."""
        keys, values = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx, told)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def _attend(
        self,
        search: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        place: torch.Tensor,
        mask: Any,
        tokens: Tokens,
        seen: int | torch.Tensor | None,
    ) -> torch.Tensor:
        """[B, T, Hq, D]."""
        (b, t), keys = q.shape[:2], k.shape[1]
        search, q, k, v = _call.autocast(search, q, k, v)
        k, v = k.to(q.dtype), v.to(q.dtype)  # a cache may have been filled under autocast, or without

        def reach() -> tuple[_spans.Reach, IntervalMask | None, torch.Tensor | None]:
            """What every query may reach, its window, and which keys there are."""
            shown = keys_of(mask, tokens, t, keys, seen)
            shown = None if shown is None else shown.to(q.device).expand(b, -1)
            first = firsts_of(tokens, t)
            reached = _spans.reach(self._used, b, t, keys, q.device, cache_position=place, mask=shown, first=first)
            return reached, _spans.window_mask(self._used, reached, keys, shown), shown

        reached, window, shown = tokens.once((self._used, keys, q.device), reach)
        return attended(search, q, k, v, k, self._used, reached, window, shown, self.backend)[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.config.window_len()}, num_spans={self.config.num_spans}"


def _config(config: object, options: dict[str, Any]) -> SuperlinearConfig:
    if config is None:
        unknown = next((name for name in options if name not in _OPTIONS), None)
        if unknown is not None:
            raise TypeError(f"{unknown}: unknown option; expected some of {', '.join(_OPTIONS)}")
        return SuperlinearConfig(**options)
    if not isinstance(config, SuperlinearConfig):
        raise TypeError(f"config: expected a subquad.SuperlinearConfig or None, got {type(config).__name__}")
    if options:
        raise ValueError(f"{next(iter(options))}: expected to be set in config, which is given")
    return config


# --- the search ----------------------------------------


@torch.no_grad()
def _search(given: Inherited, init: str, made: dict[str, Any]) -> nn.Linear:
    """A new projection of the search, which computes what q_proj does, or something else."""
    projection, inner = given.parts["q_proj"], given.heads * given.head_dim
    weight: torch.Tensor
    bias: torch.Tensor | None
    if plain(projection, nn.Linear):
        weight, bias = projection.weight, projection.bias
    else:
        weight, bias = _answers(projection, given.hidden_size, made)
    search = nn.Linear(given.hidden_size, inner, bias=bias is not None, **made)
    if init == "copy_q":
        search.weight.copy_(weight)
        if bias is not None:
            search.bias.copy_(bias)
    return search


def _answers(projection: nn.Module, width: int, made: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of an affine map that is no plain Linear (adapted, quantised, offloaded), by what it answers."""
    ask = torch.zeros(width + 1, width, **made)
    ask[1:].fill_diagonal_(1.0)
    modes = [(part, part.training) for part in projection.modules()]
    try:
        for part, _ in modes:  # without dropout of adapters
            part.training = False
        answers = projection(ask)
    finally:
        for part, mode in modes:
            part.training = mode
    bias = answers[0] if bool(answers[0].any()) else None
    return (answers[1:] - answers[0]).T, bias


# --- caches ----------------------------------------


def _places(length: int, seen: int | torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Columns of the tokens, int32 [T]."""
    place = torch.arange(length, dtype=torch.int32, device=device)
    return place if seen is None else place + seen


def _seen(cache: Any, layer_idx: int | None) -> int | torch.Tensor:
    """Columns that a layer of a cache holds, if it holds keys and forgets none."""
    if layer_idx is None:
        raise ValueError("layer_idx: expected the layer's number, since past_key_values is given, got None")
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list) or not hasattr(cache, "update"):
        raise ValueError(f"past_key_values: expected a Cache of transformers, got {type(cache).__name__}")
    layer = layers[layer_idx] if layer_idx < len(layers) else getattr(cache, "layer_class_to_replicate", None)
    if getattr(layer, "is_sliding", False) or hasattr(layer, "state"):
        kind = layer.__name__ if isinstance(layer, type) else type(layer).__name__
        raise ValueError(
            f"past_key_values: expected a layer {layer_idx} that holds every key, for a span may be anywhere, got a {kind}"
        )
    seen: int | torch.Tensor = cache.get_seq_length(layer_idx)
    return seen
