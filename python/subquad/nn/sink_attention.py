"""`SinkAttention`: softmax attention to the first tokens and a window, which trains on sequences and streams for ever."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import _checks
from ..cache.sink import SinkKVCache
from ..recipes.sink import sink_attention
from ..rope import RopeSpec


class SinkAttention(nn.Module):
    """Attention to the first tokens of a sequence and to a window (StreamingLLM, arXiv 2309.17453).

    Without a cache it is `sink_attention`, with every gradient. With one from `new_cache` it streams: the same result for any
    division of a sequence into calls, in constant memory and time per token.

    Args:
        hidden_size: width of the input.
        num_heads, num_kv_heads: Hq and Hkv, which divides it; None for as many.
        head_dim: D; None for hidden_size / num_heads.
        sink_tokens, window: as in `sink_attention`.
        learned_sink: one more term exp(sink_logits[h]) of every softmax denominator, a parameter (gpt-oss).
        rope: rotation of queries and keys, or None.
        positions: "cache": as in a cache of sink_tokens + window tokens; "absolute": as in the sequence.
        qk_norm: RMSNorm of every head of q and k before the rotation.
        bias: whether the projections have one.
        backend: of the operators.
        device, dtype: of the parameters.

    Attributes:
        q_proj, k_proj, v_proj, o_proj: as in transformers' attention.
        sink_logits: parameter [Hq], 0 at first, or None.

    Raises:
        TypeError: wrong type of an option.
        ValueError: sizes that do not fit, unknown options.

    Example:
        >>> import torch, subquad
        >>> layer = subquad.nn.SinkAttention(64, 4, 2, window=12)
        >>> layer(torch.randn(2, 30, 64)).shape
        torch.Size([2, 30, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        sink_tokens: int = 4,
        window: int = 1020,
        learned_sink: bool = False,
        rope: RopeSpec | None = None,
        positions: str = "cache",
        qk_norm: bool = False,
        bias: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, size in (("hidden_size", hidden_size), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            _checks.size(name, size, 1)
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        _checks.size("head_dim", head_dim, 1)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of {num_heads}, got {num_kv_heads}")
        _checks.size("sink_tokens", sink_tokens)
        _checks.size("window", window)
        _checks.choice("positions", positions, ("cache", "absolute"))
        for name, flag in (("learned_sink", learned_sink), ("qk_norm", qk_norm), ("bias", bias)):
            _checks.flag(name, flag)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.sink_tokens, self.window, self.positions = sink_tokens, window, positions
        self.rope, self.backend = rope, backend
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, keys = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, inner, bias, **options)
        self.k_proj = nn.Linear(hidden_size, keys, bias, **options)
        self.v_proj = nn.Linear(hidden_size, keys, bias, **options)
        self.o_proj = nn.Linear(inner, hidden_size, bias, **options)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6, **options) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6, **options) if qk_norm else None
        self.sink_logits = nn.Parameter(torch.zeros(num_heads, **options)) if learned_sink else None
        self.new_cache(0)  # which checks the rest

    def new_cache(self, batch: int, **options: Any) -> SinkKVCache:
        """An empty cache for `batch` sequences.

        Args:
            batch: B.
            options: of `SinkKVCache`: slack, dtype (None for that of the projections), kv_dtype, key_rope.
        """
        weight = self.k_proj.weight
        logits = None if self.sink_logits is None else self.sink_logits.detach()
        placed: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        return SinkKVCache(
            batch, self.num_kv_heads, self.head_dim, sink_tokens=self.sink_tokens, window=self.window, rope=self.rope,
            positions=self.positions, sink_logits=logits, backend=self.backend, **(placed | options),
        )  # fmt: skip

    def forward(
        self, x: torch.Tensor, cache: SinkKVCache | None = None, pad: torch.Tensor | None = None
    ) -> torch.Tensor:
        """y [B, T, hidden_size].

        Args:
            x: [B, T, hidden_size], with a `cache` the next T tokens of every sequence.
            cache: of `new_cache`; advanced. There are no gradients then.
            pad: int32 or int64 [B], columns before the first token of each row. Their rows of y mean nothing.

        Raises:
            TypeError, ValueError: as `sink_attention` and `SinkKVCache.prefill`; a cache of another layer's options.
        """
        q = self._heads(self.q_proj(x), self.q_norm)
        k = self._heads(self.k_proj(x), self.k_norm)
        v = self._heads(self.v_proj(x), None)
        if cache is None:
            out = self._whole(q, k, v, pad)
        else:
            self._check(cache)
            out, _ = cache.prefill(q, k, v, pad)
        y: torch.Tensor = self.o_proj(out.flatten(2))
        return y

    def _heads(self, x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        x = x.unflatten(-1, (-1, self.head_dim))
        return x if norm is None else norm(x)

    def _whole(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pad: torch.Tensor | None) -> torch.Tensor:
        rope = self.rope
        if rope is not None:
            places = torch.arange(q.shape[1], device=q.device)[:, None]
            if pad is not None:
                places = places - _checks.integers("pad", pad, 1)[:, None, None]
            q, k = rope.rotate(q, places, rope.attention_scaling**2), rope.rotate(k, places)
        out = sink_attention(
            q, k, v, sink_tokens=self.sink_tokens, window=self.window, sink_logits=self.sink_logits, pad=pad,
            q_shift=rope if self.positions == "cache" else None, backend=self.backend,
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out

    def _check(self, cache: SinkKVCache) -> None:
        if not isinstance(cache, SinkKVCache):
            raise TypeError(f"cache: expected a subquad.SinkKVCache or None, got {type(cache).__name__}")
        for name in ("sink_tokens", "window", "positions"):
            own, other = getattr(self, name), getattr(cache, name)
            if own != other:
                raise ValueError(f"cache: expected {name} {own!r} as this layer has, got {other!r}")

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"sink_tokens={self.sink_tokens}, window={self.window}, positions={self.positions!r}"
        )
