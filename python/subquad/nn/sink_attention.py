"""Attention to the first tokens and to a window, with a cache of constant size: StreamingLLM as a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .. import _checks
from .._packing import Packed
from ..cache.sink import SinkKVCache
from ..cache.sink_state import SinkState, state_of
from ..masks import IntervalMask
from ..recipes.sink import sink_attention
from ..rope import RopeSpec
from ._attention import AttentionLayer
from ._children import check_whole, placement
from ._inherited import Inherited, give_back, remember
from ._options import SinkConfig
from ._rotation import check_positions, rope_of
from ._scores import normed, scores_of
from ._sequences import Sequences
from ._sharded import in_parts, mesh_of, sharded
from ._sizes import NORMS, PROJECTIONS, add_projections
from ._tokens import Tokens, read, refuse_packed, sliding_window


class SinkAttention(AttentionLayer):
    """Softmax attention to the first tokens of a sequence and to a window (StreamingLLM, arXiv 2309.17453).

    Token i sees token j if j <= i and (j < sink_tokens or i - j < window). Time is linear in T; with a cache, memory and time per
    token are constant, and the numbers those without one, however the tokens come. Queries and keys are rotated here, by phases
    that are exact at any position.

    Args:
        hidden_size: width of the input.
        num_heads, num_kv_heads: Hq and Hkv, which divides it; None for as many.
        head_dim: D; None for hidden_size / num_heads.
        rope: the rotation of queries and keys, or None.
        scale: factor of the scores; None for D ** -0.5.
        qk_norm: RMSNorm of every head of q and k before the rotation.
        bias: whether the projections have one.
        sink_tokens: S, first tokens of every sequence, which stay.
        window: W, tokens up to the query's own, which counts.
        positions: "cache": positions of tokens are those in the cache, below S + W for ever; "absolute": those in the sequence.
        kv_dtype: of the cache behind the sinks: None for the model's, "int8" or "float8_e4m3fn", or torch's dtypes of these.
        slack: tokens that a cache can take back at any time.
        key_rope: "pre": keys in a cache are rotated where they are read; "post": where they enter.
        learned_sink: `sinks` [Hq], one more term exp(sinks[h]) of the softmax denominator, 0 at the start.
        backend: of the operators.
        sinks_in_sliding: for `from_attention`: a layer with a window of its own gets the sinks, too, and the narrower of both
            windows. Otherwise it keeps its own and sees what it was trained to see.
        layer_idx: number of the layer in a cache.
        parts: modules to use instead of new ones, by name: projections, q_norm, k_norm; and a parameter `sinks`.
        device, dtype: of the parameters.

    Attributes:
        q_proj, k_proj, v_proj, o_proj, q_norm, k_norm, sinks: as in transformers' attention; the last three may be None.
        sink_tokens, window: of this layer.
        original: the attention that `from_attention` was given, or None; not a submodule.
        config: the options it was made with.

    Raises:
        TypeError: wrong type of an option.
        ValueError: sizes that do not fit, unknown options.

    Example:
        >>> import torch, subquad
        >>> layer = subquad.nn.SinkAttention(64, 4, 2, sink_tokens=2, window=6)
        >>> layer(torch.randn(2, 10, 64))[0].shape
        torch.Size([2, 10, 64])
    """

    sinks: nn.Parameter | None
    cache_kind: Callable[..., SinkKVCache] = SinkKVCache  # what makes its caches

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        rope: RopeSpec | None = None,
        scale: float | None = None,
        qk_norm: bool = False,
        bias: bool = False,
        layer_idx: int | None = None,
        parts: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.config = config = SinkConfig(**options)
        config.check()
        self._set_sizes(hidden_size, num_heads, num_kv_heads, head_dim, layer_idx)
        for name, value in (("qk_norm", qk_norm), ("bias", bias)):
            _checks.flag(name, value)
        self.rope = rope
        self.scale = None if scale is None else _checks.number("scale", scale)
        self.sink_tokens, self.window, self.slides = config.sink_tokens, config.window, False
        made: dict[str, Any] = {"device": _checks.device("device", device), "dtype": dtype}
        add_projections(self, parts, bias=bias, qk_norm=qk_norm, also=("sinks",), **made)
        self.register_parameter("sinks", self._sinks(parts or {}, made))
        self._compared = True  # whether positions given by a model have been looked at
        remember(self, None)
        self.new_cache(0)  # which checks the rest

    def _sinks(self, parts: Mapping[str, Any], made: dict[str, Any]) -> nn.Parameter | None:
        """Those given, or new ones where they are learned."""
        if "sinks" not in parts:
            return nn.Parameter(torch.zeros(self.num_heads, **made)) if self.config.learned_sink else None
        sinks = parts["sinks"]
        if not isinstance(sinks, nn.Parameter):
            raise TypeError(f"parts['sinks']: expected a torch.nn.Parameter, got {type(sinks).__name__}")
        if sinks.numel() and sinks.shape != (self.num_heads,):
            raise ValueError(f"parts['sinks']: expected shape [{self.num_heads}], got {list(sinks.shape)}")
        return sinks

    @classmethod
    def from_attention(cls, attention: nn.Module, **options: Any) -> SinkAttention:
        """A layer with the projections, norms of q and k, and sink logits of a softmax attention, shared, not copied.

        It scores keys as the attention does, which is found by calling that with numbers of ours, and rotates as its config says.
        A layer that slides keeps its own window and gets no sinks, unless `sinks_in_sliding`.

        Args:
            attention: a module of transformers with q_proj, k_proj, v_proj, o_proj and head_dim: Llama, Mistral, Qwen, Gemma,
                SmolLM, gpt-oss.
            options: arguments of the constructor.

        Raises:
            ValueError: one of another form, or with chunks, dropout, a cap of scores or parts that there is no place for; scores
                or a rotation that are none of those known; frequencies that depend on the length, beyond the length for which
                they do not.
        """
        check_whole(attention)
        given = Inherited.of(attention, "attention with sinks", sinks=True)
        scores = scores_of(attention, given.heads, given.kv_heads, given.head_dim)
        if scores.softcap is not None:
            raise ValueError("attention: expected none with attn_logit_softcapping, which attention with sinks has not")
        parts: dict[str, Any] = dict(given.parts)
        if getattr(attention, "sinks", None) is not None:
            parts["sinks"] = attention.sinks
        defaults = {"layer_idx": given.layer_idx, "device": given.device, "dtype": given.dtype}
        sizes: dict[str, Any] = {"num_kv_heads": given.kv_heads, "head_dim": given.head_dim, "parts": parts}
        layer = cls(given.hidden_size, given.heads, **sizes, scale=scores.scaling, **(defaults | options))
        if (own := sliding_window(attention)) is not None:
            both = layer.config.sinks_in_sliding
            layer.sink_tokens, layer.window = (layer.sink_tokens, min(layer.window, own)) if both else (0, own)
            layer.slides = True
        layer.scores = scores
        layer.rope = rope_of(attention, scores, layer._longest())
        layer._compared = layer.rope is None
        remember(layer, attention)
        return layer

    def to_attention(self) -> nn.Module:
        """The attention this layer was made from, with the parts that this layer has now.

        Raises:
            ValueError: it was not made from one.
        """
        sinks = ("sinks",) if hasattr(self.original, "sinks") else ()
        return give_back(self, (*PROJECTIONS, *NORMS, *sinks))

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """What the layer has and its original has not: learned sinks, if any."""
        return {} if self.sinks is None or hasattr(self.original, "sinks") else {"sinks": self.sinks}

    def _longest(self) -> int | None:
        """Positions that are ever needed; None: any."""
        return self.sink_tokens + self.window if self.config.positions == "cache" or not self.sink_tokens else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | IntervalMask | None = None,
        past_key_values: Any = None,
        cu_seqlens: torch.Tensor | Packed | None = None,
        cache: Any = None,
        pad: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """As transformers' attention is called, or with a tensor alone.

        Args:
            hidden_states: [B, T, hidden_size].
            position_embeddings: (cos, sin) as the model has them. They are not used, but compared once, for the layer rotates by
                its config; so do not count on positions of your own.
            attention_mask: as for `LawcatAttention.forward`: which tokens are real is read off it, and which sequences they form;
                padding changes nothing, wherever it is.
            past_key_values: a cache of `new_cache`, a `subquad.SinkCache` or another cache of transformers; it is advanced. There
                are no gradients through what it holds.
            cu_seqlens: [N + 1], bounds of sequences packed into B = 1, without a cache.
            cache: another name of `past_key_values`, which transformers uses from 5.24 on.
            pad: int32 or int64 [B], columns before the first token of each row, in the place of a mask.
            kwargs: what else the model passes. Bounds named `cu_seq_lens_q`, `seq_idx` [B, T], and `position_ids` that start
                again tell packed sequences apart too; `output_attentions` is refused.

        Returns:
            (output [B, T, hidden_size], None). Rows of padding are o_proj of 0.

        Raises:
            TypeError: a mask that is none.
            ValueError: a mask that is not causal with padding or packed sequences; packed sequences with a cache, or a cache of
                another layer's options; a gradient through a cache; another rotation than that of the config.
        """
        _checks.hidden(hidden_states, self.hidden_size)
        if pad is not None:
            attention_mask = self._after(pad, attention_mask, hidden_states)
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
        state = state_of(cache, self.layer_idx, self._state, self.config.slack)
        if isinstance(state, SinkKVCache):
            self._check(state)
        seen = state.seen if isinstance(state, SinkState) else None
        window = None if self.original is None else sliding_window(self.original)
        tokens = read(attention_mask, b, t, window, seen, position_embeddings, **kwargs)
        self._compare(position_embeddings, kwargs.get("position_ids"))
        q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = normed(self.q_norm, q), normed(self.k_norm, k)
        mixed = self._attend(q, k, v, tokens) if state is None else self._stream(q, k, v, tokens, state)
        y: torch.Tensor = self.o_proj(mixed.flatten(2))
        return y

    def _after(self, pad: torch.Tensor, mask: Any, x: torch.Tensor) -> torch.Tensor:
        """The mask that `pad` stands for."""
        if mask is not None:
            raise ValueError("pad: expected None beside attention_mask, got both")
        _checks.integers("pad", pad, 1)
        _checks.same_device("pad", pad, x.device, "hidden_states")
        if pad.shape[0] != x.shape[0]:
            raise ValueError(f"pad: expected shape [{x.shape[0]}], got {list(pad.shape)}")
        if _checks.readable(pad) and any(not 0 <= n <= x.shape[1] for n in pad.tolist()):
            raise ValueError(f"pad: expected numbers in 0..{x.shape[1]}, got {_checks.shown(pad.tolist())}")
        return torch.arange(x.shape[1], device=x.device) >= pad[:, None]

    def _check(self, cache: SinkKVCache) -> None:
        for name, own in (
            ("sink_tokens", self.sink_tokens), ("window", self.window), ("positions", self.config.positions),
        ):  # fmt: skip
            if own != getattr(cache, name):
                raise ValueError(f"cache: expected {name} {own!r} as this layer has, got {getattr(cache, name)!r}")
        if self.sinks is None and cache.sink_logits is not None:
            raise ValueError("cache: expected no sink_logits, since this layer has no sinks, got some")
        if cache.rope is not self.rope and not torch.compiler.is_compiling():
            if self.rope is None or cache.rope is None or not self.rope.same_as(cache.rope):
                raise ValueError("cache: expected the rope of this layer, as new_cache gives it, got another rotation")
            cache.rope = self.rope  # looked at once

    def _compare(self, given: tuple[torch.Tensor, torch.Tensor] | None, positions: Any) -> None:
        if self._compared or given is None or not isinstance(positions, torch.Tensor) or torch.compiler.is_compiling():
            return
        if positions.dim() == 2 and positions.numel():
            assert self.rope is not None
            check_positions(self.rope, self.scores, given, positions)
            self._compared = True

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Attention without a cache, [B, T, Hq, D]."""
        sequences = Sequences.of(tokens, *q.shape[:2])
        place, bounds = torch.arange(q.shape[1], device=q.device), None
        if sequences is not None:
            q, k, v = (sequences.gather(x) for x in (q, k, v))
            bounds = sequences.packed
            place = torch.arange(q.shape[1], device=q.device) - bounds.int64[bounds.sequence.long()]
        if self.rope is not None:
            place = place[:, None]
            q, k = self.rope.rotate(q, place, self.rope.attention_scaling**2), self.rope.rotate(k, place)
        y = sink_attention(
            q, k, v, sink_tokens=self.sink_tokens, window=self.window, sink_logits=self.sinks, scale=self.scale,
            q_shift=self.rope if self.config.positions == "cache" else None, cu_seqlens=bounds,
            backend=self.config.backend,
        )  # fmt: skip
        assert isinstance(y, torch.Tensor)
        return y if sequences is None else sequences.spread(y)

    # --- with a cache ----------------------------------------

    def _state(self) -> SinkState:
        mesh = mesh_of(self.o_proj)  # None in a forward, where the heads are this process's
        heads = self.num_kv_heads // (1 if mesh is None else mesh.size())
        return SinkState(
            self.config.slack, self.slides, self.cache_kind, num_kv_heads=heads, head_dim=self.head_dim,
            sink_tokens=self.sink_tokens, window=self.window, kv_dtype=self.config.ring_dtype(),
            key_rope=self.config.key_rope, positions=self.config.positions, rope=self.rope, backend=self.config.backend,
        )  # fmt: skip

    def new_cache(
        self, batch: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> SinkKVCache:
        """A cache for this layer alone, of `batch` sequences, in the dtype and on the device of the projections unless given."""
        own_device, own_dtype = placement(self.k_proj)
        device = own_device if device is None else _checks.device("device", device)
        assert device is not None
        cache = self._state().made(batch, own_dtype if dtype is None else dtype, device)
        self._give_sinks(cache)
        return cache

    def _give_sinks(self, cache: SinkKVCache) -> None:
        """Those of now: a parameter may be another after a step of an optimizer. A graph keeps what it has."""
        if self.sinks is not None and (cache.sink_logits is None or not torch.compiler.is_compiling()):
            sinks: Any = self.sinks.detach()
            cache.sink_logits = sinks.to_local() if sharded(sinks) else sinks

    def _stream(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: Tokens, state: SinkState | SinkKVCache
    ) -> torch.Tensor:
        """Attention to a cache, which is advanced, [B, T, Hq, D]."""
        cache = state.of(k) if isinstance(state, SinkState) else state
        refuse_packed(tokens, cache.seen == 0)
        self._give_sinks(cache)
        order, count = tokens.once("compact", lambda: _compact(tokens.real))
        dtype = cache.sink_k.dtype
        fed, keys, values = (x.to(dtype) if order is None else _taken(x.to(dtype), order) for x in (q, k, v))
        learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, self.sinks))
        if learns and isinstance(state, SinkState):
            _check_fresh(state.seen)  # a model that trains may have made a cache all the same
            y = self._attend(q, k, v, tokens)
            with torch.no_grad():
                cache.append(keys.detach(), values.detach(), count)
        else:
            y, _ = cache.step(fed, keys, values, count, scale=self.scale)
            y = y.to(q.dtype) if order is None else _taken(y.to(q.dtype), order.argsort(1))
        if isinstance(state, SinkState):
            state.advance(q.shape[1], tokens.real)
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sink_tokens={self.sink_tokens}, window={self.window}"


def _check_fresh(seen: int | torch.Tensor) -> None:
    if torch.compiler.is_compiling() or int(seen):
        raise ValueError(
            "past_key_values: expected a new cache where gradients are computed, for none flow through what it holds; call under "
            "torch.no_grad(), or without a cache"
        )


def _compact(real: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of bool [B, T]: columns in the order in which tokens come first, and how many are tokens; None for what is as it is."""
    if real is None:
        return None, None
    order = None if real.shape[1] == 1 else (~real).to(torch.uint8).argsort(stable=True, dim=1)
    return order, real.sum(1, dtype=torch.int32)


def _taken(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x [B, T, H, D] with columns in this order [B, T]."""
    return x.take_along_dim(order[..., None, None], 1)
